"""The look, its checks, and its file: what goes in comes out, and nothing else gets in."""

import hashlib
import json
import os
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load as safetensors_load

from lookonce import embedding
from lookonce.embedding import ImageEmbedding, RowSegment, Segment, TextSegment, to_stored_type
from lookonce.errors import InputError, NativeError, PromptError, SavedLookError

KEY = hashlib.sha256(b"picture").hexdigest()
PROJECTOR = hashlib.sha256(b"projector").hexdigest()


def make_look(**changes: Any) -> ImageEmbedding:
    rows = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float16)
    facts: dict[str, Any] = {
        "rows": rows,
        "positions": np.array([(0, y, x) for y in range(2) for x in range(3)], np.int32),
        "segments": (TextSegment((151652,)), RowSegment(6, 3, causal=True), TextSegment((151653, 198))),
        "key": KEY,
        "projector": PROJECTOR,
        "projector_name": "mmproj-é.gguf",
        "model_name": "Qwen3 VL tiny",
        "grid": (2, 3),
        "mrope": True,
        "picture_size": (100, 70),
        "encoded_size": (96, 64),
        "preprocessing": "qwen3-vl bicubic",
        "libraries": {"pillow": "12.0", "lookonce": "0.1.0"},
        "text": 'Describe "it"\nin a word\x07 😀',
    }
    return ImageEmbedding(**(facts | changes))


def assert_equal(a: ImageEmbedding, b: ImageEmbedding) -> None:
    for field in fields(ImageEmbedding):
        if field.name in ("rows", "positions"):
            one, other = getattr(a, field.name), getattr(b, field.name)
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
        elif field.name not in ("alias", "source"):
            assert getattr(a, field.name) == getattr(b, field.name), field.name


def rewrite(data: bytes, change: Any, *, reseal: bool = True) -> bytes:
    """Give the file with its metadata changed by `change`, with a right checksum if `reseal`."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    body = data[8 + length :]
    if reseal:
        end = header["rows"]["data_offsets"][1]
        rows = np.frombuffer(body[:end], {"F16": "f2", "F32": "f4"}[header["rows"]["dtype"]])
        positions = np.frombuffer(body[end:], "i4")
        header["__metadata__"]["sha256"] = embedding._checksum(
            header["__metadata__"],
            rows.reshape(header["rows"]["shape"]),
            positions.reshape(header["positions"]["shape"]),
        )
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + body


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
counts = st.integers(1, 1 << 24)


@st.composite
def looks(draw: st.DrawFn) -> ImageEmbedding:
    width = draw(st.integers(1, 5))
    segments: list[Segment] = []
    parts = []
    for n_rows in draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)):
        tokens = draw(st.lists(st.integers(0, 2**31 - 1), max_size=3))
        n_positions = draw(counts)
        segments += [TextSegment(tuple(tokens)), RowSegment(n_rows, n_positions, draw(st.booleans()))]
        parts.append(draw(hnp.arrays(np.int32, (n_rows, 3), elements=st.integers(0, n_positions - 1))))
    dtype = draw(st.sampled_from([np.float16, np.float32]))
    elements = {"allow_nan": False, "allow_infinity": False}
    positions = np.concatenate(parts)
    return make_look(
        rows=draw(hnp.arrays(dtype, (len(positions), width), elements=elements)),
        positions=positions,
        segments=tuple(segments),
        grid=draw(st.tuples(counts, counts)),
        mrope=draw(st.booleans()),
        projector_name=draw(texts),
        model_name=draw(texts),
        preprocessing=draw(texts),
        libraries=draw(st.dictionaries(texts, texts, max_size=3)),
        text=draw(texts),
    )


@given(looks())
@settings(deadline=None, max_examples=60)
def test_a_look_read_back_equals_the_one_saved(look: ImageEmbedding) -> None:
    data = look.to_bytes()
    again = ImageEmbedding.from_bytes(data, name="x", source="store")
    assert_equal(look, again)
    assert again.source == "store"
    assert again.to_bytes() == data


def test_the_file_is_one_that_the_safetensors_library_reads() -> None:
    look = make_look()
    tensors = safetensors_load(look.to_bytes())
    assert set(tensors) == {"rows", "positions"}
    np.testing.assert_array_equal(tensors["rows"], look.rows)
    np.testing.assert_array_equal(tensors["positions"], look.positions)


def test_the_format_stays_what_it_was() -> None:
    look = make_look(rows=np.ones((6, 8), np.float16))
    digest = hashlib.sha256(look.to_bytes()).hexdigest()
    assert digest == "efcd9b411a63ad02824d08d9470549d950e1d995ed397566b0ed5a4c7bfe324d", (
        "raise FORMAT_VERSION when the format changes"
    )


def test_reading_copies_nothing_and_what_is_read_cannot_be_changed() -> None:
    data = make_look().to_bytes()
    look = ImageEmbedding.from_bytes(data)
    assert np.shares_memory(look.rows, np.frombuffer(data, np.uint8))
    assert np.shares_memory(look.positions, np.frombuffer(data, np.uint8))
    for array in (look.rows, look.positions):
        assert array.flags.aligned
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(TypeError):
        look.libraries["pillow"] = "1"  # type: ignore[index]


def test_the_counts_come_from_the_parts() -> None:
    segments = (TextSegment((1,)), TextSegment((2, 3)), RowSegment(2, 2, True), TextSegment((9,)))
    segments += (RowSegment(4, 4, True), TextSegment((4,)), TextSegment((5, 6)))
    look = make_look(segments=segments, positions=np.zeros((6, 3), np.int32))
    assert (look.n_rows, look.width, look.n_positions) == (6, 8, 13)
    assert (look.tokens_before, look.tokens_after) == ((1, 2, 3), (4, 5, 6))


def test_an_alias_changes_nothing_else_and_shares_the_arrays() -> None:
    look = make_look()
    renamed = look.with_alias("<image_1>")
    assert (look.alias, renamed.alias) == (None, "<image_1>")
    assert np.shares_memory(look.rows, renamed.rows)
    assert renamed.to_bytes() == look.to_bytes()
    assert ImageEmbedding.from_bytes(renamed.to_bytes()).alias is None
    for wrong in ("", " "):
        with pytest.raises(PromptError):
            look.with_alias(wrong)


def test_a_look_of_wrong_parts_cannot_be_made() -> None:
    rows = np.ones((6, 8), np.float16)
    positions = make_look().positions
    bad: list[dict[str, Any]] = [
        {"rows": rows[:, 0]},
        {"rows": rows[:0], "positions": positions[:0], "segments": ()},
        {"rows": rows.astype(np.float64)},
        {"rows": np.where(np.arange(48).reshape(6, 8) == 7, np.nan, 1).astype(np.float16)},
        {"rows": np.where(np.arange(48).reshape(6, 8) == 7, -np.inf, 1).astype(np.float16)},
        {"rows": np.where(np.arange(48).reshape(6, 8) == 7, np.inf, 1).astype(np.float32)},
        {"positions": positions[:5]},
        {"positions": positions.astype(np.int64)},
        {"positions": positions - 1},
        {"positions": positions + 1},
        {"segments": (RowSegment(5, 3, True),)},
        {"segments": (RowSegment(7, 3, True),)},
        {"segments": (RowSegment(6, 3, True), RowSegment(0, 1, True))},
        {"segments": (RowSegment(6, 3, 1),)},  # type: ignore[arg-type]
        {"segments": (RowSegment(6, 1 << 25, True),)},
        {"segments": (TextSegment((-1,)), RowSegment(6, 3, True))},
        {"segments": (TextSegment((True,)), RowSegment(6, 3, True))},
        {"segments": (TextSegment((2**31,)), RowSegment(6, 3, True))},
        {"key": KEY.upper()},
        {"key": KEY[:-1]},
        {"projector": "projector"},
        {"grid": (0, 3)},
        {"grid": (2, 3, 1)},
        {"encoded_size": (96.0, 64)},
        {"mrope": 1},
        {"text": "\ud800"},
        {"model_name": None},
        {"libraries": {"pillow": 12}},
    ]
    for changes in bad:
        with pytest.raises(SavedLookError):
            make_look(**changes)


def test_a_bit_flipped_anywhere_is_noticed() -> None:
    look = make_look()
    data = bytearray(look.to_bytes())
    for place in range(len(data)):
        for bit in (0, 2, 5, 7):
            data[place] ^= 1 << bit
            with pytest.raises(SavedLookError, match=r"x\.safetensors"):
                ImageEmbedding.from_bytes(bytes(data), name="x.safetensors")
            data[place] ^= 1 << bit
    assert_equal(look, ImageEmbedding.from_bytes(bytes(data)))


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_bytes_cut_added_or_changed_give_one_kind_of_error(data: st.DataObject) -> None:
    good = make_look().to_bytes()
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(good))] * 2)))
    bad = good[:start] + data.draw(st.binary(max_size=12)) + good[stop:]
    if bad != good:
        with pytest.raises(SavedLookError):
            ImageEmbedding.from_bytes(bad)


@given(st.binary(max_size=200))
def test_random_bytes_are_not_a_look(data: bytes) -> None:
    for bad in (data, len(data).to_bytes(8, "little") + data):
        with pytest.raises(SavedLookError):
            ImageEmbedding.from_bytes(bad)


def test_damage_with_a_right_checksum_is_refused_all_the_same() -> None:
    def change(field: str, value: str) -> Any:
        return lambda header: header["__metadata__"].update({field: value})

    data = make_look().to_bytes()
    assert_equal(make_look(), ImageEmbedding.from_bytes(rewrite(data, lambda header: None)))
    bad = {
        "key": "x" * 64,
        "projector": "",
        "segments": '[{"rows":5,"positions":3,"causal":true}]',
        "grid": "[1]",
        "mrope": '"yes"',
        "picture_size": "{}",
        "libraries": "3",
        "encoded_size": "[" * 100_000,
        "text": "\ud800",
    }
    for field, value in bad.items():
        with pytest.raises(SavedLookError):
            ImageEmbedding.from_bytes(rewrite(data, change(field, value)))
    for segments in ('{"a":1}', '[{"tokens":3}]', "[[1]]", '[{"tokens":[1.5]}]', '[{"row":6}]', "null"):
        with pytest.raises(SavedLookError):
            ImageEmbedding.from_bytes(rewrite(data, change("segments", segments)))


def test_values_that_are_not_finite_are_refused_in_a_file() -> None:
    look = make_look()
    rows = look.rows.copy()
    rows[2, 3] = np.nan
    stand_in = SimpleNamespace(**{field.name: getattr(look, field.name) for field in fields(look)})
    stand_in.rows = rows
    data = ImageEmbedding.to_bytes(stand_in)  # type: ignore[arg-type]
    with pytest.raises(SavedLookError, match="not finite"):
        ImageEmbedding.from_bytes(data)


def test_a_newer_format_is_named_as_such() -> None:
    data = rewrite(make_look().to_bytes(), lambda h: h["__metadata__"].update(format_version="2"))
    with pytest.raises(SavedLookError, match="format version 2, and this lookonce reads 1: update lookonce"):
        ImageEmbedding.from_bytes(data)


def test_metadata_of_unknown_names_is_left_unread() -> None:
    data = rewrite(make_look().to_bytes(), lambda h: h["__metadata__"].update(mood="good"), reseal=False)
    assert_equal(make_look(), ImageEmbedding.from_bytes(data))


def test_a_header_with_blanks_gaps_overlaps_or_other_tensors_is_refused() -> None:
    data = make_look(text="").to_bytes()
    length = int.from_bytes(data[:8], "little")
    padded = (length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b"%c" + data[8 + length :]
    assert_equal(make_look(text=""), ImageEmbedding.from_bytes(padded.replace(b"%c", b" ")))
    for blank in b"\n\t\r":
        with pytest.raises(SavedLookError):
            ImageEmbedding.from_bytes(padded.replace(b"%c", bytes([blank])))

    def move(**offsets: list[int]) -> Any:
        return lambda header: [header[name].update(data_offsets=place) for name, place in offsets.items()]

    for places in ({"positions": [92, 164]}, {"positions": [100, 172]}, {"rows": [4, 100], "positions": [100, 172]}):
        with pytest.raises(SavedLookError, match="do not follow one another"):
            ImageEmbedding.from_bytes(rewrite(data, move(**places), reseal=False))
    other = {"other": {"dtype": "F32", "shape": [0, 1], "data_offsets": [168, 168]}}
    with pytest.raises(SavedLookError):
        ImageEmbedding.from_bytes(rewrite(data, lambda header: header.update(other), reseal=False))


def test_each_field_that_replay_depends_on_is_under_the_checksum() -> None:
    data = make_look().to_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    named = {field.name for field in fields(ImageEmbedding)} - {"rows", "positions", "alias", "source"}
    assert set(header["__metadata__"]) == named | {"format_version", "sha256"}
    for field in named:
        changed = rewrite(
            data, lambda h, f=field: h["__metadata__"].update({f: h["__metadata__"][f] + " "}), reseal=False
        )
        with pytest.raises(SavedLookError, match="SHA-256"):
            ImageEmbedding.from_bytes(changed)


def test_saving_replaces_whole_files_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "look.safetensors"
    path.write_bytes(b"old")
    make_look().save(path)
    assert_equal(make_look(), ImageEmbedding.load(path))
    assert ImageEmbedding.load(path).source == "file"
    assert list(tmp_path.iterdir()) == [path]


def test_a_save_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "look.safetensors"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SavedLookError, match="No space left"):
        make_look().save(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_no_saved_looks_are_named_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "look.safetensors"
    for data in (b"", b"{}", b"\x89PNG\r\n\x1a\n" + bytes(100), bytes(1000), b"\xff" * 100):
        path.write_bytes(data)
        with pytest.raises(SavedLookError, match=r"^look\.safetensors is not a saved look[^\n]*$"):
            ImageEmbedding.load(path)
    with pytest.raises(SavedLookError, match="does not exist: check the path"):
        ImageEmbedding.load(tmp_path / "none.safetensors")
    with pytest.raises(SavedLookError, match=r"cannot be read|does not exist|no ordinary|device or a pipe"):
        ImageEmbedding.load(tmp_path.with_suffix(".safetensors"))
    with pytest.raises(SavedLookError, match=r"end it in \.safetensors"):
        make_look().save(tmp_path / "look.bin")
    with pytest.raises(SavedLookError, match="cannot be written"):
        make_look().save(tmp_path / "none" / "look.safetensors")


def test_a_file_of_weights_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 20, 1 << 17], "data_offsets": [0, 1 << 39]}})
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + (1 << 39))
    with pytest.raises(SavedLookError, match="is not a saved look"):
        ImageEmbedding.load(path)


def test_a_text_too_long_for_the_header_is_refused_when_saved() -> None:
    with pytest.raises(SavedLookError, match="shorten the text"):
        replace(make_look(), text="x" * (1 << 20)).to_bytes()


def test_a_torch_file_holds_the_same_look(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "look.pt"
    make_look().save(path)
    assert_equal(make_look(), ImageEmbedding.load(path))
    plain = torch.load(path, weights_only=True)
    assert set(plain) == {"rows", "positions", "metadata"}
    plain["rows"][0, 0] += 1
    torch.save(plain, path)
    with pytest.raises(SavedLookError, match="SHA-256"):
        ImageEmbedding.load(path)
    for bad in ([1], {"rows": 3, "positions": 4, "metadata": "{}"}, {"rows": plain["rows"]}):
        torch.save(bad, path)
        with pytest.raises(SavedLookError):
            ImageEmbedding.load(path)
    path.write_bytes(b"PK\x03\x04" + bytes(50))
    with pytest.raises(SavedLookError):
        ImageEmbedding.load(path)


def test_a_torch_file_without_torch_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(SavedLookError, match="needs torch"):
        make_look().save(tmp_path / "look.pt")


def test_rows_are_stored_as_f16_unless_one_overflows_or_f32_is_asked_for() -> None:
    rows = np.array([[1.0, 65504.0], [0.1, -3.0]], np.float32)
    assert to_stored_type(rows, "f16").dtype == np.float16
    np.testing.assert_array_equal(to_stored_type(rows, "f16"), rows.astype(np.float16))
    assert to_stored_type(rows, "f32").dtype == np.float32
    rows[0, 1] = 65520.0
    stored = to_stored_type(rows, "f16")
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored, rows)
    with pytest.raises(InputError, match="'q8'"):
        to_stored_type(rows, "q8")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_fresh_rows_that_are_not_finite_are_a_native_error(value: float, dtype: Any) -> None:
    rows = np.zeros((2, 2), np.float32)
    rows[1, 0] = value
    with pytest.raises(NativeError, match="its file may be damaged"):
        to_stored_type(rows, dtype)
