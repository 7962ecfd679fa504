"""Prompts evaluated together give the states that each gives alone; the truth is one context, one prompt at a time."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import lookonce
from look_maker import BEGIN, END, make_look
from lookonce import states
from lookonce.engine import Engine
from lookonce.errors import ClosedError, ContextError, NativeError
from lookonce.native import text
from lookonce.native.hidden import HiddenContext
from lookonce.native.text import ContextOptions
from lookonce.prompt import Part, Prompt, TokenRun
from lookonce.states import StateRunner, check_room

Pair = tuple[Path, Path]
BATCH = 16  # in place of 512, so that small prompts are cut as large ones are
EXACT: dict[str, Any] = {"kv_type": "f32", "flash_attention": False, "threads": 1, "store": False}
A, B = (make_look(seed) for seed in range(2))
LARGE = make_look(7, (5, 8))  # more rows than a batch


@pytest.fixture(autouse=True, scope="module")
def _small_batches() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BATCH_TOKENS", BATCH)
        patch.setattr(states, "BATCH_TOKENS", BATCH)
        yield


@pytest.fixture(scope="module")
def engine(tiny_pair: Pair, _small_batches: None) -> Iterator[Engine]:
    with lookonce.load(tiny_pair[0], n_ctx=512, **EXACT) as model:
        yield model.engine


def prompt(engine: Engine, *parts: Part) -> Prompt:
    return engine.plain_prompt((BEGIN, *parts, END))


def everything(prompts: Sequence[Prompt]) -> list[NDArray[np.bool_]]:
    return [np.ones(one.n_tokens + one.n_rows, dtype=np.bool_) for one in prompts]


def alone(engine: Engine, one: Prompt, layer: int) -> NDArray[np.float32]:
    """Every cell's states of one prompt, in a context of its own."""
    options = ContextOptions(n_ctx=512, threads=1, n_outputs=BATCH, kv_type="f32", flash_attention=False)
    context = HiddenContext(engine.text, options, layer)
    found, position = [], 0
    for run in one.runs:
        if isinstance(run, TokenRun):
            for start in range(0, len(run.tokens), BATCH):
                tokens = np.array(run.tokens[start : start + BATCH], dtype=np.int32)
                places = np.arange(position, position + len(tokens), dtype=np.int32)
                zeros = np.zeros_like(places)
                found.append(context.evaluate_tokens(tokens, places, zeros, zeros == 0))
                position += len(tokens)
        else:
            wanted = np.ones(run.stop - run.start, dtype=np.bool_)
            places = run.positions + np.int32(position)
            found.append(context.evaluate_rows(run.rows, places, 0, wanted, causal=run.causal))
            position += run.advance
    context.close()
    return np.concatenate(found)


def agree(ours: Sequence[NDArray[np.float32]], theirs: Sequence[NDArray[np.float32]]) -> bool:
    return all(
        one.shape == other.shape and np.abs(one - other).max(initial=0) < 1e-4 * np.abs(other).max(initial=1)
        for one, other in zip(ours, theirs, strict=True)
    )


GROUPS: dict[str, list[tuple[Part, ...]]] = {
    "one text": [("What is it?",)],
    "texts that share a beginning": [("the cat",), ("the dog",), ("the",), ("the cat and the dog",)],
    "the same text twice": [("the cat",), ("the cat",)],
    "texts of nothing in common": [("What",), ("日本",)],
    "a text longer than a batch": [("the colour of " * 10,), ("the",), ("the colour of " * 4,)],
    "one picture": [(A, "What?")],
    "one picture and many questions": [(A, "What?"), (A, "Why?"), (A, "What colour?")],
    "pictures and texts": [(A, "What?"), ("What?",), (B,), (A, B, "Which?"), (B, A, "Which?")],
    "a picture of more rows than a batch": [(LARGE, "What?"), (LARGE, A, "What?"), ("What?",)],
    "more texts than sequences": [(f"number {n}",) for n in range(150)],
}


@pytest.mark.parametrize("layer", [1, -1])
@pytest.mark.parametrize("case", GROUPS)
def test_states_together_are_the_states_alone(engine: Engine, case: str, layer: int) -> None:
    prompts = [prompt(engine, *parts) for parts in GROUPS[case]]
    runner = StateRunner(engine, layer)
    expected = [alone(engine, one, layer) for one in prompts]
    assert agree(runner.run(prompts, everything(prompts)), expected)
    assert agree(runner.run(prompts[::-1], everything(prompts[::-1])), expected[::-1])
    runner.close()


POOL: list[tuple[Part, ...]] = [
    *[("a",), ("ab",), ("the cat",), ("the cat and more",), ("the colour of " * 6,), (A, "a"), (A, "b"), (A, B, "a")],
    *[(B, A), (LARGE, "a"), (LARGE, A, "b"), ("a", A), ("a", A, "the cat")],
]


@pytest.fixture(scope="module")
def pool(engine: Engine) -> list[NDArray[np.float32]]:
    return [alone(engine, prompt(engine, *parts), -1) for parts in POOL]


@pytest.fixture(scope="module")
def runner(engine: Engine) -> StateRunner:
    return StateRunner(engine, -1)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_was_run_before_and_is_wanted_the_states_are_right(
    engine: Engine, pool: list[NDArray[np.float32]], runner: StateRunner, data: st.DataObject
) -> None:
    numbers = data.draw(st.lists(st.integers(0, len(POOL) - 1), min_size=1, max_size=6))
    prompts = [prompt(engine, *POOL[number]) for number in numbers]
    wanted = []
    for one in prompts:
        flags = np.zeros(one.n_tokens + one.n_rows, dtype=np.bool_)
        flags[data.draw(st.lists(st.integers(0, len(flags) - 1), max_size=4))] = True
        wanted.append(flags)
    expected = [pool[number][flags] for number, flags in zip(numbers, wanted, strict=True)]
    assert agree(runner.run(prompts, wanted), expected)


# --- how much work is done


class Counted:
    """Counts the cells of every native call of a kind."""

    def __init__(self, patch: pytest.MonkeyPatch, method: str) -> None:
        self.cells: list[int] = []
        real: Callable[..., Any] = getattr(HiddenContext, method)

        def counted(context: HiddenContext, *arguments: Any, **options: Any) -> Any:
            self.cells.append(len(arguments[0]))
            return real(context, *arguments, **options)

        patch.setattr(HiddenContext, method, counted)


SHARED, OWN = tuple(range(40, 68)), 5


def endings(count: int) -> list[Prompt]:
    """Prompts of 28 tokens that all share and 5 of their own."""
    return [Prompt((TokenRun((*SHARED, *range(100 + number, 105 + number))),)) for number in range(count)]


def test_a_shared_beginning_is_evaluated_once_and_short_texts_share_batches(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = Counted(monkeypatch, "evaluate_tokens")
    runner = StateRunner(engine, -1)
    runner.run(endings(7), everything(endings(7)))
    assert tokens.cells == [14, 14, 15, 15, 5]
    runner.close()


def test_a_beginning_is_kept_from_call_to_call(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = endings(6)
    other = [prompt(engine, "something else, " + end) for end in "ab"]
    truths = [alone(engine, one, -1) for one in prompts], [alone(engine, one, -1) for one in other]
    tokens = Counted(monkeypatch, "evaluate_tokens")
    runner = StateRunner(engine, -1)
    for one, truth in zip(prompts, truths[0], strict=True):
        assert agree(runner.run([one], everything([one])), [truth])
    assert tokens.cells == [11, 11, 11, 14, 14, 5, 5, 5, 5, 5]  # found to be shared by the second prompt
    tokens.cells.clear()
    assert agree(runner.run(prompts, everything(prompts)), truths[0])
    assert tokens.cells == [15, 15]
    assert agree(runner.run(other, everything(other)), truths[1])
    assert agree(runner.run(prompts, everything(prompts)), truths[0])
    runner.close()


def test_the_same_text_again_and_again_keeps_the_beginning_for_others(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = endings(3)
    runner = StateRunner(engine, -1)
    runner.run([first, second], everything([first, second]))
    tokens = Counted(monkeypatch, "evaluate_tokens")
    for one in (second, second, second, third):
        runner.run([one], everything([one]))
    assert tokens.cells == [5, 5, 5, 5]
    runner.close()


def test_nothing_is_evaluated_after_the_last_wanted_cell(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [prompt(engine, A, "what comes after costs nothing", B), prompt(engine, A, "another text")]
    wanted = everything(prompts)
    first = len(engine.text.tokenize(BEGIN)) + 1 + A.n_rows  # up to the first picture's last row
    for flags in wanted:
        flags[first:] = False
    expected = [alone(engine, one, -1)[:first] for one in prompts]
    tokens, rows = Counted(monkeypatch, "evaluate_tokens"), Counted(monkeypatch, "evaluate_rows")
    runner = StateRunner(engine, -1)
    assert agree(runner.run(prompts, wanted), expected)
    assert rows.cells == [A.n_rows]
    assert sum(tokens.cells) == first - A.n_rows + 1  # and the picture's end, which both share
    runner.close()


def test_long_texts_are_cut_into_equal_parts(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Counted(monkeypatch, "evaluate_tokens")
    one = engine.plain_prompt(["a" * (BATCH + 2)])
    runner = StateRunner(engine, -1)
    runner.run([one], everything([one]))
    assert sum(tokens.cells) == one.n_tokens
    assert max(tokens.cells) - min(tokens.cells) <= len(tokens.cells)
    runner.close()


# --- the context


def test_the_context_is_as_large_as_the_work_and_grows(engine: Engine) -> None:
    runner = StateRunner(engine, -1)

    def cells() -> int:
        assert runner._context is not None
        return runner._context.options.n_ctx

    short = [prompt(engine, "a")]
    runner.run(short, everything(short))
    assert cells() == 256
    long = [prompt(engine, "the colour " * 100)]
    assert long[0].n_tokens > 256
    expected = [alone(engine, one, -1) for one in long]
    assert agree(runner.run(long, everything(long)), expected)
    grown = cells()
    assert grown >= long[0].n_tokens
    runner.run(short, everything(short))
    assert cells() == grown
    runner.close()


def test_a_batch_of_many_prompts_keeps_within_what_the_model_was_trained_for(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [prompt(engine, "the circle, the square and the " + end) for end in "abcdefgh"]
    most = prompts[0].n_tokens + 5
    expected = [alone(engine, one, -1) for one in prompts]
    monkeypatch.setitem(engine.text.__dict__, "context_length", most)
    runner = StateRunner(engine, -1)
    assert agree(runner.run(prompts, everything(prompts)), expected)
    assert runner._context is not None
    assert runner._context.options.n_ctx == most
    runner.close()


def test_after_a_close_the_next_run_makes_a_context_anew(engine: Engine) -> None:
    runner = StateRunner(engine, -1)
    prompts = [prompt(engine, "a"), prompt(engine, "b")]
    first = runner.run(prompts, everything(prompts))
    runner.close()
    runner.close()
    assert runner._context is None
    assert agree(runner.run(prompts, everything(prompts)), first)
    runner.close()


def test_a_call_after_a_close_is_evaluated_as_by_a_new_runner(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another cut of the same prompt changes the last bits."""
    calls: list[int] = []
    real = HiddenContext.evaluate_tokens

    def counting(context: HiddenContext, tokens: Any, *arguments: Any) -> Any:
        calls.append(len(tokens))
        return real(context, tokens, *arguments)

    monkeypatch.setattr(HiddenContext, "evaluate_tokens", counting)
    one, two = ([prompt(engine, "a cat beside a dog " * 4 + last)] for last in ("runs", "sleeps"))
    runner, other = StateRunner(engine, -1), StateRunner(engine, -1)
    other.run(two, everything(two))
    expected = calls.copy()
    runner.run(one, everything(one))
    runner.close()
    calls.clear()
    runner.run(two, everything(two))
    assert calls == expected
    runner.close()
    other.close()


def test_states_that_are_not_finite_are_refused_and_poison_nothing(engine: Engine) -> None:
    look = make_look(5)
    bad = replace(look, rows=np.full(look.rows.shape, 3e38, dtype=np.float32), key="0" * 64)
    shared = "a long beginning that both of these prompts have "
    runner = StateRunner(engine, -1)
    for last in ("one", "two"):
        prompts = [prompt(engine, shared, bad, last)]
        with pytest.raises(NativeError, match="gave values that are not finite"):
            runner.run(prompts, everything(prompts))
    good = [prompt(engine, shared, look, "two")]
    assert agree(runner.run(good, everything(good)), [alone(engine, good[0], -1)])
    runner.close()


@pytest.mark.parametrize("method", ["evaluate_tokens", "evaluate_rows", "copy", "forget"])
@pytest.mark.parametrize("done", [False, True], ids=["before its work", "after its work"])
def test_after_a_call_that_broke_off_the_next_states_are_right(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, method: str, done: bool
) -> None:
    prompts = [prompt(engine, *parts) for parts in GROUPS["pictures and texts"]]
    expected = [alone(engine, one, -1) for one in prompts]
    real = getattr(HiddenContext, method)
    runner = StateRunner(engine, -1)
    runner.run(prompts[:2], everything(prompts[:2]))
    for at in range(1, 4):
        calls = 0

        def breaking(context: HiddenContext, *arguments: Any, at: int = at, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls != at:
                return real(context, *arguments, **options)
            if done:
                real(context, *arguments, **options)
            raise KeyboardInterrupt if at % 2 else NativeError("broken")

        with monkeypatch.context() as patch:
            patch.setattr(HiddenContext, method, breaking)
            with pytest.raises((KeyboardInterrupt, NativeError)):
                runner.run(prompts, everything(prompts))
        assert agree(runner.run(prompts, everything(prompts)), expected)
    runner.close()


def test_several_threads_take_turns(engine: Engine) -> None:
    groups = [[prompt(engine, *parts) for parts in GROUPS[name]] for name in list(GROUPS)[1:9]]
    expected = [[alone(engine, one, 1) for one in group] for group in groups]
    runner = StateRunner(engine, 1)
    right: list[bool] = []

    def work(number: int) -> None:
        for _ in range(3):
            right.append(agree(runner.run(groups[number], everything(groups[number])), expected[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(groups))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 3 * len(groups)
    runner.close()


def test_a_closed_model_ends_the_runner_with_it(tiny_pair: Pair) -> None:
    with lookonce.load(tiny_pair[0], n_ctx=512, **EXACT) as model:
        prompts = [prompt(model.engine, "a")]
        runner = StateRunner(model.engine, -1)
        runner.run(prompts, everything(prompts))
    with pytest.raises(ClosedError, match=r"load the model again|load it again"):
        runner.run(prompts, everything(prompts))
    runner.close()


def test_room_is_all_the_context_has() -> None:
    check_room(60, 40, 100, "shorten it")
    with pytest.raises(ContextError, match="61 tokens and 40 image rows, but the context holds 100: shorten it, make"):
        check_room(61, 40, 100, "shorten it")
