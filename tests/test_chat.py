"""Turns in, replies out: whole, piece by piece, broken off, and by several at once."""

import gc
import json
import threading
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lookonce
from look_maker import make_look
from lookonce.chat import Chat, ReplyStream
from lookonce.embedding import ImageEmbedding
from lookonce.errors import ClosedError, ContextError, InputError, NativeError, PromptError
from lookonce.model import Model
from lookonce.prompt import Message
from lookonce.reply import Reply, StoppedText
from native_break import break_off

Pair = tuple[Path, Path]
A, B = (make_look(seed) for seed in range(2))
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
QUESTIONS = ["What is it?", "Which colour has it?", "Describe the picture.", "Why?"]


@pytest.fixture(scope="module")
def model(tiny_pair: Pair) -> Iterator[Model]:
    with lookonce.load(tiny_pair[0], store=False, threads=1, n_ctx=1024) as model:
        yield model


@pytest.fixture
def own(tiny_pair: Pair) -> Iterator[Model]:
    """A model that a test may close or damage."""
    with lookonce.load(tiny_pair[0], store=False, threads=1, n_ctx=256) as model:
        yield model


# --- whole replies


def test_a_reply_is_repeated_at_temperature_zero(model: Model) -> None:
    first = model.ask("What is it?", [A], **GREEDY)
    model.ask("Something else?", [B], **GREEDY)
    assert model.ask("What is it?", [A], **GREEDY).text == first.text
    assert str(first) == first.text != ""


def test_the_picture_changes_the_answer(model: Model) -> None:
    answers = {model.ask("What is it?", looks, **GREEDY).text for looks in ([A], [B], [A, B], [B, A], [])}
    assert len(answers) == 5


def test_a_seed_repeats_a_reply_and_others_differ(model: Model) -> None:
    hot = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "max_tokens": 12}
    texts = [model.ask("What?", seed=seed, **hot).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert len({model.ask("What?", **hot).text for _ in range(3)}) > 1


def test_a_repeat_penalty_changes_the_reply(model: Model) -> None:
    plain, weak = (model.ask("What?", repeat_penalty=penalty, **GREEDY).text for penalty in (1.0, 1.8))
    assert plain != weak


def test_max_tokens_bounds_the_reply(model: Model) -> None:
    for count in (1, 5):
        reply = model.ask("What?", temperature=0, max_tokens=count)
        assert (reply.usage.generated, reply.finish_reason) == (count, "length")


def test_usage_counts_what_the_model_was_given(model: Model) -> None:
    text, tokenize = model.engine.text, model.engine.text.tokenize
    reply = model.ask("What is <image_1>?", [A], system="Be brief.", **GREEDY)
    written = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is <|vision_start|>",
        "<|vision_end|>?<|im_end|>\n<|im_start|>assistant\n",
    )
    assert reply.usage.text_tokens == sum(len(tokenize(piece)) for piece in written)
    assert reply.usage.image_rows == A.n_rows == reply.images[0].rows
    assert reply.usage.generated == 12
    assert text.tokenize(reply.text) != []
    again = model.ask("What is <image_1>?", [A], system="Be brief.", **GREEDY)
    assert again.usage.reused == len(tokenize(written[0])) + A.n_rows
    assert (again.images[0].key, again.images[0].source) == (A.key, "encoded")


def test_timings_add_up(model: Model) -> None:
    timings = model.ask("What?", [A], **GREEDY).timings
    assert timings.look_s >= 0
    assert timings.prefill_s > 0
    assert timings.generation_s > 0
    assert timings.first_token_s == pytest.approx(timings.look_s + timings.prefill_s)


def test_a_schema_is_satisfied_by_the_reply(model: Model) -> None:
    schema = {"type": "object", "properties": {"count": {"enum": [1, 2, 3]}}, "required": ["count"]}
    reply = model.ask("How many?", [A], json_schema=schema, temperature=0, max_tokens=100)
    assert reply.finish_reason == "stop"
    assert json.loads(reply.text)["count"] in (1, 2, 3)


def test_a_grammar_is_followed_by_the_reply(model: Model) -> None:
    reply = model.ask("Is it?", grammar='root ::= "yes" | "no"', seed=1, temperature=3.0)
    assert reply.text in ("yes", "no")
    assert reply.finish_reason == "stop"


@pytest.mark.parametrize(
    "options", [{"grammar": "root ::= ("}, {"json_schema": "{"}, {"temperature": -1}, {"stop": ""}]
)
def test_a_bad_option_is_a_prompt_error_and_leaves_the_chat_as_it_was(model: Model, options: Any) -> None:
    chat = model.chat()
    with pytest.raises(PromptError):
        chat.ask("What?", **options)
    assert chat.messages == ()
    assert chat.ask("What?", **GREEDY).text == model.ask("What?", **GREEDY).text


# --- streams


def test_the_pieces_of_a_stream_join_to_the_reply(model: Model) -> None:
    whole = model.ask("What is it?", [A], **GREEDY)
    stream = model.ask("What is it?", [A], stream=True, **GREEDY)
    pieces = list(stream)
    assert "".join(pieces) == whole.text == stream.reply.text
    assert len(pieces) > 3
    assert all(pieces)
    assert stream.reply.finish_reason == whole.finish_reason == "length"
    assert list(stream) == []


@pytest.mark.parametrize("cut", [(2, 5), (0, 3), (3, 12)])
def test_a_stop_text_ends_the_reply_before_it_wherever_tokens_are_cut(model: Model, cut: tuple[int, int]) -> None:
    whole = model.ask("What is it?", [A], **GREEDY).text
    stop = whole[slice(*cut)]
    for options in ({"stop": stop}, {"stop": ["never this", stop]}):
        stream = model.ask("What is it?", [A], stream=True, **options, **GREEDY)
        given = ""
        for piece in stream:
            given += piece
            assert whole.startswith(given)
            assert stop not in given
        assert given == whole[: whole.index(stop)]
        assert stream.reply.finish_reason == "stop"


def test_a_stop_text_that_never_comes_changes_nothing(model: Model) -> None:
    whole = model.ask("What is it?", [A], **GREEDY)
    beginning = whole.text[-3:] + "never"
    reply = model.ask("What is it?", [A], stop=["never this", beginning], **GREEDY)
    assert (reply.text, reply.finish_reason) == (whole.text, "length")


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return [data[start:end] for start, end in pairwise(places)]


@given(st.text(max_size=30), st.lists(st.integers(0, 200), max_size=8))
def test_text_cut_anywhere_into_tokens_comes_out_whole(text: str, cuts: list[int]) -> None:
    stopped = StoppedText(())
    pieces = [stopped.add(data) for data in split(text.encode(errors="replace"), cuts)]
    joined = "".join(pieces) + stopped.rest()
    assert joined == stopped.given == text.encode(errors="replace").decode()
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(
    st.text("ab日", max_size=25),
    st.lists(st.text("ab日", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 200), max_size=8),
)
def test_no_cut_lets_a_part_of_a_stop_text_through(text: str, stops: list[str], cuts: list[int]) -> None:
    stopped = StoppedText(tuple(stops))
    given = ""
    for data in split(text.encode(), cuts):
        given += stopped.add(data)
        assert not any(stop in given for stop in stops)
        if stopped.stopped:
            break
    given += stopped.rest()
    assert stopped.stopped == any(stop in text for stop in stops)
    assert text.startswith(given)
    if stopped.stopped:
        assert any(text[len(given) :].startswith(stop) for stop in stops)
    else:
        assert given == text


def test_a_character_cut_off_at_the_end_is_a_replacement_character() -> None:
    stopped = StoppedText(())
    assert stopped.add("日".encode()[:2]) == ""
    assert stopped.rest() == "\ufffd"


# --- broken off


def take(stream: ReplyStream, count: int) -> str:
    return "".join(islice(stream, count))


def test_a_closed_stream_counts_as_far_as_it_came(model: Model) -> None:
    whole = model.ask("What is it?", [A], **GREEDY).text
    chat = model.chat(images=[A])
    with chat.ask("What is it?", stream=True, **GREEDY) as stream:
        given = take(stream, 3)
    stream.close()
    assert 0 < len(given) < len(whole)
    assert stream.reply.finish_reason == "closed"
    assert [message.parts[-1] for message in chat.messages] == ["What is it?", given]
    assert list(chat.images) == ["<image_1>"]
    assert list(stream) == []
    assert model.ask("What is it?", [A], **GREEDY).text == whole


def test_a_stream_that_never_began_does_not_count(model: Model) -> None:
    chat = model.chat(images=[A])
    chat.ask("What?", stream=True, **GREEDY).close()
    assert (chat.messages, dict(chat.images)) == ((), {})
    assert chat.ask("What?", **GREEDY).usage.image_rows == A.n_rows


def test_an_exception_in_the_loop_leaves_model_and_chat_usable(model: Model) -> None:
    whole = model.ask("What?", **GREEDY).text
    chat = model.chat()

    def loop() -> None:
        for _ in chat.ask("What?", stream=True, **GREEDY):
            raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="the caller's own"):
        loop()
    assert len(chat.messages) == 2
    assert whole.startswith(str(chat.messages[1].parts[0]))
    chat.ask("And?", **GREEDY)
    assert len(chat.messages) == 4
    assert model.ask("What?", **GREEDY).text == whole


def test_a_stream_left_by_break_is_closed_at_once(model: Model) -> None:
    chat = model.chat()
    for _ in chat.ask("What?", stream=True, **GREEDY):
        break
    assert len(chat.messages) == 2


def test_the_next_question_closes_a_stream_that_is_still_under_way(model: Model) -> None:
    chat = model.chat()
    stream = chat.ask("What?", stream=True, **GREEDY)
    given = take(stream, 2)
    chat.ask("And?", **GREEDY)
    assert [message.parts[0] for message in chat.messages][:3] == ["What?", given, "And?"]
    assert list(stream) == []
    stream.close()
    assert len(chat.messages) == 4


def test_forgotten_streams_leave_their_sequences_to_others(model: Model) -> None:
    whole = model.ask("What?", [A], **GREEDY).text
    for _ in range(10):
        stream = model.ask("What?", [B], stream=True, **GREEDY)
        next(stream)
        del stream
    sequences = model.engine._sequences
    assert sequences is not None
    assert model.ask("What?", [A], **GREEDY).text == whole
    assert all(slot.owner is None or slot.owner.ended for slot in sequences._slots)


@pytest.mark.parametrize("error", [KeyboardInterrupt, NativeError])
@pytest.mark.parametrize("at", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("stream", [False, True])
def test_a_question_broken_off_in_a_native_call_leaves_the_chat_as_it_was(
    model: Model, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], at: int, stream: bool
) -> None:
    chat = model.chat(images=[A])
    expected = model.ask("Why?", [B], **GREEDY).text
    with monkeypatch.context() as patch:
        break_off(patch, error, at=at)
        ask = (
            (lambda: list(chat.ask("What?", stream=True, **GREEDY))) if stream else lambda: chat.ask("What?", **GREEDY)
        )
        with pytest.raises(error, match="broken off"):
            ask()
    assert (chat.messages, dict(chat.images)) == ((), {})
    assert chat.ask("What?", **GREEDY).text == model.ask("What?", [A], **GREEDY).text
    assert model.ask("Why?", [B], **GREEDY).text == expected


def test_an_interrupt_between_two_tokens_of_a_whole_reply_leaves_the_chat_as_it_was(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = model.chat()
    real = ReplyStream.__next__
    taken = 0

    def interrupted(self: ReplyStream) -> str:
        nonlocal taken
        taken += 1
        if taken == 3:
            raise KeyboardInterrupt
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(ReplyStream, "__next__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            chat.ask("What?", **GREEDY)
    gc.collect()
    assert chat.messages == ()


# --- conversations


def test_several_turns_give_what_one_fresh_conversation_of_the_same_messages_gives(
    model: Model, tiny_pair: Pair
) -> None:
    chat = model.chat(images=[A], system="Be brief.")
    replies = [chat.ask("What is <image_1>?", **GREEDY)]
    replies.append(chat.ask("And <image_2>?", [B], **GREEDY))
    replies.append(chat.ask("Compare <image_2> with <image_1>.", **GREEDY))
    assert replies[1].usage.reused > replies[0].usage.text_tokens
    assert replies[2].usage.image_rows == 4 * A.n_rows
    for turn, reply in enumerate(replies):
        with lookonce.load(tiny_pair[0], store=False, threads=1, n_ctx=1024) as other:
            fresh = other.chat()
            fresh._messages = list(chat.messages[: 2 * turn + 1])
            fresh._known = dict(chat.images)
            asked = chat.messages[2 * turn + 1]
            text = "".join(part if isinstance(part, str) else named(chat, part) for part in asked.parts)
            assert fresh.ask(text, **GREEDY).text == reply.text


def named(chat: Chat, look: object) -> str:
    return next(alias for alias, one in chat.images.items() if one is look)


def test_a_failed_question_leaves_the_chat_as_it_was(model: Model) -> None:
    chat = model.chat(images=[A])
    chat.ask("What?", **GREEDY)
    before, pictures = chat.messages, dict(chat.images)
    failing: list[tuple[Any, ...]] = [
        *[("<image_9>",), ("",), ("a", [b"no picture"]), ("a", [B.with_alias("<cat>")]), ("word " * 2000,)],
        *[("<|image_pad|>",), ("a", "cat.jpg"), ("a", A), ("a", None), ("a", 5), (5,)],
    ]
    for arguments in failing:
        with pytest.raises(InputError):
            chat.ask(*arguments)
        assert (chat.messages, dict(chat.images)) == (before, pictures)
    assert chat.ask("And?", **GREEDY).text


def test_a_reply_that_spells_the_pictures_mark_does_not_end_the_chat(model: Model) -> None:
    chat = model.chat(images=[A])
    mark = "<|image_pad|><|vision_start|>"
    reply = chat.ask("What?", grammar=f'root ::= "{mark}"', temperature=0)
    assert reply.text == mark
    following = chat.ask("And?", **GREEDY)
    assert following.usage.image_rows == A.n_rows
    assert chat.messages[1].parts == (mark,)


def test_a_system_prompt_with_the_pictures_mark_is_refused_when_the_chat_begins(model: Model) -> None:
    with pytest.raises(PromptError, match=r"the system's text holds '<\|image_pad\|>'"):
        model.chat(system="a <|image_pad|>")
    with pytest.raises(PromptError, match="system is a int"):
        model.chat(system=5)  # type: ignore[arg-type]


def test_a_context_filled_to_its_end_finishes_with_length(own: Model) -> None:
    for _ in range(2):
        reply = own.ask("What?", temperature=0, max_tokens=None, grammar='root ::= "a" root')
        assert reply.finish_reason == "length"
        assert reply.usage.text_tokens + reply.usage.generated == 256
        assert set(reply.text) == {"a"}


def test_a_prompt_may_leave_one_cell_and_not_none(own: Model) -> None:
    def count(text: str) -> int:
        return own.engine.prompt([Message("user", (text,))]).n_tokens

    words = next(text for length in range(300) if count(text := "z" * length) == 255)
    reply = own.ask(words, temperature=0)
    assert reply.usage.text_tokens == 255
    assert (reply.usage.generated, reply.finish_reason) == (1, "length")
    with pytest.raises(ContextError, match="the prompt has 256 tokens and 0 image rows, but the context holds 256"):
        own.ask(words + "?", temperature=0)


def test_a_chat_grows_until_the_context_refuses_and_stays_usable(own: Model) -> None:
    chat = own.chat()
    with pytest.raises(ContextError):
        [chat.ask("What is it?", **GREEDY) for _ in range(50)]
    turns = len(chat.messages)
    assert turns > 4
    with pytest.raises(ContextError):
        chat.ask("What is it?", **GREEDY)
    assert len(chat.messages) == turns
    assert own.ask("What is it?", **GREEDY).text == chat.messages[1].parts[0]


# --- several at once


@pytest.mark.parametrize("count", [2, 4, 6])
def test_interleaved_streams_give_the_texts_of_one_after_the_other(model: Model, count: int) -> None:
    asked: list[tuple[str, list[ImageEmbedding]]] = [
        (QUESTIONS[number % 4], [[A], [], [B, A], [B]][number % 4]) for number in range(count)
    ]
    expected = [model.ask(text, looks, **GREEDY).text for text, looks in asked]
    streams = [model.ask(text, looks, stream=True, **GREEDY) for text, looks in asked]
    texts = [""] * count
    for _ in range(20):
        for number, stream in enumerate(streams):
            texts[number] += next(stream, "")
    assert texts == expected


def test_threads_that_ask_at_once_get_what_they_get_one_after_the_other(model: Model) -> None:
    asked = [(question, look) for question in QUESTIONS for look in (A, B)]
    expected = {(text, look.key): model.ask(text, [look], **GREEDY).text for text, look in asked}
    found: dict[tuple[str, str], str] = {}
    failed: list[BaseException] = []

    def ask(part: list[tuple[str, ImageEmbedding]]) -> None:
        try:
            for text, look in part:
                found[text, look.key] = model.ask(text, [look], **GREEDY).text
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=ask, args=(asked[number::4],)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert found == expected


def test_a_model_closed_while_a_thread_streams_is_a_closed_error_there(tiny_pair: Pair) -> None:
    for _ in range(5):
        model = lookonce.load(tiny_pair[0], store=False, threads=1, n_ctx=512)
        begun = threading.Event()
        ends: list[BaseException | Reply] = []

        def stream(model: Model = model, begun: threading.Event = begun, ends: list[Any] = ends) -> None:
            try:
                while True:
                    pieces = model.ask("What?", stream=True, temperature=0, max_tokens=200)
                    for _ in pieces:
                        begun.set()
            except BaseException as error:  # noqa: BLE001
                ends.append(error)

        threads = [threading.Thread(target=stream) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert begun.wait(30)
        model.close()
        for thread in threads:
            thread.join(30)
        assert [type(end) for end in ends] == [ClosedError] * 3


def test_a_closed_model_says_so_in_every_way_of_asking(own: Model) -> None:
    chat = own.chat(images=[A])
    stream = own.ask("What?", stream=True, **GREEDY)
    next(stream)
    own.close()
    for ask in (
        lambda: chat.ask("What?"),
        lambda: own.ask("What?"),
        lambda: own.ask("What?", [A]),
        lambda: next(stream),
    ):
        with pytest.raises(ClosedError, match="is closed: load"):
            ask()
    stream.close()
    assert chat.messages == ()


def test_rows_changed_by_hand_are_not_answered_from_the_kept_ones(model: Model) -> None:
    altered = make_look(0)
    object.__setattr__(altered, "rows", np.zeros_like(altered.rows))
    first = model.ask("What is it?", [A], **GREEDY).text
    assert model.ask("What is it?", [altered], **GREEDY).text != first
