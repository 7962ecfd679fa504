"""What is kept of a prompt is reused without a difference; the truth is a context that was never used."""

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from look_maker import BEGIN, END, make_look
from lookonce.errors import ContextError, NativeError
from lookonce.kept_state import KeptStates
from lookonce.native import text
from lookonce.native.text import Context, ContextOptions, TextModel
from lookonce.prompt import Part, Prompt, TokenRun, assemble
from lookonce.sequences import Sequences
from lookonce.turn import Turn

Logits = NDArray[np.float32]
EXACT: dict[str, Any] = {"kv_type": "f32", "flash_attention": False}
SETTINGS = pytest.mark.parametrize("setting", [EXACT, {}], ids=["exact", "default"])

BATCH = 16  # in place of 512, so that small prompts are cut as large ones are
A, B, C = (make_look(seed) for seed in range(3))
LARGE = make_look(7, (5, 8))  # more rows than a batch
LONG = "the colour of " * 10  # more tokens than a batch


@pytest.fixture(autouse=True, scope="module")
def _small_batches() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BATCH_TOKENS", BATCH)
        yield


@pytest.fixture(scope="module")
def model(tiny_pair: tuple[Path, Path]) -> Iterator[TextModel]:
    with TextModel(tiny_pair[0]) as model:
        yield model


class _Conversation:
    pass


class Bench:
    """A context, its sequences, and what both give for a prompt."""

    def __init__(
        self, model: TextModel, n_ctx: int = 2048, count: int = 4, *, owes: bool = False, **options: Any
    ) -> None:
        self.model = model
        self.context = Context(model, ContextOptions(n_ctx=n_ctx, threads=1, n_sequences=5, **options))
        self.sequences = Sequences(self.context, count, KeptStates(n_ctx), owes=owes)
        self.conversations: list[_Conversation] = []  # alive, so that all that leaves the context is kept

    def prompt(self, *parts: Part) -> Prompt:
        return assemble((BEGIN, *parts, END), self.model.tokenize, bos=None, batch_size=self.context.batch_size)

    def check(self) -> None:
        """See that the cells that count as taken are those that some sequence holds."""
        slots = self.sequences._slots
        cells = {id(cells): cells for slot in slots for cells in slot.cells}
        assert self.context.n_ctx - self.sequences.room == sum(one.count for one in cells.values())
        assert all(slot.n_cells == sum(one.count for one in slot.cells) for slot in slots)
        for one in cells.values():
            assert one.holders == sum(one is other for slot in slots for other in slot.cells)

    def turn(self, *parts: Part) -> Turn:
        self.conversations.append(_Conversation())
        return Turn(self.prompt(*parts), weakref.ref(self.conversations[-1]))

    def begin(self, *parts: Part) -> Turn:
        turn = self.turn(*parts)
        self.sequences.begin(turn)
        return turn

    def answer(self, *parts: Part, length: int = 0) -> tuple[Logits, list[int]]:
        """The logits after a prompt, and the greedy answer."""
        turn = self.begin(*parts)
        logits = self.context.logits()
        tokens = [int(logits.argmax())]
        for _ in range(length):
            self.sequences.extend(turn, tokens[-1])
            tokens.append(int(self.context.logits().argmax()))
        turn.end()
        return logits, tokens


def fresh(model: TextModel, *parts: Part, length: int = 0, **options: Any) -> tuple[Logits, list[int]]:
    bench = Bench(model, **options)
    found = bench.answer(*parts, length=length)
    bench.context.close()
    return found


REUSES: dict[str, tuple[list[tuple[Part, ...]], tuple[Part, ...], int]] = {
    # what was asked before, what is asked, the least number of cells that must be reused
    "the same question": ([(A, "What is it?")], (A, "What is it?"), 6),
    "another question about the picture": ([(A, "What is it?")], (A, "Which colour has it?"), 6),
    "a picture split over batches": ([(LARGE, "What is it?")], (LARGE, "Which colour?"), 40),
    "a prompt that is a beginning of the kept one": ([(A, "a", B, "b and more")], (A, "a"), 6),
    "a prompt that begins with the kept one": ([(A, "a")], (A, "a", B, "b"), 6),
    "two pictures in the other order": ([(A, B, "Which?")], (B, A, "Which?"), 0),
    "the second picture another one": ([(A, B, "Which?")], (A, C, "Which?"), 6),
    "a long text": ([(LONG, "a")], (LONG, "b"), BATCH),
    "one token more at the end": ([(LONG,)], (LONG, "x"), BATCH),
    "after another picture between": ([(A, "a"), (B, "b")], (A, "a"), 0),
    "after a text alone": ([("What?",)], (A, "What?"), 0),
}


@SETTINGS
@pytest.mark.parametrize("case", REUSES)
def test_a_reused_beginning_changes_no_bit_of_the_logits(model: TextModel, setting: dict[str, Any], case: str) -> None:
    before, asked, least = REUSES[case]
    bench = Bench(model, **setting)
    for parts in before:
        bench.answer(*parts, length=3)
    turn = bench.begin(*asked)
    assert turn.reused_cells >= least
    assert np.array_equal(bench.context.logits(), fresh(model, *asked, **setting)[0])
    bench.context.close()


def test_a_prompt_one_token_longer_than_the_kept_one_changes_no_bit(model: TextModel) -> None:
    tokens = model.tokenize("the colour of")
    asked = [Prompt((TokenRun(tuple(tokens[:length])),)) for length in (len(tokens) - 1, len(tokens))]
    bench, other = Bench(model), Bench(model)
    for prompt in asked:
        bench.sequences.begin(Turn(prompt))
        bench.sequences._slots[0].turn = None
    other.sequences.begin(Turn(asked[1]))
    assert np.array_equal(bench.context.logits(), other.context.logits())
    for one in (bench, other):
        one.context.close()


def test_a_picture_that_shares_its_first_rows_with_the_kept_one_is_evaluated_from_its_start(model: TextModel) -> None:
    altered = make_look(7, (5, 8))
    rows = altered.rows.copy()
    rows[-1] += 1
    object.__setattr__(altered, "rows", rows)
    bench = Bench(model)
    bench.answer(LARGE, "What is it?")
    turn = bench.begin(altered, "What is it?")
    assert turn.reused_cells == len(model.tokenize(BEGIN)) + 1
    assert np.array_equal(bench.context.logits(), fresh(model, altered, "What is it?")[0])
    bench.context.close()


def test_a_picture_of_more_rows_than_a_real_batch_is_reused_to_the_bit(
    model: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "BATCH_TOKENS", 512)
    look = make_look(8, (24, 25))
    bench = Bench(model)
    bench.answer(look, "What is it?")
    turn = bench.begin(look, "Which colour?")
    assert turn.reused_cells >= 600
    assert np.array_equal(bench.context.logits(), fresh(model, look, "Which colour?")[0])
    bench.context.close()


POOL: list[tuple[Part, ...]] = [
    *[("a",), (A, "a"), (A, "ab"), (A, B, "a"), (B, A, "a"), (A, "a", B), (LARGE, "a"), (LARGE, A, "b"), (LONG,)],
    *[(LONG, "x"), (LONG[:-30],), ("a", A, "a"), (A, A), (A, "a", END, BEGIN, "b")],
]


@pytest.fixture(scope="module")
def pool(model: TextModel) -> list[Logits]:
    return [fresh(model, *parts)[0] for parts in POOL]


@settings(max_examples=25, deadline=None)
@given(order=st.lists(st.tuples(st.integers(0, len(POOL) - 1), st.integers(0, 2)), min_size=2, max_size=6))
def test_whatever_was_asked_before_no_bit_changes(
    model: TextModel, pool: list[Logits], order: list[tuple[int, int]]
) -> None:
    bench = Bench(model)
    for number, length in order:
        logits, _ = bench.answer(*POOL[number], length=length)
        assert np.array_equal(logits, pool[number])
        bench.check()
    bench.context.close()


def test_a_prompt_is_reused_up_to_its_last_picture_and_its_own_reply_whole(model: TextModel) -> None:
    bench = Bench(model)
    turn = bench.begin(A, "What is it?")
    assert turn.reused_cells == 0
    written: list[int] = []
    for token in (5, 6, 7):
        bench.sequences.extend(turn, token)
        written.append(token)
    turn.end()
    whole = turn.n_cells
    reply = b"".join(map(model.piece, written)).decode()
    assert model.tokenize(reply) == written
    following = bench.begin(A, "What is it?", END, reply, BEGIN, "And?")
    assert following.reused_cells == whole
    expected = fresh(model, A, "What is it?", END, reply, BEGIN, "And?")[0]
    assert np.abs(bench.context.logits() - expected).max() < 5e-3 * np.abs(expected).max()
    bench.context.close()


def test_after_a_reset_nothing_is_believed_to_be_held_any_more(model: TextModel) -> None:
    bench = Bench(model, owes=True)
    stream = bench.begin(C, "What is it?")
    for look in (A, B):
        bench.answer(look, "What is it?")
    bench.sequences.release(stream)
    prompts = [bench.prompt(look, "What is it?") for look in (A, B, C)]  # in memory, in a sequence, owed to the store
    assert all(bench.sequences.reusable_units(prompt) >= prompt.picture_ends[-1] for prompt in prompts)
    bench.sequences.reset()
    bench.check()
    assert bench.sequences.room == bench.context.n_ctx
    assert [bench.sequences.reusable_units(prompt) for prompt in prompts] == [0, 0, 0]
    assert bench.sequences.take_owed() == []
    turn = bench.begin(A, "What is it?")
    assert turn.reused_cells == 0
    assert np.array_equal(bench.context.logits(), fresh(model, A, "What is it?")[0])
    bench.context.close()


# --- broken-off native calls


class Breaking:
    """Makes one call of a context's method raise, before or after its work is done."""

    def __init__(self, context: Context, method: str, at: int, error: BaseException, *, done: bool) -> None:
        self.calls = 0
        self._real: Callable[..., Any] = getattr(context, method)
        self._at, self._error, self._done = at, error, done

    def disarm(self) -> None:
        self._at = -1

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls != self._at:
            return self._real(*arguments, **options)
        if self._done:
            self._real(*arguments, **options)
        raise self._error


SCRIPT: list[tuple[Part, ...]] = [(A, "a"), (LARGE, A, "b"), (A, "a", B), (A, "c")]


def play(bench: Bench, expected: list[tuple[Logits, list[int]]]) -> bool:
    """Ask the script's questions; whether one was broken off. Those that were not must be right."""
    broken = False
    for parts, (logits, tokens) in zip(SCRIPT, expected, strict=True):
        turn = bench.turn(*parts)
        try:
            bench.sequences.begin(turn)
            found = bench.context.logits()
            assert np.array_equal(found, logits)
            written = [int(found.argmax())]
            for _ in range(2):
                bench.sequences.extend(turn, written[-1])
                written.append(int(bench.context.logits().argmax()))
            assert written == tokens
        except (KeyboardInterrupt, NativeError):
            broken = True
        finally:
            turn.end()
    return broken


@pytest.fixture(scope="module")
def expected(model: TextModel) -> list[tuple[Logits, list[int]]]:
    return [fresh(model, *parts, length=2) for parts in SCRIPT]


@pytest.mark.parametrize("done", [False, True], ids=["before its work", "after its work"])
@pytest.mark.parametrize("method", ["decode_tokens", "decode_rows", "forget"])
def test_after_any_call_that_broke_off_the_next_answers_are_right(
    model: TextModel, expected: list[tuple[Logits, list[int]]], method: str, done: bool
) -> None:
    at = 0
    while True:
        at += 1
        bench = Bench(model)
        error = KeyboardInterrupt() if at % 2 else NativeError("broken")
        breaking = Breaking(bench.context, method, at, error, done=done)
        setattr(bench.context, method, breaking)
        broken = play(bench, expected)
        reached = breaking.calls >= at
        # A state that cannot be written or read out is evaluated again, or not kept.
        assert broken == reached or (reached and isinstance(error, NativeError) and method == "forget")
        breaking.disarm()
        assert not play(bench, expected)
        bench.context.close()
        if not reached:
            break
    assert at > 2


# --- turns that overlap


def interleave(bench: Bench, questions: list[tuple[Part, ...]], length: int) -> list[list[int]]:
    """All questions at once, a token of each in turn."""
    turns: list[Turn] = []
    written: list[list[int]] = []
    for parts in questions:
        turns.append(bench.begin(*parts))
        written.append([int(bench.context.logits().argmax())])
    for _ in range(length):
        for turn, tokens in zip(turns, written, strict=True):
            bench.sequences.extend(turn, tokens[-1])
            tokens.append(int(bench.context.logits().argmax()))
        bench.check()
    for turn in turns:
        turn.end()
    return written


QUESTIONS: list[tuple[Part, ...]] = [
    (A, "What?"),
    ("Hello",),
    (B, A, "Which?"),
    (A, "Why?"),
    (C, "What colour?"),
    (LARGE, "What?"),
]


@SETTINGS
@pytest.mark.parametrize("count", [2, 4, 6])
def test_streams_that_overlap_give_what_they_give_one_after_the_other(
    model: TextModel, setting: dict[str, Any], count: int
) -> None:
    expected = [fresh(model, *parts, length=6, **setting)[1] for parts in QUESTIONS[:count]]
    bench = Bench(model, **setting)
    assert interleave(bench, QUESTIONS[:count], 6) == expected
    assert interleave(bench, QUESTIONS[:count], 6) == expected
    bench.context.close()


def test_streams_that_do_not_fit_together_take_the_cells_in_turn(model: TextModel) -> None:
    n_ctx = 64
    questions = QUESTIONS[:4]
    needed = sum(len(list(Bench(model).prompt(*parts).units())) for parts in questions)
    assert needed > n_ctx
    expected = [fresh(model, *parts, length=6, n_ctx=n_ctx)[1] for parts in questions]
    bench = Bench(model, n_ctx=n_ctx)
    assert interleave(bench, questions, 6) == expected
    bench.context.close()


def test_turns_given_together_that_do_not_fit_together_are_evaluated_in_several_calls(model: TextModel) -> None:
    questions = QUESTIONS[:4]
    expected = [fresh(model, *parts, length=1, **EXACT)[1] for parts in questions]
    roomy = Bench(model, **EXACT)
    for parts in questions:
        roomy.begin(*parts)
    taken = roomy.context.n_ctx - roomy.sequences.room
    for spare in range(5):
        bench = Bench(model, n_ctx=taken + spare, **EXACT)
        turns = [bench.begin(*parts) for parts in questions]
        drawn: dict[int, int] = {}
        for finished in bench.sequences.advance([(turn, one[0]) for turn, one in zip(turns, expected, strict=True)]):
            assert bench.sequences.room >= 0  # the native library rounds small contexts up, and would not say
            drawn |= {number: int(bench.context.logits(index).argmax()) for number, index in finished}
        assert [drawn[number] for number in range(4)] == [one[1] for one in expected]
        bench.check()
        bench.context.close()
    roomy.context.close()


def test_a_stream_whose_sequence_was_taken_tells_of_its_prompts_reuse_alone(model: TextModel) -> None:
    bench = Bench(model, count=1)
    first = bench.begin(A, "a")
    bench.sequences.extend(first, 5)
    bench.begin(B, "b")
    bench.sequences.extend(first, 6)
    bench.sequences.extend(first, 7)
    assert first.generated == [5, 6, 7]
    assert first.reused_cells == 0
    bench.context.close()


def test_a_turn_that_ended_or_was_forgotten_leaves_its_cells_to_others(model: TextModel) -> None:
    bench = Bench(model, n_ctx=700)
    for _ in range(3):
        turn = bench.begin(LARGE, "a")
        turn.end()
        other = bench.begin(B, LARGE, "b")
        other.end()
        del turn, other
        gc.collect()
    assert len(bench.begin(A, "c").prompt.runs) > 1
    bench.context.close()


# --- the ends of the context


@SETTINGS
def test_the_context_can_be_filled_to_one_cell_less_than_it_holds(model: TextModel, setting: dict[str, Any]) -> None:
    for n_ctx in (1, 2, 5, 255, 257):
        bench = Bench(model, n_ctx=n_ctx, **setting)
        sizes = [size for size in (n_ctx - 1, 1) if 0 < size < n_ctx]
        for size in sizes:
            turn = Turn(assemble(["a" * size], lambda text, *, special: [5] * len(text), bos=None, batch_size=512))
            bench.sequences.begin(turn)
            while turn.n_cells + 1 < n_ctx:
                bench.sequences.extend(turn, 5)
            assert turn.n_cells == n_ctx - 1
            assert np.isfinite(bench.context.logits()).all()
            turn.end()
        bench.context.close()


def test_a_prompt_that_leaves_no_cell_for_an_answer_is_refused_before_any_work(model: TextModel) -> None:
    bench = Bench(model, n_ctx=64)
    cells = bench.prompt(A, "a").n_tokens + 6
    bench.begin(A, "a").end()

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("native work was done")

    for method in ("decode_tokens", "decode_rows", "forget"):
        setattr(bench.context, method, fail)
    with pytest.raises(ContextError, match=f"has {cells - 6} tokens and 66 image rows, but the context holds 64"):
        bench.sequences.begin(Turn(bench.prompt(make_look(9, (6, 11)), "a")))
    bench.context.close()
