"""A sequence read out of one context and written into another gives the same logits, or nothing at all."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from look_maker import make_look
from lookonce.errors import ClosedError, InputError, NativeError
from lookonce.native.cache import State, holds, read_state, span, state_size, write_state
from lookonce.native.text import Context, ContextOptions, TextModel

EXACT: dict[str, Any] = {"kv_type": "f32", "flash_attention": False}
LOOK = make_look(8, (20, 20))
TOKENS = np.random.default_rng(0).integers(0, 400, 50).tolist()
FIRST_AFTER = len(TOKENS) + 20


@pytest.fixture(scope="module", params=["qwen3vl", "qwen2.5vl"])
def model(request: pytest.FixtureRequest) -> Iterator[TextModel]:
    pair = request.getfixturevalue("tiny_pair" if request.param == "qwen3vl" else "tiny_pair_25")
    with TextModel(pair[0]) as model:
        yield model


def make_context(model: TextModel, **options: Any) -> Context:
    return Context(model, ContextOptions(n_ctx=1024, threads=1, n_sequences=3, **{**EXACT, **options}))


def evaluate(context: Context, width: int) -> None:
    """A text and a picture."""
    context.decode_tokens(TOKENS, position=0, outputs="none")
    rows = np.zeros((LOOK.n_rows, width), dtype=np.float32)
    rows[:, : LOOK.width] = LOOK.rows[:, :width]
    context.decode_rows(rows, LOOK.positions + len(TOKENS))


def read(context: Context, sequence: int = 0) -> State:
    state = np.empty(state_size(context, sequence), dtype=np.uint8)
    read_state(context, sequence, state)
    return state


@pytest.mark.parametrize(
    "options", [{}, {"kv_type": "f16", "flash_attention": None}, {"kv_type": "q8_0", "flash_attention": True}], ids=str
)
@pytest.mark.parametrize("target", [0, 2])
def test_what_is_written_goes_on_as_what_was_read(model: TextModel, options: dict[str, Any], target: int) -> None:
    with make_context(model, **options) as one, make_context(model, **options) as other:
        evaluate(one, model.input_width)
        state = read(one)
        other.decode_tokens([1, 2, 3], position=0, sequence=target, outputs="none")
        write_state(other, target, state, last=len(TOKENS))
        assert span(other, target) == span(one, 0) == (0, len(TOKENS))
        for index in range(3):
            for context, sequence in ((one, 0), (other, target)):
                context.decode_tokens([5, 6], position=FIRST_AFTER + 2 * index, sequence=sequence)
            assert np.array_equal(one.logits(), other.logits())


def test_a_part_is_read_through_another_sequence_with_the_same_effect(model: TextModel) -> None:
    with make_context(model) as one, make_context(model) as other:
        evaluate(one, model.input_width)
        whole = read(one)
        one.decode_tokens([5, 6, 7], position=FIRST_AFTER)
        one.copy(0, 2, stop=FIRST_AFTER)
        assert span(one, 2) == (0, len(TOKENS))
        part = read(one, 2)
        assert len(part) == len(whole)
        write_state(other, 0, part, last=len(TOKENS))
        other.decode_tokens([5, 6, 7], position=FIRST_AFTER)
        assert np.array_equal(one.logits(), other.logits())


def test_a_state_of_another_making_is_refused_and_leaves_the_sequence_empty(model: TextModel) -> None:
    with make_context(model) as one, make_context(model, kv_type="f16") as other, make_context(model) as same:
        evaluate(one, model.input_width)
        state = read(one)
        for context, given, last in (
            (other, state, len(TOKENS)),
            (same, state[:-5], len(TOKENS)),
            (same, np.concatenate([state, state[:4]]), len(TOKENS)),
            (same, state, len(TOKENS) + 1),
        ):
            with pytest.raises(NativeError, match="was not taken up"):
                write_state(context, 0, given, last=last)
            assert span(context, 0) == (-1, -1)
        evaluate(same, model.input_width)
        assert np.array_equal(read(same), state)


def test_a_state_tells_the_positions_of_its_cells(model: TextModel) -> None:
    expected = np.concatenate([np.arange(len(TOKENS)), LOOK.positions[:, 0] + len(TOKENS)]).astype(np.int32)
    with make_context(model) as context:
        evaluate(context, model.input_width)
        state = read(context)
    assert holds(state, expected, mrope=True)
    assert holds(state, expected[::-1].copy(), mrope=True)
    assert not holds(state, expected, mrope=False)
    for positions in (expected[:-1], expected + 1, np.append(expected, 0), np.where(expected == 7, 8, expected)):
        assert not holds(state, positions.astype(np.int32), mrope=True)
    for word, value in ((2, 2), (3, 5), (4 + 6 * 9, 8), (5 + 6 * 9, 2), (5, 0)):
        altered = state[: len(state) // 4 * 4].copy()
        altered.view(np.int32)[word] = value
        assert not holds(altered, expected, mrope=True)
    for length in (0, 15, 16, 100, 16 + 24 * len(expected) - 1):
        assert not holds(state[:length], expected, mrope=True)


def test_wrong_room_wrong_sequences_and_a_closed_context_are_errors(model: TextModel) -> None:
    context = make_context(model)
    evaluate(context, model.input_width)
    state = read(context)
    with pytest.raises(InputError, match=r"the room for a state is"):
        read_state(context, 0, state[:-1])
    for number in (-1, 3):
        with pytest.raises(InputError, match="sequences go from"):
            state_size(context, number)
        with pytest.raises(InputError, match="sequences go from"):
            write_state(context, number, state, last=0)
    context.close()
    for use in (lambda: state_size(context, 0), lambda: read_state(context, 0, state), lambda: span(context, 0)):
        with pytest.raises(ClosedError):
            use()
