"""From a picture to its look: what is encoded once is found again, and nothing else ever is."""

import dataclasses
import logging
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import lookonce
from card_maker import write_card
from look_maker import make_look, make_picture
from lookonce import fingerprint, gguf_file
from lookonce.embedding import ImageEmbedding
from lookonce.errors import ContextError, InputError, MismatchError, ModelFileError, NativeError
from lookonce.images import QWEN2_VL, QWEN3_VL
from lookonce.looker import Projector
from lookonce.model import Model
from lookonce.native import vision
from lookonce.store import Store
from lookonce.synthetic.pair import make_pair

Pair = tuple[Path, Path]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6}
SMALL: dict[str, Any] = {"min_pixels": 1024, "max_pixels": 65_536}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_pair: Pair) -> Path:
    """A model whose files are older than a moment, so that its fingerprint may be remembered."""
    folder = tmp_path_factory.mktemp("model")
    for source, name in zip(tiny_pair, ("text.gguf", "mmproj.gguf"), strict=True):
        shutil.copy(source, folder / name)
        os.utime(folder / name, (1e9, 1e9))
    return folder


@pytest.fixture
def load(folder: Path, tmp_path: Path) -> Iterator[Callable[..., Model]]:
    """Loads the model anew, as a new process would, on one store."""
    loaded: list[Model] = []

    def load(**options: Any) -> Model:
        chosen = {"store": tmp_path / "store", "threads": 1, "n_ctx": 1024, **options}
        loaded.append(lookonce.load(chosen.pop("model", folder / "text.gguf"), **chosen))
        return loaded[-1]

    yield load
    for model in loaded:
        model.close()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(make_picture(1, 100, 70)).save(path)
    return path


@pytest.fixture
def towers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of every picture that a tower encodes."""
    shapes: list[tuple[int, ...]] = []
    real = vision.VisionTower.encode

    def encode(self: vision.VisionTower, pixels: NDArray[np.uint8], *rest: Any) -> vision.EncodedPicture:
        shapes.append(pixels.shape)
        return real(self, pixels, *rest)

    monkeypatch.setattr(vision.VisionTower, "encode", encode)
    return shapes


def same(one: ImageEmbedding, other: ImageEmbedding) -> bool:
    return one.to_bytes() == other.to_bytes()


# --- found again


def test_a_look_is_encoded_once_then_stored_then_a_file(
    load: Callable[..., Model], photo: Path, tmp_path: Path, towers: list[Any]
) -> None:
    model = load()
    fresh = model.look(photo)
    assert (fresh.source, model.tower_loaded) == ("encoded", True)
    assert model.look(photo).source == "store"
    again = load()
    stored = again.look(photo)
    assert (stored.source, again.tower_loaded) == ("store", False)
    stored.save(tmp_path / "look.safetensors")
    saved = again.look(tmp_path / "look.safetensors")
    assert (saved.source, again.tower_loaded) == ("file", False)
    assert same(fresh, stored)
    assert same(fresh, saved)
    assert len(towers) == 1


def test_one_picture_has_one_entry_whatever_its_name_and_format(
    load: Callable[..., Model], photo: Path, tmp_path: Path, towers: list[Any]
) -> None:
    model = load()
    pixels = np.asarray(Image.open(photo))
    Image.fromarray(pixels).save(tmp_path / "photo.bmp")
    shutil.copy(photo, tmp_path / "other name.png")
    sources = [
        *(photo, str(photo), photo.read_bytes(), tmp_path / "photo.bmp", tmp_path / "other name.png"),
        *(pixels, Image.fromarray(pixels), pixels[:, ::-1][:, ::-1]),
    ]
    looks = [model.look(source) for source in sources]
    assert len({look.key for look in looks}) == 1
    assert len(towers) == 1
    with Store(tmp_path / "store") as store:
        assert len(list(store.entries())) == 1


def test_the_same_picture_twice_in_one_question_is_encoded_once(
    load: Callable[..., Model], photo: Path, towers: list[Any]
) -> None:
    model = load(store=False)
    reply = model.ask("Compare.", [photo, photo.read_bytes()], **GREEDY)
    assert len(towers) == 1
    assert reply.usage.image_rows == sum(use.rows for use in reply.images) == 2 * reply.images[0].rows


def test_two_threads_with_the_same_new_picture_encode_it_once(
    load: Callable[..., Model], photo: Path, towers: list[Any]
) -> None:
    model = load()
    start = threading.Barrier(2)

    def look() -> ImageEmbedding:
        start.wait()
        return model.look(photo)

    with ThreadPoolExecutor(2) as threads:
        looks = [one.result() for one in [threads.submit(look), threads.submit(look)]]
    assert len(towers) == 1
    assert {look.source for look in looks} == {"encoded", "store"}
    assert same(*looks)


def test_limits_that_a_saved_look_cannot_meet_are_a_warning(
    load: Callable[..., Model], photo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load()
    look = model.look(photo)
    look.save(tmp_path / "look.safetensors")
    with caplog.at_level(logging.WARNING, "lookonce"):
        assert model.look(tmp_path / "look.safetensors", max_pixels=5000).n_rows == look.n_rows
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / 'look.safetensors'} is a saved look: the limits on pixels do not change it"
    ]


def test_answers_from_a_fresh_a_stored_and_a_saved_look_are_equal_to_the_bit(
    load: Callable[..., Model], photo: Path, tmp_path: Path
) -> None:
    def logits(model: Model, picture: Any) -> Any:
        text = model.ask("What is it?", [picture], temperature=0, max_tokens=1).text
        context = model.engine._context
        assert context is not None
        return text, context.logits()

    fresh_text, fresh = logits(load(), photo)
    again = load()
    stored_text, stored = logits(again, photo)
    again.look(photo).save(tmp_path / "look.safetensors")
    saved_text, saved = logits(load(), tmp_path / "look.safetensors")
    assert fresh_text == stored_text == saved_text
    assert np.array_equal(fresh, stored)
    assert np.array_equal(fresh, saved)


# --- never another's


def test_another_photo_under_the_same_path_is_looked_at(load: Callable[..., Model], photo: Path) -> None:
    model = load()
    first = model.look(photo)
    Image.fromarray(make_picture(2, 100, 70)).save(photo)
    second = model.look(photo)
    assert second.source == "encoded"
    assert second.key != first.key
    assert not np.array_equal(first.rows, second.rows)


def test_another_photo_of_the_same_size_and_time_under_the_same_path_is_looked_at(
    load: Callable[..., Model], tmp_path: Path
) -> None:
    model = load()
    path = tmp_path / "photo.bmp"
    keys = []
    for seed in (1, 2):
        Image.fromarray(make_picture(seed)).save(path)
        os.utime(path, (1e9, 1e9))
        keys.append((path.stat().st_size, model.look(path).key))
    assert keys[0][0] == keys[1][0]
    assert keys[0][1] != keys[1][1]


def test_pictures_of_equal_bytes_and_another_shape_have_two_keys(load: Callable[..., Model]) -> None:
    model = load()
    values = np.random.default_rng(0).integers(0, 256, 2 * 8 * 3, dtype=np.uint8)
    wide, tall = (model.look(values.reshape(shape), **SMALL) for shape in ((2, 8, 3), (8, 2, 3)))
    assert wide.key != tall.key
    assert wide.grid == tall.grid[::-1]


def test_another_row_type_another_limit_and_another_pixel_have_their_own_keys(
    load: Callable[..., Model], photo: Path
) -> None:
    model = load()
    pixels = np.array(Image.open(photo))
    pixels[3, 5, 1] ^= 1
    looks = [
        model.look(photo),
        model.look(photo, dtype="f32"),
        model.look(photo, **SMALL),
        model.look(pixels),
    ]
    assert len({look.key for look in looks}) == 4
    assert looks[1].rows.dtype == np.float32
    assert np.array_equal(looks[1].rows.astype(np.float16), looks[0].rows)
    again = load()
    assert [again.look(photo, dtype="f32").source, again.look(photo, **SMALL).source] == ["store", "store"]


def change_tensor(source: Path, target: Path, name: str, change: Callable[[NDArray[np.float32]], None]) -> None:
    """Copy a GGUF with one F32 tensor changed in place."""
    tensor = gguf_file.read(source).tensors[name]
    data = bytearray(source.read_bytes())
    change(np.frombuffer(data, np.float32, tensor.size_bytes // 4, tensor.offset))
    target.write_bytes(data)
    os.utime(target, (1e9, 1e9))


def test_a_projector_with_one_weight_changed_is_a_miss(
    load: Callable[..., Model], photo: Path, folder: Path, tmp_path: Path
) -> None:
    def nudge(weights: NDArray[np.float32]) -> None:
        weights[7] += 1.0

    first = load().look(photo)
    changed = tmp_path / "mmproj.gguf"
    change_tensor(folder / "mmproj.gguf", changed, "mm.0.weight", nudge)
    second = load(mmproj=changed).look(photo)
    assert second.source == "encoded"
    assert second.key != first.key
    assert second.projector != first.projector


def test_a_retyped_projector_is_a_miss(
    load: Callable[..., Model], photo: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert load().look(photo).source == "encoded"
    _, projector = make_pair(tmp_path_factory.mktemp("f16"), mmproj_type="F16")
    assert load(mmproj=projector).look(photo).source == "encoded"


def test_a_projector_replaced_under_a_loaded_model_never_enters_the_store(
    load: Callable[..., Model], photo: Path, tmp_path: Path, folder: Path
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(folder, mine)
    model = load(model=mine / "text.gguf")
    model.look(photo)
    late = load(model=mine / "text.gguf")
    assert late.look(photo).source == "store"

    def nudge(weights: NDArray[np.float32]) -> None:
        weights[:] += 1.0

    change_tensor(folder / "mmproj.gguf", mine / "mmproj.gguf", "mm.0.weight", nudge)
    with pytest.raises(ModelFileError, match="was changed while the model was loaded"):
        late.look(make_picture(9))
    assert not late.tower_loaded


def test_the_projectors_fingerprint_is_remembered_for_the_unchanged_file_alone(
    load: Callable[..., Model], photo: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    load().look(photo)
    read: list[Path] = []
    real = fingerprint.hash_files

    def hash_files(paths: Sequence[Path]) -> str:
        read.extend(paths)
        return real(paths)

    monkeypatch.setattr(fingerprint, "hash_files", hash_files)
    assert load().look(photo).source == "store"
    assert read == []
    os.utime(folder / "mmproj.gguf", (1e9, 1e9 + 1))
    assert load().look(photo).source == "store"
    assert read == [folder / "mmproj.gguf"]
    now = int(time.time()) + 1  # a clock that tells no fractions
    os.utime(folder / "mmproj.gguf", (now, now))
    for _ in range(2):
        assert load().look(photo).source == "store"
    assert len(read) == 3
    os.utime(folder / "mmproj.gguf", (1e9, 1e9))


# --- a damaged store


def test_a_note_that_was_tampered_with_still_gives_the_right_picture(
    load: Callable[..., Model], photo: Path, tmp_path: Path
) -> None:
    model = load()
    right, wrong = model.look(photo), model.look(make_picture(3))
    model.close()
    (index,) = (path for path in (tmp_path / "store").iterdir() if path.suffix in (".db", ".sqlite", ".sqlite3"))
    with sqlite3.connect(index) as connection:
        changed = connection.execute("UPDATE notes SET value=? WHERE kind='picture'", (wrong.key,)).rowcount
        changed += connection.execute("UPDATE notes SET value=? WHERE kind='fingerprint'", ("f" * 64,)).rowcount
    connection.close()
    assert changed == 2
    assert same(load().look(photo), right)


@pytest.mark.parametrize("damage", ["flipped", "cut", "another look", "no look"])
def test_a_corrupt_entry_is_a_logged_miss(
    load: Callable[..., Model], photo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    model = load()
    right, other = model.look(photo), model.look(make_picture(3))
    with Store(tmp_path / "store") as store:
        if damage == "another look":
            store.put(right.key, "look", other.to_bytes())
        elif damage == "no look":
            store.put(right.key, "look", b"rows")
        else:
            (path,) = (one for one in (tmp_path / "store").rglob(f"*{right.key[2:]}*") if one.is_file())
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 4
            path.write_bytes(data if damage == "flipped" else data[:-5])
    with caplog.at_level(logging.WARNING, "lookonce"):
        found = model.look(photo)
    assert caplog.records
    assert found.source == "encoded"
    assert same(found, right)
    assert model.look(photo).source == "store"


# --- looks that do not belong here


def test_a_look_of_another_width_is_refused_with_both_names(load: Callable[..., Model]) -> None:
    look = dataclasses.replace(make_look(width=1024), model_name="Qwen3-VL 4B")
    with pytest.raises(MismatchError, match=r"'Qwen3-VL 4B' with rows of 1024, but 'Qwen3-VL tiny seed 0' takes 768"):
        load().look(look)


def test_a_look_of_another_text_model_is_refused_with_both_names(load: Callable[..., Model]) -> None:
    look = dataclasses.replace(make_look(), model_name="Qwen3-VL other")
    with pytest.raises(MismatchError, match=r"'Qwen3-VL other', but this is 'Qwen3-VL tiny seed 0'"):
        load().ask("What?", [look])
    spelt = dataclasses.replace(make_look(), model_name="qwen3vl-TINY_seed 0")
    assert load().look(spelt) is spelt


def test_a_look_without_m_rope_is_refused_where_the_model_has_it(load: Callable[..., Model]) -> None:
    with pytest.raises(MismatchError, match="text model"):
        load().look(dataclasses.replace(make_look(), mrope=False))


def test_a_look_of_another_projector_is_refused_where_one_was_chosen_with_both_names(
    load: Callable[..., Model], folder: Path
) -> None:
    look = dataclasses.replace(make_look(), projector_name="other.gguf")
    assert load().look(look) is look
    with pytest.raises(MismatchError, match=r"projector other\.gguf \(0{12}\), but the model has mmproj\.gguf"):
        load(mmproj=folder / "mmproj.gguf").look(look)


def test_a_saved_look_is_replayed_with_no_projector_file_at_all(
    load: Callable[..., Model], photo: Path, folder: Path, tmp_path: Path
) -> None:
    model = load()
    expected = model.ask("What is it?", [photo], **GREEDY).text
    model.look(photo).save(tmp_path / "look.safetensors")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(folder / "text.gguf", alone)
    bare = load(model=alone, store=False)
    reply = bare.ask("What is it?", [tmp_path / "look.safetensors"], **GREEDY)
    assert reply.text == expected
    assert reply.images[0].source == "file"
    with pytest.raises(ModelFileError, match=r"no projector file fits text\.gguf .*: give mmproj="):
        bare.look(photo)


# --- refusals before the tower


def test_a_picture_that_cannot_be_asked_about_is_refused_before_the_tower_is_loaded(
    load: Callable[..., Model], photo: Path
) -> None:
    model = load(n_ctx=64)
    with pytest.raises(ContextError, match=r"has \d+ tokens and 70 image rows, but the context holds 64"):
        model.ask("What?", [photo])
    with pytest.raises(ContextError, match=r"and 60 image rows"):
        load(n_ctx=64).ask("<image_1>" * 10, [photo], min_pixels=1024, max_pixels=12 * 1024)
    assert not model.tower_loaded


@pytest.mark.parametrize(
    "prompt", ["<image_2>", "<|image_pad|>", "word " * 2000], ids=["unknown alias", "mark", "too long"]
)
def test_a_question_that_cannot_be_asked_is_refused_before_the_tower_is_loaded(
    load: Callable[..., Model], photo: Path, prompt: str
) -> None:
    model = load()
    with pytest.raises(InputError):
        model.ask(prompt, [photo])
    assert not model.tower_loaded


def test_bad_options_are_refused_before_the_tower_is_loaded(load: Callable[..., Model], photo: Path) -> None:
    model = load()
    for options in ({"min_pixels": 0}, {"max_pixels": 5}, {"min_pixels": 10**6, "max_pixels": 10**5}, {"dtype": "f64"}):
        with pytest.raises(InputError):
            model.look(photo, **options)
    assert not model.tower_loaded


# --- a projector that gives nonsense


def test_a_projector_with_nan_weights_is_a_native_error_and_nothing_is_kept(
    load: Callable[..., Model], photo: Path, folder: Path, tmp_path: Path
) -> None:
    def spoil(weights: NDArray[np.float32]) -> None:
        weights[0] = np.nan

    broken = tmp_path / "mmproj.gguf"
    change_tensor(folder / "mmproj.gguf", broken, "mm.0.weight", spoil)
    with pytest.raises(NativeError, match="not finite: its file may be damaged"):
        load(mmproj=broken).look(photo)
    with Store(tmp_path / "store") as store:
        assert list(store.entries()) == []


def test_rows_beyond_f16_are_kept_in_f32(load: Callable[..., Model], photo: Path, folder: Path, tmp_path: Path) -> None:
    def enlarge(weights: NDArray[np.float32]) -> None:
        weights *= 1e6

    large = tmp_path / "mmproj.gguf"
    change_tensor(folder / "mmproj.gguf", large, "mm.2.weight", enlarge)
    look = load(mmproj=large).look(photo)
    assert look.rows.dtype == np.float32
    stored = load(mmproj=large).look(photo)
    assert stored.source == "store"
    assert same(look, stored)


# --- what the caller chose


def test_without_a_store_nothing_is_written(
    load: Callable[..., Model], photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOKONCE_STORE", str(tmp_path / "own"))
    model = load(store=False)
    assert [model.look(photo).source, model.look(photo).source] == ["encoded", "encoded"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photo.png"]


def test_a_store_given_by_the_caller_stays_open_and_its_own_is_closed(
    load: Callable[..., Model], photo: Path, tmp_path: Path
) -> None:
    with Store(tmp_path / "mine") as store:
        model = load(store=store)
        look = model.look(photo)
        model.close()
        assert store.get(look.key, "look") is not None


def test_what_cannot_be_kept_is_answered_all_the_same(
    load: Callable[..., Model], photo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Store(tmp_path / "small", limit_bytes=1000) as store, caplog.at_level(logging.WARNING, "lookonce"):
        reply = load(store=store).ask("What?", [photo], **GREEDY)
    assert reply.images[0].source == "encoded"
    assert any("was not kept" in record.message for record in caplog.records)


def test_the_families_rules_are_the_references(tiny_pair: Pair, tiny_pair_25: Pair) -> None:
    for pair, rule in ((tiny_pair, QWEN3_VL), (tiny_pair_25, QWEN2_VL)):
        assert Projector(gguf_file.read(pair[1]), None, None).rule == rule


def test_a_cards_limit_makes_room_for_the_callers(
    tiny_pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOKONCE_MODELS", str(tmp_path / "own.toml"))
    monkeypatch.setenv("LOOKONCE_MODELS_DIR", str(tiny_pair[0].parent))
    write_card(tmp_path / "own.toml", *tiny_pair, min_pixels=65_536, max_pixels=131_072)
    with lookonce.load("tiny", store=False, threads=1) as model:
        assert model.look(make_picture(1, 300, 200), max_pixels=8192).n_rows <= 8
        assert model.look(make_picture(1, 300, 200), min_pixels=196_608).n_rows >= 192
