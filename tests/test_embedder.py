"""Vectors of texts, pictures and both: alone, in batches, beside other work, and what is refused."""

import asyncio
import gc
import importlib.util
import io
import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from PIL import Image

import lookonce
from card_maker import write_card
from look_maker import make_look, make_picture
from lookonce.embed_input import read_rows
from lookonce.embed_run import EmbeddedBatch, embed_rows
from lookonce.embedder import Embedder
from lookonce.errors import ClosedError, ContextError, InputError, MismatchError, NativeError, PictureError, PromptError
from lookonce.model import Model
from lookonce.native import text
from lookonce.native.hidden import HiddenContext
from lookonce.native.vision import VisionTower
from lookonce.prompt import RowRun, TokenRun
from lookonce.states import StateRunner

Pair = tuple[Path, Path]
EXACT: dict[str, Any] = {"kv_type": "f32", "flash_attention": False, "threads": 1, "store": False}
WIDTH = 256
A, B = make_look(0), make_look(1)
TEXTS = ["a cat", "the red square", "What colour is the circle? " * 6, "日本", "a cat and a dog", "x" * 40]
ITEMS: list[Any] = [*TEXTS, {"image": A}, {"text": "a cat", "image": A}, {"text": "a cat", "images": [A, B]}]


@pytest.fixture(scope="module")
def model(tiny_pair: Pair) -> Iterator[Model]:
    with lookonce.load(tiny_pair[0], n_ctx=1024, **EXACT) as model:
        yield model


@pytest.fixture
def own(tiny_pair: Pair) -> Iterator[Model]:
    """A model that a test may close or damage."""
    with lookonce.load(tiny_pair[0], n_ctx=256, **EXACT) as model:
        yield model


@pytest.fixture(scope="module")
def embedder(model: Model) -> Embedder:
    return Embedder(model)


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


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens or rows each native call evaluates for vectors."""
    counts: list[int] = []

    def count(name: str) -> None:
        real = getattr(HiddenContext, name)

        def counting(context: HiddenContext, what: Any, *arguments: Any, **options: Any) -> Any:
            counts.append(len(what))
            return real(context, what, *arguments, **options)

        monkeypatch.setattr(HiddenContext, name, counting)

    count("evaluate_tokens")
    count("evaluate_rows")
    return counts


class Screen(io.StringIO):
    """A stderr that is a terminal."""

    def isatty(self) -> bool:
        return True


def cosine(one: Any, other: Any) -> float:
    one, other = one.astype(np.float64), other.astype(np.float64)
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


# --- what comes out


def test_a_vector_is_f32_of_the_models_width_and_length_one(embedder: Embedder) -> None:
    for vector in (
        embedder.embed_text("a cat"),
        embedder.embed_image(A),
        embedder.embed_multimodal("a cat", A),
        embedder.embed_multimodal("a cat", [A, B]),
    ):
        assert vector.shape == (WIDTH,)
        assert vector.dtype == np.float32
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
    assert embedder.dimension == embedder.get_embedding_dimension() == WIDTH


def test_the_picture_changes_the_vector(embedder: Embedder) -> None:
    vectors = [embedder.embed_text("a cat"), *(embedder.embed_multimodal("a cat", look) for look in (A, B))]
    vectors += [embedder.embed_image(look) for look in (A, B)]
    for place, vector in enumerate(vectors):
        for other in vectors[:place]:
            assert cosine(vector, other) < 0.999


def test_the_order_of_pictures_changes_the_vector(embedder: Embedder) -> None:
    assert cosine(embedder.embed_multimodal("Which?", [A, B]), embedder.embed_multimodal("Which?", [B, A])) < 0.9999


def test_every_form_of_a_picture_gives_one_vector(model: Model, tmp_path: Path) -> None:
    pixels = make_picture(0)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    look = model.look(pixels)
    look.save(tmp_path / "look.safetensors")
    forms: list[Any] = [pixels, Image.fromarray(pixels), path, str(path), path.read_bytes(), look]
    forms.append(tmp_path / "look.safetensors")
    with Embedder(model) as embedder:
        expected = embedder.embed_image(pixels)
        for form in forms:
            assert cosine(embedder.embed_image(form), expected) > 0.9999999


@pytest.mark.parametrize("pooling", ["mean", "last", "cls", "max"])
@pytest.mark.parametrize("layer", [0, -2, -1])
def test_a_batch_gives_what_its_items_give_alone_in_their_order(model: Model, pooling: Any, layer: int) -> None:
    with Embedder(model, pooling=pooling, layer=layer) as embedder:
        alone = [embedder.embed_batch([item])[0] for item in ITEMS]
        for batch_size in (1, 4, 256):
            together = embedder.embed_batch(ITEMS[::-1], batch_size=batch_size)[::-1]
            assert min(map(cosine, alone, together)) > 0.99999
            assert np.abs(np.stack(alone) - together).max() < 1e-5


def test_a_batch_agrees_with_the_calls_for_one(embedder: Embedder) -> None:
    expected = [embedder.embed_text("a cat"), embedder.embed_image(A), embedder.embed_multimodal("a cat", [A, B])]
    found = embedder.embed_batch(["a cat", {"image": A}, {"text": "a cat", "images": (A, B)}])
    assert min(map(cosine, found, expected)) > 0.999999


def test_progress_counts_the_items_that_are_done(embedder: Embedder) -> None:
    told: list[tuple[int, int]] = []
    embedder.embed_batch(ITEMS, batch_size=4, progress=lambda done, count: told.append((done, count)))
    assert told == [(4, 9), (8, 9), (9, 9)]
    told.clear()
    asyncio.run(embedder.aembed_batch(ITEMS, batch_size=4, progress=lambda done, count: told.append((done, count))))
    assert told == [(4, 9), (8, 9), (9, 9)]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_equal_items_of_a_call_are_evaluated_once_and_get_one_vector(
    model: Model, cells: list[int], pooling: Any
) -> None:
    told = {"text": "a cat", "instruction": "Find it"}
    different: list[Any] = ["a cat", "a dog", told, {"text": "a cat", "image": A}, {"text": "a dog", "image": A}]
    again: list[Any] = [{"text": "a cat"}, "a dog", {**told, "instruction": "Find it."}]
    again += [{"text": "a cat", "images": [make_look(0)]}, different[4]]
    with Embedder(model, pooling=pooling) as embedder:
        expected = embedder.embed_batch(different)
    n_cells = sum(cells)
    cells.clear()
    with Embedder(model, pooling=pooling) as embedder:
        found = embedder.embed_batch([*different, *again[::-1], *different])
    assert sum(cells) == n_cells
    assert np.array_equal(found[:5], found[9:4:-1])
    assert np.array_equal(found[:5], found[10:])
    assert min(map(cosine, found, expected)) > 0.999999
    assert len(np.unique(found, axis=0)) == 5


def test_equal_items_in_different_batches_of_a_call_are_evaluated_once_too(model: Model, cells: list[int]) -> None:
    told: list[tuple[int, int]] = []
    with Embedder(model) as embedder:
        embedder.embed_batch(["a cat", "a dog"])  # the beginning is held from now on
        cells.clear()
        alone = embedder.embed_text("a cat")
        n_cells = sum(cells)
        cells.clear()
        found = embedder.embed_batch(
            ["a cat"] * 5, batch_size=2, progress=lambda done, count: told.append((done, count))
        )
        assert sum(cells) == n_cells
        assert told == [(2, 5), (4, 5), (5, 5)]
        assert np.array_equal(found, [alone] * 5)
        cells.clear()
        assert np.array_equal(embedder.encode(["a cat"] * 3, batch_size=1), [alone] * 3)
        assert sum(cells) == n_cells


def test_looks_of_one_key_and_other_rows_are_not_equal_items(embedder: Embedder) -> None:
    forged = make_look(5)
    object.__setattr__(forged, "key", A.key)
    one, other, alone = *embedder.embed_batch([{"image": A}, {"image": forged}]), embedder.embed_image(forged)
    assert cosine(one, other) < 0.999
    assert cosine(other, alone) > 0.99999


def test_the_poolings_pool_the_chosen_tokens(model: Model) -> None:
    item: Any = {"text": "a cat", "image": A}
    with Embedder(model, pooling="max", normalize=False) as embedder:
        (prompt,) = embedder.prompts([item])
    rows = np.concatenate(
        [
            np.full(len(run.tokens) if isinstance(run, TokenRun) else run.stop - run.start, isinstance(run, RowRun))
            for run in prompt.runs
        ]
    )
    with lookonce_states(model, prompt) as states:
        for tokens, chosen in {"all": np.ones_like(rows), "text": ~rows, "image": rows}.items():
            kept = states[chosen]
            expected = {"mean": kept.mean(0), "last": kept[-1], "cls": kept[0], "max": kept.max(0)}
            for pooling, vector in expected.items():
                options: Any = {"pooling": pooling, "tokens": tokens, "normalize": False}
                with Embedder(model, **options) as embedder:
                    assert embedder.embed_batch([item])[0] == pytest.approx(vector, abs=1e-4)


class lookonce_states:  # noqa: N801  reads as the function that it stands for
    """Every state of a prompt's last layer."""

    def __init__(self, model: Model, prompt: Any) -> None:
        from lookonce.states import StateRunner

        self._runner = StateRunner(model.engine, -1)
        self._prompt = prompt

    def __enter__(self) -> Any:
        n_cells = self._prompt.n_tokens + self._prompt.n_rows
        return self._runner.run([self._prompt], [np.ones(n_cells, dtype=np.bool_)])[0]

    def __exit__(self, *_: Any) -> None:
        self._runner.close()


# --- the prompt


def written(model: Model, embedder: Embedder, item: Any) -> str:
    """The prompt as text, a picture's rows left out."""
    (prompt,) = embedder.prompts([item])
    tokens = [token for run in prompt.runs if isinstance(run, TokenRun) for token in run.tokens]
    return b"".join(model.engine.text.piece(token, special=True) for token in tokens).decode()


OFFICIAL = (
    "<|im_start|>system\nRepresent the user's input.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
FRAME = "<|vision_start|><|vision_end|>"


def test_the_prompt_is_that_of_qwen3_vl_embedding(model: Model, embedder: Embedder) -> None:
    assert written(model, embedder, "a cat") == OFFICIAL.format("a cat")
    assert written(model, embedder, {"image": A}) == OFFICIAL.format(FRAME)
    assert written(model, embedder, {"text": "a cat", "images": [A, B]}) == OFFICIAL.format(FRAME * 2 + "a cat")


@pytest.mark.parametrize(
    ("told", "stands"),
    [
        ("Find it", "Find it."),
        ("Find it!", "Find it!"),
        (" Find it ", "Find it."),
        ("寻找。", "寻找。"),
        ("C++", "C++."),
    ],
)
def test_an_instruction_ends_with_punctuation(model: Model, told: str, stands: str) -> None:
    embedder = Embedder(model, instruction=told)
    assert f"system\n{stands}<|im_end|>" in written(model, embedder, "a cat")


def test_an_instruction_of_the_call_or_the_item_goes_before_the_embedders(model: Model) -> None:
    embedder = Embedder(model, instruction="Generally")
    expected = Embedder(model, instruction="Particularly").embed_text("a cat")
    given: Any = {"text": "a cat", "instruction": "Particularly"}
    for vector in (
        embedder.embed_text("a cat", instruction="Particularly"),
        embedder.embed_batch([given])[0],
        embedder.encode("a cat", prompt="Particularly"),
        embedder.encode([given], prompt="Otherwise")[0],
    ):
        assert cosine(vector, expected) > 0.999999
    assert cosine(embedder.embed_text("a cat"), expected) < 0.9999
    assert cosine(embedder.embed_image(A, instruction="Particularly"), embedder.embed_image(A)) < 0.9999
    multimodal = embedder.embed_multimodal("a cat", A, instruction="Particularly")
    assert cosine(multimodal, embedder.embed_multimodal("a cat", A)) < 0.9999


def test_a_plain_prompt_is_the_input_alone_or_after_an_instruction(model: Model) -> None:
    assert written(model, Embedder(model, prompt="plain"), {"text": "a cat", "image": A}) == FRAME + "a cat"
    told = Embedder(model, prompt="plain", instruction="Find it")
    assert written(model, told, {"text": "a cat", "image": A}) == f"Find it\n{FRAME}a cat"


@pytest.mark.parametrize("prompt", ["chat", "plain"])
def test_the_marks_of_a_picture_may_not_stand_in_a_text(model: Model, prompt: Any) -> None:
    embedder = Embedder(model, prompt=prompt)
    for mark in ("<|image_pad|>", "<|vision_start|>"):
        with pytest.raises(PromptError, match="which only a picture may place"):
            embedder.embed_text(f"a {mark} cat")
    with pytest.raises(PromptError, match="which only a picture may place"):
        embedder.embed_text("a cat", instruction="Find <|image_pad|>")


# --- normalising, cutting, PCA


def test_a_vector_that_is_not_normalised_has_its_own_length(model: Model, embedder: Embedder) -> None:
    raw = Embedder(model, normalize=False).embed_text("a cat")
    assert abs(np.linalg.norm(raw) - 1) > 0.1
    assert raw / np.linalg.norm(raw) == pytest.approx(embedder.embed_text("a cat"), abs=1e-6)


def test_a_cut_vector_is_the_beginning_normalised_again(model: Model, embedder: Embedder) -> None:
    short = Embedder(model, dimension=32)
    assert short.dimension == short.get_embedding_dimension() == 32
    whole = embedder.embed_text("a cat")[:32]
    assert short.embed_text("a cat") == pytest.approx(whole / np.linalg.norm(whole), abs=1e-6)
    assert Embedder(model, dimension=1).embed_batch(TEXTS).shape == (6, 1)


def test_a_pca_is_applied_to_the_embedders_own_vectors_before_the_cut_and_can_be_saved(
    model: Model, tmp_path: Path
) -> None:
    own = Embedder(model).embed_batch(TEXTS)
    draw = np.random.default_rng(0)
    pca = SimpleNamespace(mean_=own.mean(axis=0), components_=draw.standard_normal((5, WIDTH)))
    projected = (own - pca.mean_) @ pca.components_.T
    expected = projected[:, :3] / np.linalg.norm(projected[:, :3], axis=1, keepdims=True)
    fitted = Embedder(model, pca=pca, dimension=3)
    assert Embedder(model, pca=pca).dimension == 5
    assert fitted.embed_batch(TEXTS) == pytest.approx(expected, abs=1e-4)
    fitted.save_pca(tmp_path / "pca.npz")
    loaded = Embedder(model, pca=tmp_path / "pca.npz", dimension=3)
    assert np.array_equal(loaded.embed_batch(TEXTS), fitted.embed_batch(TEXTS))


def test_a_pca_that_scikit_learn_fitted_is_taken(model: Model) -> None:
    decomposition = pytest.importorskip("sklearn.decomposition", reason="install it with: pip install 'lookonce[pca]'")
    raw = Embedder(model, normalize=False).embed_batch(TEXTS)
    fitted = decomposition.PCA(3).fit(raw)
    found = Embedder(model, pca=fitted, normalize=False).embed_batch(TEXTS)
    assert found == pytest.approx(fitted.transform(raw), abs=1e-3)


@pytest.mark.parametrize(
    ("mean", "components", "message"),
    [
        ("x", "y", "the PCA's mean or components are no numbers"),
        (np.zeros(WIDTH), np.zeros((0, WIDTH)), r"components of \(0, 256\), but the model's vectors have 256 values"),
        (np.zeros(WIDTH), np.zeros(WIDTH), r"components of \(256,\)"),
        (np.zeros(8), np.zeros((3, 8)), r"has a mean of shape \(8,\)"),
    ],
)
def test_a_pca_of_another_form_is_refused(model: Model, mean: Any, components: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Embedder(model, pca=SimpleNamespace(mean_=mean, components_=components))


# --- sentence-transformers' shape


def test_encode_gives_the_shapes_of_sentence_transformers(embedder: Embedder) -> None:
    assert embedder.encode("a cat").shape == (WIDTH,)
    assert embedder.encode(["a cat"]).shape == (1, WIDTH)
    assert embedder.encode(("a cat", "a dog")).shape == (2, WIDTH)
    assert embedder.encode([]).shape == (0, WIDTH)
    assert embedder.encode({"text": "a cat", "image": A}).shape == (WIDTH,)
    assert embedder.encode(TEXTS, batch_size=2) == pytest.approx(embedder.embed_batch(TEXTS), abs=1e-5)


def test_encode_cuts_before_it_normalises(model: Model) -> None:
    whole, cut = Embedder(model).encode(["a cat", "a dog"]), Embedder(model).encode(["a cat", "a dog"], truncate_dim=64)
    assert cut.shape == (2, 64)
    assert cut == pytest.approx(whole[:, :64] / np.linalg.norm(whole[:, :64], axis=1, keepdims=True), abs=1e-6)
    with pytest.raises(InputError, match="truncate_dim is 65: give a whole number from 1 to 64"):
        Embedder(model, dimension=64).encode("a cat", truncate_dim=65)


def test_encode_draws_a_bar_only_on_a_terminal(embedder: Embedder, capsys: pytest.CaptureFixture[str]) -> None:
    embedder.encode(TEXTS, show_progress_bar=True)
    assert capsys.readouterr() == ("", "")
    screen = Screen()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", screen)
        embedder.encode(TEXTS, show_progress_bar=True, batch_size=2)
    assert "Embedding" in screen.getvalue()
    assert f"{len(TEXTS)}/{len(TEXTS)}" in screen.getvalue()


def test_encode_normalises_as_it_is_told(model: Model) -> None:
    for normalized in (False, True):
        embedder = Embedder(model, normalize=normalized)
        lengths = [np.linalg.norm(embedder.encode("a cat", normalize_embeddings=told)) for told in (None, True, False)]
        assert lengths[1] == pytest.approx(1, abs=1e-6)
        assert lengths[2] > 2
        assert lengths[0] == pytest.approx(lengths[1 if normalized else 2], rel=1e-5)


def test_encode_takes_the_defaults_of_sentence_transformers_and_no_other_name(embedder: Embedder) -> None:
    given = {"prompt_name": None, "output_value": "sentence_embedding", "precision": "float32", "device": "cpu"}
    vector = embedder.encode("a cat", **given, convert_to_numpy=True, convert_to_tensor=False)  # type: ignore[call-overload]
    assert vector == pytest.approx(embedder.embed_text("a cat"), abs=1e-6)
    with pytest.raises(TypeError, match="chunks"):
        embedder.encode("a cat", chunks=3)  # type: ignore[call-overload]


def test_encode_gives_a_tensor_where_torch_is_installed(embedder: Embedder) -> None:
    if importlib.util.find_spec("torch") is None:
        with pytest.raises(InputError, match="needs torch, which is not installed"):
            embedder.encode("a cat", convert_to_tensor=True)
    else:
        tensor = embedder.encode("a cat", convert_to_tensor=True)
        assert type(tensor).__name__ == "Tensor"
        assert tensor.numpy() == pytest.approx(embedder.embed_text("a cat"), abs=1e-6)


# --- pictures and the tower


def test_the_same_picture_in_one_call_is_encoded_once(model: Model, runs: list[int], tmp_path: Path) -> None:
    one, other = make_picture(3, 256, 256), make_picture(4, 288, 256)
    path = tmp_path / "one.png"
    Image.fromarray(one).save(path)
    items: list[Any] = [{"image": one}, {"image": other}, {"text": "a", "images": [path, one]}, {"image": path}]
    with Embedder(model) as embedder:
        vectors = embedder.embed_batch(items * 2, batch_size=2)
    assert len(runs) == 2
    assert np.abs(vectors[:4] - vectors[4:]).max() < 1e-5
    assert cosine(vectors[0], vectors[3]) > 0.99999


def test_a_picture_that_the_store_holds_skips_the_tower(tiny_pair: Pair, runs: list[int], tmp_path: Path) -> None:
    picture = make_picture(5)
    options = EXACT | {"store": tmp_path}
    with lookonce.load(tiny_pair[0], **options) as first:
        expected = Embedder(first).embed_image(picture)
    with lookonce.load(tiny_pair[0], **options) as second:
        assert np.array_equal(Embedder(second).embed_image(picture), expected)
        assert not second.tower_loaded
    assert len(runs) == 1


def test_pixel_limits_hold_for_every_picture_of_the_embedder(model: Model, runs: list[int]) -> None:
    small = Embedder(model, min_pixels=1024, max_pixels=64 * 64)
    small.embed_image(make_picture(0, 32, 64))
    small.embed_batch([{"image": make_picture(0, 640, 640)}])
    assert runs == [64, 64]
    Embedder(model).embed_image(make_picture(0, 32, 64))
    assert runs[2] >= 256


def test_many_pictures_are_not_held_in_memory_together(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lookonce.embedder.ROWS_AT_ONCE", 12)
    told: list[int] = []
    looks = [make_look(seed) for seed in range(7)]
    items: list[Any] = ["a", *({"image": look} for look in looks)]
    with Embedder(model) as embedder:
        vectors = embedder.embed_batch(items, progress=lambda done, _: told.append(done))
        assert told == [3, 5, 7, 8]
        assert min(map(cosine, vectors[1:], [embedder.embed_image(look) for look in looks])) > 0.99999


def test_pictures_that_come_again_stand_side_by_side_whatever_their_texts(
    own: Model, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lookonce.embed_prompt.ROWS_AT_ONCE", 8)  # no two looks are held
    pictures = [make_picture(seed) for seed in range(3)]
    items: list[Any] = [{"text": "long " * n, "image": picture} for n in (1, 9) for picture in pictures]
    with Embedder(own) as embedder:
        vectors = embedder.embed_batch(items)
        assert len(runs) == 3
        alone = [embedder.embed_multimodal(item["text"], item["image"]) for item in items]
    assert min(map(cosine, vectors, alone)) > 0.99999


def test_pooling_of_all_tokens_holds_only_so_many_states(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lookonce.embedder._STATES_AT_ONCE", 100)
    held: list[int] = []
    real = StateRunner.run

    def counting(runner: StateRunner, prompts: Any, wanted: Any) -> Any:
        held.append(sum(int(flags.sum()) for flags in wanted))
        return real(runner, prompts, wanted)

    monkeypatch.setattr(StateRunner, "run", counting)
    found = Embedder(model, pooling="mean").embed_batch(TEXTS)
    assert len(held) > 1
    assert max(held) < 100 + 80  # the text that went beyond
    held.clear()
    Embedder(model).embed_batch(TEXTS)
    assert held == [len(TEXTS)]
    monkeypatch.undo()
    assert min(map(cosine, found, Embedder(model, pooling="mean").embed_batch(TEXTS))) > 0.99999


# --- texts that do not fit


def test_a_text_beyond_the_context_is_refused_with_the_counts(own: Model) -> None:
    with pytest.raises(ContextError, match=r"has \d+ tokens and 0 image rows, but the context holds 256: shorten"):
        Embedder(own).embed_text("the circle " * 300)


def test_truncate_cuts_a_text_to_the_context_and_says_so(own: Model, caplog: pytest.LogCaptureFixture) -> None:
    embedder = Embedder(own, truncate=True)
    long = "the red circle " * 300
    with caplog.at_level(logging.WARNING, logger="lookonce"):
        (prompt,) = embedder.prompts([long])
        vector = embedder.embed_text(long)
    assert 250 <= prompt.n_tokens <= 256
    assert written(own, embedder, long).endswith("<|im_end|>\n<|im_start|>assistant\n")
    count = len(own.engine.text.tokenize(long))
    assert f"was cut from {count} tokens to " in caplog.messages[0]
    kept = written(own, embedder, long).split("user\n")[1].split("<|im_end|>")[0]
    assert long.startswith(kept)
    assert cosine(vector, embedder.embed_text(kept)) > 0.99999
    caplog.clear()
    embedder.embed_batch(["a cat", long])
    assert f"the text that begins with {long[:40]!r} was cut from {count} tokens to " in caplog.messages[0]
    caplog.clear()
    embedder.embed_text("a cat")
    assert caplog.messages == []


def test_truncate_leaves_pictures_whole(own: Model) -> None:
    look = make_look(4, (10, 10))
    embedder = Embedder(own, truncate=True)
    (prompt,) = embedder.prompts([{"text": "the circle " * 300, "image": look}])
    assert prompt.n_rows == 100
    assert 250 <= prompt.n_tokens + prompt.n_rows <= 256


def test_truncate_never_cuts_a_character_in_two(own: Model) -> None:
    text = "\U0001f642日" * 200
    (prompt,) = (embedder := Embedder(own, truncate=True)).prompts([text])
    kept = written(own, embedder, text).split("user\n")[1].split("<|im_end|>")[0]
    assert text.startswith(kept)
    assert 248 <= prompt.n_tokens <= 256


def test_pictures_that_do_not_fit_are_refused_before_the_tower_runs(own: Model, runs: list[int]) -> None:
    pictures = [make_picture(seed, 320, 320) for seed in range(3)]
    for truncate in (False, True):
        with pytest.raises(ContextError, match=r"and 300 image rows, but the context holds 256.*smaller with max_pix"):
            Embedder(own, truncate=truncate).embed_multimodal("a cat", pictures)  # type: ignore[arg-type]
    with pytest.raises(ContextError, match=r"^item 1 cannot be embedded: "):
        Embedder(own).embed_batch(["a", {"images": pictures}])  # type: ignore[typeddict-item]
    assert runs == []


# --- bad input


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "pooling": ({"pooling": "median"}, "pooling is 'median': choose one of mean, last, cls, max"),
    "no pooling": ({"pooling": ""}, "pooling is ''"),
    "layer too high": ({"layer": 4}, "layer is 4: .* has layers 0 to 3, or -1 to -4"),
    "layer too low": ({"layer": -5}, "layer is -5"),
    "layer that is no number": ({"layer": "last"}, "layer is 'last'"),
    "tokens": ({"tokens": "words"}, "tokens is 'words': choose one of all, text, image"),
    "prompt": ({"prompt": "jinja"}, "prompt is 'jinja': choose one of chat, plain"),
    "dimension too large": ({"dimension": 257}, "dimension is 257: give a whole number from 1 to 256"),
    "no dimension": ({"dimension": 0}, "dimension is 0"),
    "half a dimension": ({"dimension": 1.5}, "dimension is 1.5"),
    "dimension True": ({"dimension": True}, "dimension is True"),
    "dimension in words": ({"dimension": "64"}, "dimension is '64'"),
    "empty instruction": ({"instruction": " "}, "instruction is empty"),
    "instruction of another type": ({"instruction": 3}, "instruction is an int"),
    "pooling that is an array": ({"pooling": np.zeros(2)}, "pooling is array"),
    "tokens that are an array": ({"tokens": np.zeros(2)}, "tokens is array"),
    "limits the wrong way round": ({"min_pixels": 10_000, "max_pixels": 5_000}, "min_pixels"),
    "a negative limit": ({"min_pixels": -1}, "min_pixels"),
    "pca": ({"pca": object()}, "give a fitted scikit-learn PCA"),
    "pca file": ({"pca": "missing.npz"}, "does not exist"),
    "normalize in words": ({"normalize": "no"}, "normalize is 'no': give True or False"),
    "truncate as a number": ({"truncate": 1}, "truncate is 1: give True or False"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_an_option_that_cannot_be_used_is_refused_at_once(model: Model, case: str) -> None:
    options, message = BAD_OPTIONS[case]
    with pytest.raises(InputError, match=message):
        Embedder(model, **options)


def test_a_dimension_larger_than_the_pcas_is_refused(model: Model) -> None:
    pca = SimpleNamespace(mean_=np.zeros(WIDTH), components_=np.eye(4, WIDTH))
    with pytest.raises(InputError, match="dimension is 5: give a whole number from 1 to 4"):
        Embedder(model, pca=pca, dimension=5)


BAD_CALLS: dict[str, tuple[Callable[[Embedder], Any], str]] = {
    "no text": (lambda e: e.embed_text(None), "text is a NoneType: give a text"),  # type: ignore[arg-type]
    "empty text": (lambda e: e.embed_text(""), "text is empty: write something"),
    "blank text": (lambda e: e.embed_text(" \n"), "text is empty"),
    "bytes for a text": (lambda e: e.embed_text(b"a"), "text is a bytes"),  # type: ignore[arg-type]
    "empty instruction": (lambda e: e.embed_text("a", instruction=" "), "instruction is empty"),
    "no picture": (lambda e: e.embed_image(None), "a picture is None"),  # type: ignore[arg-type]
    "a picture of another type": (lambda e: e.embed_image(3), "int"),  # type: ignore[arg-type]
    "a list for one picture": (lambda e: e.embed_image([A]), "list"),  # type: ignore[arg-type]
    "no pictures": (lambda e: e.embed_multimodal("a", []), "there is no picture: give at least one"),
    "None for pictures": (lambda e: e.embed_multimodal("a", None), "a picture is None"),  # type: ignore[arg-type]
    "None among pictures": (lambda e: e.embed_multimodal("a", [A, None]), "a picture is None"),  # type: ignore[list-item]
    "empty text beside a picture": (lambda e: e.embed_multimodal("", A), "text is empty"),
    "empty batch": (lambda e: e.embed_batch([]), "there is nothing to embed: give at least one item"),
    "no batch": (lambda e: e.embed_batch(None), "give a list"),  # type: ignore[arg-type]
    "one text for a batch": (lambda e: e.embed_batch("abc"), "give a list"),
    "one item for a batch": (lambda e: e.embed_batch({"text": "a"}), "give a list"),
    "an unknown key": (lambda e: e.embed_batch(["a", {"txt": "b"}]), "^item 1 cannot .* the key 'txt'"),  # type: ignore[list-item]
    "batch size nought": (lambda e: e.embed_batch(["a"], batch_size=0), "batch_size is 0"),
    "half a batch size": (lambda e: e.encode(["a"], batch_size=1.5), "batch_size is 1.5"),  # type: ignore[arg-type]
    "nothing to encode": (lambda e: e.encode(None), "give a list"),  # type: ignore[arg-type]
    "an empty prompt": (lambda e: e.encode("a", prompt=""), "instruction is empty"),
    "the name of a prompt": (lambda e: e.encode("a", prompt_name="query"), "prompt_name is 'query': .* give its text"),
    "values of tokens": (lambda e: e.encode("a", output_value="token_embeddings"), "output_value is 'token_emb"),
    "bytes for values": (lambda e: e.encode("a", precision="int8"), "precision is 'int8': leave it out"),
    "another device": (lambda e: e.encode("a", device="tpu"), "device is 'tpu', but the model is on cpu"),
    "neither arrays nor a tensor": (lambda e: e.encode("a", convert_to_numpy=False), "convert_to_numpy is False"),
    "a norm in words": (lambda e: e.encode("a", normalize_embeddings="no"), "normalize_embeddings is 'no'"),  # type: ignore[call-overload]
    "a PCA that is not there": (lambda e: e.save_pca("pca.npz"), "has no PCA to save: make it with pca="),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_call_is_refused(embedder: Embedder, case: str) -> None:
    call, message = BAD_CALLS[case]
    with pytest.raises(InputError, match=message):
        call(embedder)


def test_a_picture_that_cannot_be_opened_is_named_with_its_item(embedder: Embedder, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(PictureError, match=r"^item 1 cannot be embedded: .*broken.png"):
        embedder.embed_batch([{"image": A}, {"image": str(broken)}])
    with pytest.raises(MismatchError, match=r"^item 0 cannot be embedded: the look was made for"):
        embedder.embed_batch([{"image": make_look(0, width=512)}])


def test_an_error_names_the_item_whatever_equal_ones_stand_beside_it(own: Model, tmp_path: Path) -> None:
    broken = {"image": str(tmp_path / "none.png")}
    long = "the circle " * 300
    with Embedder(own) as embedder:
        for items, number in (
            (["a cat", "a cat", None, None], 2),
            (["a cat", "a cat", {"text": "a cat", "image": A}, {"text": "a cat", "image": A}, broken, broken], 4),
            (["a cat", "a cat", "a dog", long, long], 3),
        ):
            with pytest.raises(InputError, match=rf"^item {number} cannot be embedded: ") as caught:
                embedder.embed_batch(items)  # type: ignore[arg-type]
            assert caught.value.item == number


def test_image_tokens_of_an_item_without_a_picture_are_refused(model: Model) -> None:
    embedder = Embedder(model, tokens="image")
    with pytest.raises(InputError, match=r"^tokens is 'image', but there is no picture"):
        embedder.embed_text("a cat")
    with pytest.raises(InputError, match=r"^item 1 cannot be embedded: tokens is 'image'"):
        embedder.embed_batch([{"image": A}, "a cat"])


def test_a_damaged_model_gives_an_error_and_no_vector(tiny_pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / tiny_pair[0].name
    shutil.copy(tiny_pair[0], path)
    reader = GGUFReader(path, "r+")
    (norm,) = (tensor for tensor in reader.tensors if tensor.name == "output_norm.weight")
    norm.data[3] = np.nan
    reader.data.flush()
    del norm, reader
    with lookonce.load(path, **EXACT) as broken:
        with pytest.raises(
            NativeError, match="not finite: the model file may be damaged, check it with `lookonce models"
        ):
            Embedder(broken).embed_text("a cat")
        assert np.isfinite(Embedder(broken, layer=-2).embed_text("a cat")).all()


@pytest.fixture
def scarred(tiny_pair: Pair, tmp_path: Path) -> Path:
    """A model that gives no finite values for texts with a Z, and sound ones for all others."""
    path = tmp_path / tiny_pair[0].name
    shutil.copy(tiny_pair[0], path)
    with lookonce.load(path, n_ctx=256, **EXACT) as whole:
        (token,) = whole.engine.text.tokenize("Z")
    reader = GGUFReader(path, "r+")
    (table,) = (tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    table.data[token] = np.nan
    reader.data.flush()
    del table, reader
    return path


def test_an_item_that_alone_gives_no_finite_vector_is_named_and_the_file_is_not_blamed(scarred: Path) -> None:
    with lookonce.load(scarred, n_ctx=256, **EXACT) as model, Embedder(model) as embedder:
        with pytest.raises(
            NativeError, match=r"^item 1 cannot be embedded: .* gave values for it that are not finite"
        ) as caught:
            embedder.embed_batch(["a cat", "Z", "a dog"])
        assert caught.value.item == 1
        for items, number in ((["a cat", "Z", "a cat", "Z"], 1), (["a cat", "a cat", "a dog", "Z"], 3)):
            for batch_size in (1, 2, 256):
                with pytest.raises(NativeError, match=rf"^item {number} cannot be embedded: ") as caught:
                    embedder.embed_batch(items, batch_size=batch_size)
        with (
            Embedder(model, truncate=True) as cutting,
            pytest.raises(NativeError, match=r"^item 1 cannot be embedded: "),
        ):
            cutting.embed_batch(["a cat", "Z" * 300, "Z" * 400])  # what is left of the two is equal
        with pytest.raises(
            NativeError, match=r"gave values for it that are not finite, but not for others: leave it out"
        ):
            embedder.embed_text("Z")
        assert np.isfinite(embedder.embed_batch(["a cat", "a dog"])).all()


def test_the_search_for_an_item_without_a_finite_vector_evaluates_no_copies(scarred: Path, cells: list[int]) -> None:
    evaluated = []
    with lookonce.load(scarred, n_ctx=256, **EXACT) as model:
        for copies in (1, 20):
            cells.clear()
            with Embedder(model) as embedder, pytest.raises(NativeError, match=rf"^item {copies} cannot be embedded: "):
                embedder.embed_batch(["a cat"] * copies + ["Z"] * copies)
            evaluated.append(sum(cells))
    assert evaluated[0] == evaluated[1]


def test_a_row_without_a_finite_vector_is_told_by_its_line_and_passed_over(
    scarred: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in ("a cat", "Z", "a dog", "Z Z"))
    with lookonce.load(scarred, n_ctx=256, **EXACT) as model:

        def run(skip_errors: bool) -> list[EmbeddedBatch]:
            sink = Kept()
            rows = read_rows(io.BytesIO(lines))
            embed_rows(lambda: Embedder(model), rows, sink, batch_size=4, skip_errors=skip_errors)
            return sink.batches

        (batch,) = run(True)
        assert [row.index for row in batch.kept] == [0, 2]
        assert [one.label for one in batch.skipped] == ["line 2", "line 4"]
        assert np.isfinite(batch.vectors).all()
        with pytest.raises(InputError, match=r"^line 2 cannot be embedded: .* gave values for it that are not finite"):
            run(False)


class Kept:
    """A sink that holds what it is given."""

    def __init__(self) -> None:
        self.batches: list[EmbeddedBatch] = []

    def append(self, batch: EmbeddedBatch) -> None:
        self.batches.append(batch)

    def finish(self) -> None:
        pass


# --- threads, the event loop, memory


def test_threads_share_an_embedder_beside_others_and_replies(model: Model) -> None:
    embedder, other = Embedder(model), Embedder(model, pooling="mean", layer=1)
    expected = embedder.embed_batch(TEXTS), other.embed_batch(TEXTS)
    reply = model.ask("What is it?", [A], temperature=0, max_tokens=8).text
    found: list[bool] = []

    def embed(one: Embedder, truth: Any) -> None:
        for _ in range(4):
            found.append(min(map(cosine, one.embed_batch(TEXTS), truth)) > 0.99999)

    def ask() -> None:
        for _ in range(4):
            found.append(model.ask("What is it?", [A], temperature=0, max_tokens=8).text == reply)

    threads = [threading.Thread(target=embed, args=pair) for pair in zip((embedder, other), expected, strict=True)]
    threads += [threading.Thread(target=embed, args=(embedder, expected[0])), threading.Thread(target=ask)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 16


def test_the_async_twins_do_not_block_the_event_loop(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = Embedder(model)
    went_on = threading.Event()
    real = HiddenContext.evaluate_tokens

    def waiting(*arguments: Any) -> Any:
        assert went_on.wait(30), "the event loop stood still"
        return real(*arguments)

    monkeypatch.setattr(HiddenContext, "evaluate_tokens", waiting)

    async def go_on() -> None:
        await asyncio.sleep(0.01)
        went_on.set()

    async def twice(work: Any) -> Any:
        went_on.clear()
        return (await asyncio.gather(work, go_on()))[0]

    async def all_twins() -> list[Any]:
        return [
            await twice(embedder.aembed_text("a cat")),
            await twice(embedder.aembed_image(A)),
            await twice(embedder.aembed_multimodal("a cat", [A, B])),
            await twice(embedder.aembed_batch(["a cat", {"image": A}])),
        ]

    found = asyncio.run(all_twins())
    expected = [embedder.embed_text("a cat"), embedder.embed_image(A), embedder.embed_multimodal("a cat", [A, B])]
    assert min(map(cosine, [*found[:3], *found[3]], [*expected, *expected[:2]])) > 0.999999


def test_a_closed_model_refuses_vectors_and_its_embedder_can_be_closed(own: Model) -> None:
    embedder = Embedder(own)
    embedder.embed_text("a cat")
    own.close()
    with pytest.raises(ClosedError, match="load it again"):
        embedder.embed_text("a cat")
    with pytest.raises(ClosedError, match="load it again"):
        embedder.embed_batch(["a cat", {"image": make_picture(0)}])
    with pytest.raises(ClosedError, match="load it again"):
        embedder.encode([])
    embedder.close()


def test_a_closed_embedder_refuses_vectors(model: Model) -> None:
    with Embedder(model) as embedder:
        embedder.embed_text("a cat")
    embedder.close()
    for call in (
        lambda: embedder.embed_text("a cat"),
        lambda: embedder.embed_batch([{"image": A}]),
        lambda: embedder.encode([]),
        lambda: embedder.prompts(["a cat"]),
    ):
        with pytest.raises(ClosedError, match=r"^the embedder is closed: make it again with lookonce"):
            call()


class Contexts:
    """Counts the native contexts that are alive."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.made = self.alive = 0
        make, free = text.llama.llama_init_from_model, text.llama.llama_free

        def made(*arguments: Any) -> Any:
            self.made += 1
            self.alive += 1
            return make(*arguments)

        def freed(*arguments: Any) -> Any:
            self.alive -= 1
            return free(*arguments)

        patch.setattr(text.llama, "llama_init_from_model", made)
        patch.setattr(text.llama, "llama_free", freed)


def test_a_contexts_memory_is_given_back_when_it_is_outgrown_closed_or_forgotten(
    own: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts = Contexts(monkeypatch)
    embedder = Embedder(own)
    assert contexts.alive == 0
    embedder.embed_text("a cat")
    embedder.embed_batch([f"{text} {number}" for number in range(3) for text in TEXTS])
    assert contexts.made == 2
    assert contexts.alive == 1
    embedder.close()
    embedder.close()
    assert contexts.alive == 0
    with Embedder(own) as other:
        other.embed_text("a cat")
        assert contexts.alive == 1
    assert contexts.alive == 0
    forgotten = Embedder(own)
    forgotten.embed_text("a cat")
    assert contexts.alive == 1
    del forgotten
    gc.collect()
    assert contexts.alive == 0
    last = Embedder(own)
    last.embed_text("a cat")
    own.close()
    assert contexts.alive == 0


def test_a_call_that_is_broken_off_leaves_the_next_ones_right(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with Embedder(model) as embedder:
        expected = embedder.embed_batch(ITEMS)
        real, calls = HiddenContext.evaluate_tokens, 0

        def breaking(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise KeyboardInterrupt
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(HiddenContext, "evaluate_tokens", breaking)
            with pytest.raises(KeyboardInterrupt):
                embedder.embed_batch(ITEMS)
        assert embedder.embed_batch(ITEMS) == pytest.approx(expected, abs=1e-5)


def test_the_name_is_the_models(model: Model, embedder: Embedder) -> None:
    assert embedder.model_name == model.name


# --- a card's options


def test_a_cards_options_hold_where_none_are_given(
    tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOKONCE_MODELS", str(tmp_path / "own.toml"))
    monkeypatch.setenv("LOOKONCE_MODELS_DIR", str(tiny_pair[0].parent))
    write_card(tmp_path / "own.toml", *tiny_pair, pooling="mean", instruction="Find its like.", prompt="plain")
    with lookonce.load("tiny", n_ctx=256, **EXACT) as model, Embedder(model) as from_card:
        given = Embedder(model, pooling="mean", instruction="Find its like.", prompt="plain")
        other = Embedder(model, pooling="max", instruction="Another.", prompt="chat")
        assert np.array_equal(from_card.embed_text("a cat"), given.embed_text("a cat"))
        assert not np.array_equal(from_card.embed_text("a cat"), other.embed_text("a cat"))


def test_a_cards_instruction_does_not_go_with_another_prompt(
    tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOKONCE_MODELS", str(tmp_path / "own.toml"))
    monkeypatch.setenv("LOOKONCE_MODELS_DIR", str(tiny_pair[0].parent))
    write_card(tmp_path / "own.toml", *tiny_pair, instruction="Find its like.", prompt="chat")
    with lookonce.load("tiny", n_ctx=256, **EXACT) as model:
        (with_card,) = Embedder(model, prompt="plain").prompts(["a cat"])
        (told,) = Embedder(model, prompt="plain", instruction="Find its like.").prompts(["a cat"])
        assert with_card.n_tokens < told.n_tokens


def test_a_cards_instruction_holds_with_the_prompt_that_would_be_taken_anyway(
    tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOKONCE_MODELS", str(tmp_path / "own.toml"))
    monkeypatch.setenv("LOOKONCE_MODELS_DIR", str(tiny_pair[0].parent))
    write_card(tmp_path / "own.toml", *tiny_pair, instruction="Find its like.")
    with lookonce.load("tiny", n_ctx=256, **EXACT) as model:
        given, left_out = (Embedder(model, prompt=prompt).prompts(["a cat"])[0] for prompt in ("chat", None))
        assert list(given.units()) == list(left_out.units())
