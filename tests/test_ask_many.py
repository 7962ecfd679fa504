"""Many questions at once get the replies that they get one after the other."""

import gc
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lookonce
from look_maker import make_look, make_picture
from lookonce import ask_many
from lookonce.errors import ClosedError, ContextError, NativeError, PictureError, PromptError
from lookonce.model import Model
from lookonce.native.text import Context
from lookonce.sequences import Sequences
from lookonce.store import Store
from lookonce.turn import Turn
from native_break import break_off

Pair = tuple[Path, Path]
EXACT: dict[str, Any] = {"kv_type": "f32", "flash_attention": False}
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 10}
A, B = (make_look(seed, (4, 5)) for seed in range(2))
LARGE = make_look(7, (24, 25))  # more rows than a batch


def questions(count: int) -> list[str]:
    return [f"What is it, number {number}? " + "please " * (number % 7) for number in range(count)]


@pytest.fixture(scope="module")
def model(tiny_pair: Pair) -> Iterator[Model]:
    with lookonce.load(tiny_pair[0], store=False, threads=1, n_ctx=2048, **EXACT) as model:
        yield model


@pytest.fixture
def small(tiny_pair: Pair) -> Iterator[Model]:
    """A context that holds a few answers at a time."""
    with lookonce.load(tiny_pair[0], store=False, threads=1, n_ctx=160, **EXACT) as model:
        yield model


def one_by_one(model: Model, prompts: list[str], *arguments: Any, **options: Any) -> list[str]:
    return [model.ask(prompt, *arguments, **options).text for prompt in prompts]


CASES: dict[str, list[Any]] = {
    "no picture": [],
    "a picture": [A],
    "two pictures": [A, B],
    "a picture of more rows than a batch": [LARGE],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [1, 5, 40])
def test_the_replies_are_those_of_one_question_after_the_other(model: Model, case: str, count: int) -> None:
    prompts = questions(count)
    expected = [model.ask(prompt, CASES[case], system="Be brief.", **GREEDY) for prompt in prompts]
    found = model.ask_many(prompts, CASES[case], system="Be brief.", **GREEDY)
    assert [reply.text for reply in found] == [reply.text for reply in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.finish_reason == other.finish_reason
        assert one.images == other.images
        for name in ("text_tokens", "image_rows", "generated"):
            assert getattr(one.usage, name) == getattr(other.usage, name)
    assert model.ask(prompts[0], CASES[case], system="Be brief.", **GREEDY).text == expected[0].text


def test_both_families_answer_many_questions(tiny_pair_25: Pair) -> None:
    with lookonce.load(tiny_pair_25[0], store=False, threads=1, n_ctx=1024, **EXACT) as model:
        look = model.look(make_picture(1, 100, 70))
        prompts = questions(9)
        assert [one.text for one in model.ask_many(prompts, [look], **GREEDY)] == one_by_one(
            model, prompts, [look], **GREEDY
        )


def test_aliases_stand_where_each_question_puts_them(model: Model) -> None:
    prompts = ["What is <image_1>?", "Compare <image_2> with <image_1>.", "Why?", "Is <image_2> one?"]
    assert [one.text for one in model.ask_many(prompts, [A, B], **GREEDY)] == one_by_one(
        model, prompts, [A, B], **GREEDY
    )


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 7, "temperature": 1.5, "max_tokens": 8},
        {"json_schema": {"enum": ["yes", "no", "perhaps"]}, "temperature": 0},
        {"stop": ["e", "o"], "temperature": 0, "max_tokens": 30},
        {"repeat_penalty": 1.8, "temperature": 0, "max_tokens": 12},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_option_means_what_it_means_to_ask(model: Model, options: dict[str, Any]) -> None:
    prompts = questions(12)
    assert [one.text for one in model.ask_many(prompts, [A], **options)] == one_by_one(model, prompts, [A], **options)


def test_the_pictures_are_evaluated_once_and_the_rest_in_few_calls(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    rows: list[int] = []
    together, of_rows = Context.decode_many, Context.decode_rows

    def many(self: Context, tokens: Any, *arguments: Any, **options: Any) -> None:
        calls.append(len(tokens))
        together(self, tokens, *arguments, **options)

    def some_rows(self: Context, given: Any, *arguments: Any, **options: Any) -> None:
        rows.append(len(given))
        of_rows(self, given, *arguments, **options)

    monkeypatch.setattr(Context, "decode_many", many)
    monkeypatch.setattr(Context, "decode_rows", some_rows)
    look = make_look(99, (6, 6))
    replies = model.ask_many(questions(8), [look], **GREEDY)
    assert rows == [36]
    # The first question alone, the others' with its next token, a token of each, and the last seven.
    assert len(calls) == 11
    assert calls[2:] == [8] * 8 + [7]
    assert [reply.usage.reused for reply in replies[1:]] == [36 + 5] * 7
    assert {reply.usage.prefix for reply in replies[1:]} == {"memory"}


def test_a_finished_answer_makes_room_at_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask_many, "OVERLAPPING_TURNS", 3)
    under_way: list[int] = []
    real = Sequences.advance

    def advance(self: Sequences, moves: Any) -> Any:
        under_way.append(len(moves))
        return real(self, moves)

    monkeypatch.setattr(Sequences, "advance", advance)
    prompts = questions(10)
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 40, "stop": ["co", "gr", "x"]}
    replies = model.ask_many(prompts, [A], **options)
    found = [one.text for one in replies]
    assert len({one.usage.generated for one in replies}) > 3
    assert under_way[0] == 1
    assert under_way[1] == 3
    assert under_way[1:] == sorted(under_way[1:], reverse=True), "a sequence was idle while questions waited"
    assert found == one_by_one(model, prompts, [A], **options)


def test_what_does_not_fit_together_waits_for_its_turn(small: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = questions(9)
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 70}
    expected = one_by_one(small, prompts, [A], **options)
    put_off: list[Turn] = []
    real = Sequences.release

    def release(self: Sequences, turn: Turn) -> None:
        put_off.append(turn)
        real(self, turn)

    monkeypatch.setattr(Sequences, "release", release)
    monkeypatch.setattr(ask_many, "_HEADROOM", 8)  # so little that answers are let in and have to wait again
    assert [one.text for one in small.ask_many(prompts, [A], **options)] == expected
    assert len(put_off) > 2
    assert small.ask(prompts[0], [A], **options).text == expected[0]


def test_answers_may_fill_the_context_to_its_end(small: Model) -> None:
    replies = small.ask_many(["a?", "b?", "c?"], temperature=0, max_tokens=None, grammar='root ::= "a" root')
    for reply in replies:
        assert reply.finish_reason == "length"
        assert reply.usage.text_tokens + reply.usage.generated == 160


# --- streams


def test_the_pieces_come_mixed_and_join_to_the_replies(model: Model) -> None:
    prompts = questions(6)
    expected = one_by_one(model, prompts, [A], **GREEDY)
    streams = model.ask_many(prompts, [A], stream=True, **GREEDY)
    texts = [""] * len(prompts)
    order = []
    for number, piece in streams:
        assert piece
        texts[number] += piece
        order.append(number)
    assert texts == expected == [reply.text for reply in streams.replies]
    assert order != sorted(order)
    assert list(streams) == []


def test_a_closed_stream_has_the_replies_so_far_and_leaves_the_model_usable(model: Model) -> None:
    prompts = questions(40)
    expected = one_by_one(model, prompts[:3], [A], **GREEDY)
    with model.ask_many(prompts, [A], stream=True, **GREEDY) as streams:
        for number, _ in streams:
            if number == 3:
                break
    streams.close()
    assert list(streams) == []
    replies = streams.replies
    assert len(replies) == 40
    assert {reply.finish_reason for reply in replies} == {"closed"}
    assert replies[0].text
    assert expected[0].startswith(replies[0].text)
    assert replies[39].text == ""
    assert one_by_one(model, prompts[:3], [A], **GREEDY) == expected


def test_forgotten_streams_leave_their_sequences_to_others(model: Model) -> None:
    expected = model.ask("What?", [A], **GREEDY).text
    for _ in range(3):
        streams = model.ask_many(questions(20), [B], stream=True, **GREEDY)
        for _ in range(30):
            next(streams)
        del streams
    gc.collect()
    sequences = model.engine._sequences
    assert sequences is not None
    assert sequences.n_free == 32
    assert model.ask("What?", [A], **GREEDY).text == expected


@pytest.mark.parametrize("error", [KeyboardInterrupt, NativeError])
@pytest.mark.parametrize("at", [1, 2, 3, 6])
def test_a_step_broken_off_leaves_the_model_usable(
    model: Model, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], at: int
) -> None:
    prompts = questions(5)
    expected = one_by_one(model, prompts, [A], **GREEDY)
    with monkeypatch.context() as patch:
        break_off(patch, error, at=at)
        with pytest.raises(error, match="broken off"):
            model.ask_many(prompts, [B], **GREEDY)
    assert [one.text for one in model.ask_many(prompts, [A], **GREEDY)] == expected
    assert one_by_one(model, prompts, [A], **GREEDY) == expected


def test_another_thread_closing_the_stream_or_the_model_ends_it(tiny_pair: Pair) -> None:
    for close_model in (False, True):
        model = lookonce.load(tiny_pair[0], store=False, threads=1, n_ctx=1024)
        streams = model.ask_many(questions(20), [A], stream=True, temperature=0, max_tokens=None)
        next(streams)
        closer = threading.Timer(0.2, model.close if close_model else streams.close)
        closer.start()
        try:
            for _ in streams:
                pass
        except ClosedError:
            assert close_model
        closer.join()
        model.close()


def test_chats_of_other_threads_go_on_meanwhile(model: Model) -> None:
    prompts = questions(12)
    expected = one_by_one(model, prompts, [A], **GREEDY)
    said = model.chat([B])
    spoken = [said.ask("Why?", **GREEDY).text for _ in range(3)]
    found: list[list[str]] = []

    def talk() -> None:
        chat = model.chat([B])
        found.append([chat.ask("Why?", **GREEDY).text for _ in range(3)])

    threads = [threading.Thread(target=talk) for _ in range(3)]
    for thread in threads:
        thread.start()
    together = [reply.text for reply in model.ask_many(prompts, [A], **GREEDY)]
    for thread in threads:
        thread.join(60)
    assert together == expected
    assert found == [spoken] * 3


def test_a_stream_under_way_before_goes_on_after(model: Model) -> None:
    expected = model.ask("What?", [A], temperature=0, max_tokens=20).text
    with model.ask("What?", [A], stream=True, temperature=0, max_tokens=20) as stream:
        given = next(stream)
        model.ask_many(questions(40), [A], **GREEDY)
        assert given + "".join(stream) == expected


@pytest.mark.parametrize("state", ["off", "on"])
def test_a_stream_beside_that_fits_only_alone_takes_no_answer_away(tiny_pair: Pair, state: Any) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 40}
    with lookonce.load(tiny_pair[0], store=False, state=state, threads=1, n_ctx=256, **EXACT) as model:
        for n_words, n_beside in [(8, 40), (15, 20)]:
            prompts = [f"{number} " + "word " * n_words for number in range(6)]
            beside = "other " * n_beside
            expected = one_by_one(model, [*prompts, beside], **options)
            with (
                model.ask_many(prompts, stream=True, **options) as streams,
                model.ask(beside, stream=True, **options) as stream,
            ):
                pieces = []
                for _ in range(8):
                    next(streams)
                for _ in streams:
                    pieces.append(next(stream, ""))
                pieces.extend(stream)
                assert [*(reply.text for reply in streams.replies), "".join(pieces)] == expected


# --- what is refused, and what is kept


def test_what_cannot_be_asked_is_refused_by_its_text_and_place_before_any_work(model: Model) -> None:
    begin = re.escape(f"prompts[1] ('{'word ' * 8}...') cannot be asked: the prompt has ")
    with pytest.raises(ContextError, match=rf"^{begin}\d+ tokens and 20 image rows, but the context") as caught:
        model.ask_many(["a", "word " * 3000, "b"], [A], **GREEDY)
    assert caught.value.item == 1
    with pytest.raises(
        PromptError, match=r"^prompts\[2\] \('<image_2>\?'\) cannot be asked: the prompt names <image_2>"
    ):
        model.ask_many(["a", "b", "<image_2>?"], [A], **GREEDY)
    with pytest.raises(PromptError, match=r"^prompts\[1\] cannot be asked: the prompt is a int"):
        model.ask_many(["a", 5], **GREEDY)  # type: ignore[list-item]
    with pytest.raises(PromptError, match="prompts is a str: give a list of questions"):
        model.ask_many("What?", **GREEDY)
    with pytest.raises(PromptError, match="images is one ImageEmbedding"):
        model.ask_many(["What?"], A, **GREEDY)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="grammar"):
        model.ask_many(["What?"], grammar="root ::= (", stream=True)
    with pytest.raises(PictureError):
        model.ask_many(["What?"], [b"no picture"])
    with pytest.raises(PromptError, match="system is a int"):
        model.ask_many(["What?"], system=5)  # type: ignore[call-overload]
    assert model.ask_many([], [A]) == []


def test_the_common_beginning_is_kept_in_the_store_and_found_there(tiny_pair: Pair, tmp_path: Path) -> None:
    for path in tiny_pair:
        os.utime(shutil.copy(path, tmp_path), (1e9, 1e9))
    texts = []
    with Store(tmp_path / "store") as store:
        for origin in ("evaluated", "store"):
            with lookonce.load(tmp_path, store=store, threads=1, n_ctx=1024) as model:
                replies = model.ask_many(questions(5), [A], **GREEDY)
            assert [reply.usage.prefix for reply in replies] == [origin, *["memory"] * 4]
            texts.append([reply.text for reply in replies])
            assert store.stats().kinds["state"].entries == 1
    assert texts[0] == texts[1]
