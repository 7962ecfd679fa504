"""One layer's hidden states out of a graph that stops there; the truth is a capture in a graph that does not."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from look_maker import make_look
from lookonce.errors import ClosedError, InputError, NativeError
from lookonce.native.capture import Capture
from lookonce.native.hidden import FINAL_STATE, HiddenContext, layer_tensor
from lookonce.native.text import Context, ContextOptions, TextModel

Pair = tuple[Path, Path]
LAYERS = 4
TOKENS = np.array([5, 6, 7, 8, 9, 10, 11], dtype=np.int32)
PLACES = np.arange(7, dtype=np.int32)
ALL, NONE = np.ones(7, dtype=np.bool_), np.zeros(7, dtype=np.bool_)
SOME = np.array([0, 1, 0, 0, 1, 0, 1], dtype=np.bool_)
ZERO = np.zeros(7, dtype=np.int32)


@pytest.fixture(scope="module")
def model(tiny_pair: Pair) -> Iterator[TextModel]:
    with TextModel(tiny_pair[0]) as model:
        yield model


def options(n_outputs: int = 64, n_sequences: int = 4) -> ContextOptions:
    return ContextOptions(
        n_ctx=256, threads=1, n_outputs=n_outputs, n_sequences=n_sequences, kv_type="f32", flash_attention=False
    )


@pytest.fixture(scope="module")
def truth(model: TextModel) -> list[NDArray[np.float32]]:
    """Every layer's states of the seven tokens, out of a whole graph."""
    names = [layer_tensor(model, layer)[1] for layer in range(LAYERS)]
    capture = Capture(names)
    with Context(model, options(), capture) as context:
        context.decode_tokens(TOKENS.tolist(), position=0, outputs="all")
    return [capture.values[name][0] for name in names]


def test_layers_are_counted_from_both_ends(model: TextModel) -> None:
    assert [layer_tensor(model, layer) for layer in (0, 2, 3, -1, -2, -4)] == [
        *[(0, "l_out-0"), (2, "l_out-2"), (3, FINAL_STATE)],
        *[(3, FINAL_STATE), (2, "l_out-2"), (0, "l_out-0")],
    ]


@pytest.mark.parametrize("layer", [4, -5, True, 1.0, "1", None])
def test_a_layer_that_the_model_lacks_is_refused_with_those_it_has(model: TextModel, layer: object) -> None:
    with pytest.raises(InputError, match=r"has layers 0 to 3, or -1 to -4"):
        layer_tensor(model, layer)  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("wanted", [ALL, SOME, NONE], ids=["all", "some", "none"])
def test_the_wanted_states_are_those_of_a_whole_graph(
    model: TextModel, truth: list[NDArray[np.float32]], layer: int, wanted: NDArray[np.bool_]
) -> None:
    context = HiddenContext(model, options(), layer)
    states = context.evaluate_tokens(TOKENS, PLACES, ZERO, wanted)
    context.close()
    assert states.shape == (np.count_nonzero(wanted), 256)
    assert states == pytest.approx(truth[layer][wanted], abs=1e-5)


@pytest.mark.parametrize("layer", [1, LAYERS - 1])
def test_a_second_batch_goes_on_where_the_first_ended(
    model: TextModel, truth: list[NDArray[np.float32]], layer: int
) -> None:
    context = HiddenContext(model, options(), layer)
    context.evaluate_tokens(TOKENS[:3], PLACES[:3], ZERO[:3], NONE[:3])
    states = context.evaluate_tokens(TOKENS[3:], PLACES[3:], ZERO[3:], ALL[3:])
    context.close()
    assert states == pytest.approx(truth[layer][3:], abs=1e-4)


@pytest.mark.parametrize("layer", [1, LAYERS - 1])
def test_sequences_that_share_a_beginning_do_not_see_each_other(
    model: TextModel, truth: list[NDArray[np.float32]], layer: int
) -> None:
    context = HiddenContext(model, options(), layer)
    context.evaluate_tokens(TOKENS[:3], PLACES[:3], ZERO[:3], NONE[:3])
    for target in (1, 2):
        context.copy(0, target)
    tail, other = TOKENS[3:], TOKENS[::-1][:4]
    both, places = np.concatenate([tail, other]), np.tile(PLACES[3:], 2)
    numbers = np.repeat(np.array([1, 2], dtype=np.int32), 4)
    states = context.evaluate_tokens(both, places, numbers, np.ones(8, dtype=np.bool_))
    assert states[:4] == pytest.approx(truth[layer][3:], abs=1e-4)
    assert np.abs(states[4:] - states[:4]).max() > 0.1
    context.forget(1)
    context.copy(0, 1)
    again = context.evaluate_tokens(tail, PLACES[3:], ZERO[3:] + 1, ALL[3:])
    context.close()
    assert again == pytest.approx(truth[layer][3:], abs=1e-4)


def test_the_states_of_image_rows_are_those_of_a_whole_graph(model: TextModel) -> None:
    look = make_look(3)
    rows, wanted = look.rows.astype(np.float32), np.array([1, 0, 1, 1, 0, 1], dtype=np.bool_)
    for layer in range(LAYERS):
        name = layer_tensor(model, layer)[1]
        capture = Capture([name])
        with Context(model, options(), capture) as whole:
            whole.decode_rows(rows, look.positions, outputs="all")
        context = HiddenContext(model, options(), layer)
        states = context.evaluate_rows(rows, look.positions, 0, wanted, causal=True)
        context.close()
        assert states == pytest.approx(capture.values[name][0][wanted], abs=1e-5)


def test_the_graph_stops_before_the_head(model: TextModel) -> None:
    seen: list[str] = []

    class Watched(Capture):
        def _on_tensor(self, tensor: int, ask: bool, user_data: object) -> bool:
            from lookonce.native.library import tensor_name

            seen.append(tensor_name(tensor))
            return super()._on_tensor(tensor, ask, user_data)  # type: ignore[arg-type]

    capture = Watched({"l_out-1"}, stop_after="l_out-1")
    with Context(model, options(), capture) as context:
        context.decode_tokens(TOKENS.tolist(), position=0)
    assert seen[-1] == "l_out-1"
    assert not {"l_out-2", FINAL_STATE, "result_output"} & set(seen)


def test_an_architecture_without_the_tensor_is_told_so(model: TextModel) -> None:
    context = HiddenContext(model, options(), 1)
    context._tensor = "another"
    with pytest.raises(NativeError, match="gives no hidden states"):
        context.evaluate_tokens(TOKENS, PLACES, ZERO, ALL)
    context.close()


def test_a_closed_context_says_so_and_may_be_closed_twice(model: TextModel) -> None:
    context = HiddenContext(model, options(), 1)
    context.close()
    context.close()
    with pytest.raises(ClosedError):
        context.evaluate_tokens(TOKENS, PLACES, ZERO, ALL)
