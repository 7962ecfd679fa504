"""Every stage of the pipeline as arrays, and as files; the references' values are in test_parity_golden."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import lookonce
from look_maker import make_look, make_picture
from lookonce.embedder import Embedder
from lookonce.errors import (
    ClosedError,
    ContextError,
    InputError,
    ModelFileError,
    NativeError,
    PictureError,
    PromptError,
)
from lookonce.model import Model
from lookonce.native.vision import VisionTower
from lookonce.prompt import Prompt, RowRun, TokenRun
from lookonce.stages import Stages, TokenSpan, _spans

Pair = tuple[Path, Path]
EXACT: dict[str, Any] = {"kv_type": "f32", "flash_attention": False, "threads": 1}
ONE, TWO = make_picture(0, 256, 256), make_picture(1, 320, 256)


@pytest.fixture(scope="module")
def model(tiny_pair: Pair) -> Iterator[Model]:
    with lookonce.load(tiny_pair[0], store=False, n_ctx=1024, **EXACT) as model:
        yield model


@pytest.fixture(scope="module")
def stages(model: Model) -> Stages:
    return lookonce.extract(model, [ONE, TWO], prompt="Compare them.", vision_layers=[0, 3])


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The height of each picture that the tower sees."""
    heights: list[int] = []
    real = VisionTower.encode

    def encode(tower: VisionTower, pixels: Any, *arguments: Any) -> Any:
        heights.append(len(pixels))
        return real(tower, pixels, *arguments)

    monkeypatch.setattr(VisionTower, "encode", encode)
    return heights


def test_every_tensor_has_its_shape(stages: Stages) -> None:
    assert stages.visual_token_lens == (64, 80)
    assert stages.vision_token_lens == (256, 320)
    assert stages.vision_tokens.shape == (576, 128)
    assert stages.projected_tokens.shape == (144, 256)
    assert stages.deepstack_features.shape == (2, 144, 256)
    assert stages.lm_last_hidden.shape[::2] == (1, 256)
    assert stages.lm_image_hidden.shape == (144, 256)
    assert stages.vision_pooled_mean.shape == (2, 128)
    assert stages.projected_pooled_mean.shape == (2, 256)
    assert stages.lm_pooled_mean.shape == (1, 256)
    arrays = [stages.vision_tokens, stages.projected_tokens, stages.deepstack_features, stages.lm_last_hidden]
    arrays += [stages.lm_image_hidden, stages.vision_pooled_mean, stages.projected_pooled_mean, stages.lm_pooled_mean]
    assert {array.dtype for array in arrays} == {np.dtype(np.float32)}


def test_a_family_without_deepstack_has_no_such_features(tiny_pair_25: Pair) -> None:
    with lookonce.load(tiny_pair_25[0], store=False, **EXACT) as model:
        stages = lookonce.extract(model, make_picture(0, 140, 112))
    assert stages.visual_token_lens == (20,)
    assert stages.deepstack_features.shape == (0, 20, 256)
    assert stages.vision_tokens.shape == (80, 128)


def test_the_projected_tokens_are_the_looks_rows(model: Model, stages: Stages) -> None:
    rows = np.concatenate([model.look(one, dtype="f32").rows for one in (ONE, TWO)])
    assert np.array_equal(stages.projected_tokens, rows[:, :256])
    assert np.array_equal(stages.deepstack_features[1], rows[:, 512:])


def test_the_means_are_each_pictures(stages: Stages) -> None:
    assert stages.vision_pooled_mean[0] == pytest.approx(stages.vision_tokens[:256].mean(axis=0), abs=1e-4)
    assert stages.vision_pooled_mean[1] == pytest.approx(stages.vision_tokens[256:].mean(axis=0), abs=1e-4)
    assert stages.projected_pooled_mean[1] == pytest.approx(stages.projected_tokens[64:].mean(axis=0), abs=1e-4)
    assert stages.lm_pooled_mean[0] == pytest.approx(stages.lm_last_hidden[0].mean(axis=0), abs=1e-4)


def test_the_layers_of_the_tower_are_those_asked_for(model: Model, stages: Stages) -> None:
    assert set(stages.vision_layers) == {0, 3}
    assert np.array_equal(stages.vision_layers[3], stages.vision_tokens)
    assert np.abs(stages.vision_layers[0] - stages.vision_tokens).max() > 0.1
    assert lookonce.extract(model, ONE).vision_layers == {}


def test_the_spans_cover_the_prompt_in_order(model: Model, stages: Stages) -> None:
    tokenize = model.engine.text.tokenize
    before, prompt = (
        len(tokenize("<|im_start|>user\n")),
        len(tokenize("Compare them.<|im_end|>\n<|im_start|>assistant\n")),
    )
    start = before + 1  # the picture's own first token
    second = start + 64 + 2
    assert stages.spans == (
        TokenSpan("system", 0, before),
        TokenSpan("text", before, start),
        TokenSpan("image", start, start + 64, 0),
        TokenSpan("text", start + 64, second),
        TokenSpan("image", second, second + 80, 1),
        TokenSpan("text", second + 80, second + 81 + prompt),
    )
    assert stages.spans[-1].stop == stages.lm_last_hidden.shape[1]


def test_a_system_message_of_the_template_counts_as_system(tiny_pair_25: Pair) -> None:
    with lookonce.load(tiny_pair_25[0], store=False, **EXACT) as model:
        spans = lookonce.extract(model, make_picture(0, 140, 112)).spans
        told = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        assert spans[0] == TokenSpan("system", 0, len(model.engine.text.tokenize(told)))


def test_a_picture_of_more_rows_than_a_batch_is_one_span(model: Model) -> None:
    (one, two) = (make_look(seed, (20, 30)) for seed in range(2))
    runs = (
        TokenRun((1, 2, 3)),
        *(RowRun(look, *part, 0, True) for look in (one, two) for part in ((0, 512), (512, 600))),
    )
    assert _spans(Prompt((*runs, TokenRun((4,)))), 2) == [
        TokenSpan("system", 0, 2),
        TokenSpan("text", 2, 3),
        TokenSpan("image", 3, 603, 0),
        TokenSpan("image", 603, 1203, 1),
        TokenSpan("text", 1203, 1204),
    ]
    cut = (RowRun(one, 0, 300, 0, True), TokenRun((5,)), RowRun(one, 300, 600, 30, True))
    assert _spans(Prompt(cut), 0) == [
        TokenSpan("image", 0, 300, 0),
        TokenSpan("text", 300, 301),
        TokenSpan("image", 301, 601, 0),
    ]


def test_a_middle_layer_of_the_text_model_can_be_asked_for(model: Model, stages: Stages) -> None:
    first = lookonce.extract(model, ONE, layer=0)
    assert first.layer == 0
    assert stages.layer == 3
    last = lookonce.extract(model, ONE, layer=3)
    assert last.layer == 3
    assert np.abs(first.lm_last_hidden - last.lm_last_hidden).max() > 0.1


def test_the_hidden_states_pooled_are_the_embedders_vector(model: Model) -> None:
    stages = lookonce.extract(model, ONE, prompt="a cat")
    options: Any = {"prompt": "plain", "normalize": False}
    begin, end = "<|im_start|>user\n", "a cat<|im_end|>\n<|im_start|>assistant\n"
    with Embedder(model, pooling="mean", **options) as embedder:
        look = model.look(ONE, dtype="f32")
        whole = model.engine.plain_prompt([begin, look, end])
        (states,) = embedder._runner.run([whole], [np.ones(whole.n_tokens + whole.n_rows, dtype=np.bool_)])
    assert stages.lm_last_hidden[0] == pytest.approx(states, abs=1e-4)


def test_the_tower_runs_though_the_store_holds_the_look(tiny_pair: Pair, tmp_path: Path, runs: list[int]) -> None:
    with lookonce.load(tiny_pair[0], store=tmp_path, **EXACT) as model:
        model.look(ONE, dtype="f32")
        assert len(lookonce.extract(model, ONE).vision_tokens) == 256
        assert runs == [256, 256]


def test_pixel_limits_hold(model: Model, runs: list[int]) -> None:
    stages = lookonce.extract(model, make_picture(0, 640, 640), min_pixels=1024, max_pixels=64 * 64)
    assert stages.visual_token_lens == (4,)
    assert runs == [64]


# --- bad input


def test_a_picture_that_does_not_fit_is_refused_before_the_tower_runs(tiny_pair: Pair, runs: list[int]) -> None:
    with lookonce.load(tiny_pair[0], n_ctx=128, store=False, **EXACT) as model:
        with pytest.raises(ContextError, match=r"\d+ tokens and 144 image rows, but the context holds 128"):
            lookonce.extract(model, [ONE, TWO])
        assert runs == []
        (prompt,) = [n for n in range(200) if fits_exactly(model, n)]
        assert prompt > 10


def fits_exactly(model: Model, count: int) -> bool:
    """Whether a prompt of `count` digits beside 64 rows fills the context to the last cell."""
    try:
        stages = lookonce.extract(model, ONE, prompt="1" * (count + 1))
    except ContextError:
        return False
    return stages.lm_last_hidden.shape[1] == model.n_ctx


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no picture": ({"pictures": []}, InputError, "there is no picture to extract from: give at least one"),
    "None": ({"pictures": None}, PictureError, "NoneType"),
    "a look": ({"pictures": make_look(0)}, PictureError, "ImageEmbedding"),
    "a file that is missing": ({"pictures": "missing.png"}, PictureError, "missing.png"),
    "an empty prompt": ({"prompt": " "}, PromptError, "the prompt is ' ': give a text"),
    "no prompt": ({"prompt": None}, PromptError, "the prompt is None"),
    "a picture's mark in the prompt": ({"prompt": "<|image_pad|>"}, PromptError, "only a picture may place"),
    "layer": ({"layer": 4}, InputError, "layer is 4: .* has layers 0 to 3"),
    "tower layer too high": ({"vision_layers": [4]}, InputError, "vision layer 4 does not exist: the tower has 0 to 3"),
    "tower layer below nought": ({"vision_layers": [-1]}, InputError, "vision layer -1"),
    "tower layer True": ({"vision_layers": [True]}, InputError, "vision layer True"),
    "one tower layer": ({"vision_layers": 3}, InputError, "vision_layers is 3: give a list"),
    "tower layers in words": ({"vision_layers": "12"}, InputError, "vision_layers is '12': give a list"),
    "limits": ({"min_pixels": 10, "max_pixels": 5}, InputError, "pixels"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_the_tower_runs(model: Model, runs: list[int], case: str) -> None:
    options, error, message = BAD[case]
    given: dict[str, Any] = {"pictures": ONE} | options
    with pytest.raises(error, match=message):
        lookonce.extract(model, given.pop("pictures"), **given)
    assert runs == []


def test_a_model_without_a_projector_is_refused(tiny_pair: Pair, tmp_path: Path) -> None:
    lonely = tmp_path / tiny_pair[0].name
    lonely.symlink_to(tiny_pair[0])
    with (
        lookonce.load(lonely, store=False, **EXACT) as model,
        pytest.raises(ModelFileError, match="no projector file fits"),
    ):
        lookonce.extract(model, ONE)


def test_a_closed_model_is_refused(tiny_pair: Pair) -> None:
    with lookonce.load(tiny_pair[0], store=False, **EXACT) as model:
        pass
    with pytest.raises(ClosedError, match="load the model again"):
        lookonce.extract(model, ONE)


def test_a_tower_without_the_tensors_is_told_so(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    real = VisionTower.encode
    monkeypatch.setattr(VisionTower, "encode", lambda tower, pixels, tensors=(): real(tower, pixels))
    with pytest.raises(NativeError, match="gives no vision tokens"):
        lookonce.extract(model, ONE)


# --- files


def test_every_stage_is_written_with_a_manifest(stages: Stages, tmp_path: Path) -> None:
    manifest = stages.save(tmp_path / "deep" / "folder")
    assert manifest == tmp_path / "deep" / "folder" / "manifest.json"
    told = json.loads(manifest.read_text(encoding="utf-8"))
    assert told["format_version"] == 1
    assert told["model"] == stages.model_name
    assert told["prompt"] == "Compare them."
    assert told["layer"] == 3
    assert told["pictures"] == ["ndarray", "ndarray"]
    assert told["visual_token_lens"] == [64, 80]
    assert told["token_spans"][2] == {
        "kind": "image",
        "start": stages.spans[2].start,
        "stop": stages.spans[2].stop,
        "image": 0,
    }
    assert told["token_spans"][0] == {"kind": "system", "start": 0, "stop": stages.spans[0].stop}
    names = {path.name for path in manifest.parent.iterdir()}
    assert names == {"manifest.json", *(tensor["file"] for tensor in told["tensors"].values())}
    assert set(told["tensors"]) == {
        *("vision_pooled_mean", "projected_pooled_mean", "lm_pooled_mean", "vision_tokens", "projected_tokens"),
        *("deepstack_features", "lm_last_hidden", "lm_image_hidden", "vision_layer_0", "vision_layer_3"),
    }
    for name, tensor in told["tensors"].items():
        array = np.load(manifest.parent / tensor["file"], allow_pickle=False)
        expected = stages.vision_layers[int(name[-1])] if "layer" in name else getattr(stages, name)
        assert np.array_equal(array, expected)
        assert (tensor["shape"], tensor["dtype"]) == (list(array.shape), "float32")


def test_without_tokens_only_the_means_are_written(stages: Stages, tmp_path: Path) -> None:
    told = json.loads(stages.save(tmp_path, tokens=False).read_text(encoding="utf-8"))
    assert set(told["tensors"]) == {"vision_pooled_mean", "projected_pooled_mean", "lm_pooled_mean"}
    assert len(list(tmp_path.iterdir())) == 4


def test_an_earlier_runs_tensors_do_not_stay_in_the_folder(stages: Stages, tmp_path: Path) -> None:
    stages.save(tmp_path)
    (tmp_path / "mine.npy").write_bytes(b"")
    stages.save(tmp_path, tokens=False)
    names = {"manifest.json", "vision_pooled_mean.npy", "projected_pooled_mean.npy", "lm_pooled_mean.npy", "mine.npy"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_pictures_are_named_by_their_path(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "Katze ü.png"
    Image.fromarray(ONE).save(path)
    stages = lookonce.extract(model, [path, str(path), path.read_bytes(), Image.open(path)])
    assert stages.pictures == (str(path), str(path), "bytes", "PngImageFile")
    assert "Katze ü.png" in stages.save(tmp_path / "out").read_text(encoding="utf-8")


def test_a_save_that_is_broken_off_leaves_no_manifest(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages.save(tmp_path)
    from lookonce import stages as module

    written: list[str] = []
    real = module.write_durably

    def full(path: Path, data: bytes) -> None:
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path.name)
        real(path, data)

    monkeypatch.setattr(module, "write_durably", full)
    with pytest.raises(InputError, match="cannot be written: No space left on device"):
        stages.save(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_a_folder_that_cannot_be_made_is_refused(stages: Stages, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be written"):
        stages.save(tmp_path / "file" / "folder")
