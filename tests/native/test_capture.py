"""Tensors copied out of running graphs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from look_maker import make_look, make_picture
from lookonce.errors import InputError
from lookonce.native.capture import Capture
from lookonce.native.text import Context, ContextOptions, TextModel
from lookonce.native.vision import VisionTower

Pair = tuple[Path, Path]
TOKENS = [5, 6, 7, 8, 9, 10, 11]


@pytest.fixture(scope="module")
def model(tiny_pair: Pair) -> Iterator[TextModel]:
    with TextModel(tiny_pair[0]) as model:
        yield model


def run(model: TextModel, capture: Capture | None, n_outputs: int = 7, n_ctx: int = 256) -> Context:
    options = ContextOptions(n_ctx=n_ctx, threads=1, n_outputs=n_outputs, kv_type="f32", flash_attention=False)
    context = Context(model, options, capture)
    context.decode_tokens(TOKENS, position=0, outputs="all" if n_outputs > 1 else "last")
    return context


def weights(path: Path, name: str) -> Any:
    return next(np.array(tensor.data) for tensor in GGUFReader(path).tensors if tensor.name == name)


def test_the_final_hidden_state_times_the_head_is_the_logits(model: TextModel) -> None:
    capture = Capture(["result_norm"])
    with run(model, capture) as context:
        (states,) = capture.values["result_norm"]
        logits = np.stack([context.logits(index) for index in range(len(TOKENS))])
    assert states.shape == (7, 256)
    assert states.dtype == np.float32
    expected = states @ weights(model.path, "output.weight").T
    assert np.abs(expected - logits).max() < 1e-4 * np.abs(logits).max()


def test_the_last_layers_output_normalised_is_the_final_hidden_state(model: TextModel) -> None:
    capture = Capture(["l_out-3", "result_norm"])
    run(model, capture).close()
    (last,), (final,) = capture.values["l_out-3"], capture.values["result_norm"]
    rms = np.sqrt((last.astype(np.float64) ** 2).mean(axis=1, keepdims=True) + 1e-6)
    expected = last / rms * weights(model.path, "output_norm.weight")
    assert np.abs(expected - final).max() < 1e-4 * np.abs(final).max()


def test_each_batch_adds_one_array_of_each_layer_and_clear_empties_them(model: TextModel) -> None:
    names = [f"l_out-{layer}" for layer in range(4)]
    capture = Capture(names)
    context = run(model, capture)
    context.decode_tokens([1, 2], position=7, outputs="none")
    assert sorted(capture.values) == names
    assert [array.shape for array in capture.values["l_out-0"]] == [(7, 256), (2, 256)]
    capture.clear()
    context.decode_tokens([1], position=9)
    assert [array.shape for array in capture.values["l_out-0"]] == [(1, 256)]
    context.close()


def test_deepstack_is_added_after_a_layers_output(model: TextModel) -> None:
    look = make_look(3)
    capture = Capture(["l_out-0", "deepstack_out-0"])
    with run(model, capture) as context:
        capture.clear()
        rows = look.rows.astype(np.float32)
        context.decode_rows(rows, look.positions + 7, outputs="last")
    (before,), (after,) = capture.values["l_out-0"], capture.values["deepstack_out-0"]
    assert np.allclose(after - before, rows[:, 256:512], atol=1e-5)


def test_a_capture_changes_no_logits(model: TextModel) -> None:
    with run(model, None) as plain, run(model, Capture(["l_out-1"])) as watched:
        assert np.array_equal(plain.logits(), watched.logits())


def test_nothing_is_computed_after_the_tensor_that_ends_the_graph(model: TextModel) -> None:
    capture, whole = Capture(["l_out-1", "l_out-2"], stop_after="l_out-1"), Capture(["l_out-1"])
    run(model, capture).close()
    run(model, whole).close()
    assert "l_out-2" not in capture.values
    assert np.array_equal(capture.values["l_out-1"][0], whole.values["l_out-1"][0])


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_what_goes_wrong_inside_the_callback_is_raised_after_the_call(
    model: TextModel, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    def fail(_: int) -> None:
        raise kind("inside")

    context = run(model, capture := Capture(["l_out-1"]))
    with monkeypatch.context() as patch:
        patch.setattr("lookonce.native.capture.read_tensor", fail)
        with pytest.raises(kind, match="inside"):
            context.decode_tokens([1], position=7)
    capture.clear()
    context.forget(0)
    context.decode_tokens(TOKENS, position=0, outputs="all")
    with run(model, None) as plain:
        assert np.array_equal(plain.logits(), context.logits())
    context.close()


def test_a_tensor_that_is_not_contiguous_f32_is_refused(model: TextModel) -> None:
    names: list[str] = []

    class Every(Capture):
        def _on_tensor(self, tensor: int, ask: bool, _user_data: Any) -> bool:
            from lookonce.native.library import tensor_name

            names.append(tensor_name(tensor))
            return False

    run(model, Every([])).close()
    refused = 0
    for name in {one for one in names if "view" in one or "permuted" in one or "transposed" in one}:
        try:
            run(model, Capture([name])).close()
        except InputError:
            refused += 1
    assert refused


def test_a_vision_towers_layers_are_seen(tiny_pair: Pair, model: TextModel) -> None:
    names = [f"layer_out-{layer}" for layer in range(4)]
    with VisionTower(tiny_pair[1], model, threads=1) as tower:
        seen = tower.encode(make_picture(1, 96, 64), names)
        again = tower.encode(make_picture(1, 96, 64))
    assert sorted(seen.tensors) == names
    assert all(seen.tensors[name].shape == (24, 128) for name in names)
    assert not again.tensors
    assert np.array_equal(seen.rows, again.rows)
