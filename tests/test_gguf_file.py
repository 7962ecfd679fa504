"""Reading GGUF headers: what is sound, each kind of damage, and random damage."""

import os
import random
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

import gguf_maker as maker
from gguf_maker import Q, T, array, u32
from lookonce import gguf_check, gguf_file
from lookonce.errors import ModelFileError


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return maker.write_text(tmp_path / "text.gguf")


def refusal(path: Path) -> str:
    with pytest.raises(ModelFileError) as caught:
        gguf_file.read(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def patch(path: Path, after: bytes, skip: int, new: bytes) -> Path:
    """Overwrite bytes `skip` bytes behind the first `after`."""
    data = bytearray(path.read_bytes())
    at = data.index(after) + len(after) + skip
    data[at : at + len(new)] = new
    path.write_bytes(data)
    return path


def test_keys_tensors_and_offsets_are_those_that_the_gguf_package_reads(text: Path) -> None:
    ours, theirs = gguf_file.read(text), gguf.GGUFReader(text)
    assert (ours.version, ours.alignment, ours.size_bytes) == (3, 32, text.stat().st_size)
    assert set(ours.metadata) == {key for key in theirs.fields if not key.startswith("GGUF.")}
    assert {
        t.name: (tuple(t.shape.tolist()), t.tensor_type.name, t.data_offset, t.n_bytes) for t in theirs.tensors
    } == {t.name: (t.shape, t.type, t.offset, t.size_bytes) for t in ours.tensors.values()}
    assert ours.metadata["qwen3vl.rope.dimension_sections"] == (4, 2, 2, 0)
    assert ours.types["qwen3vl.rope.dimension_sections"] == "[i32]"
    assert ours.metadata["qwen3vl.embedding_length"] == maker.WIDTH
    assert (ours.architecture, ours.name) == ("qwen3vl", "Tiny")


def test_every_type_of_metadata_value_is_read(tmp_path: Path) -> None:
    values = {
        T.UINT8: 200, T.INT8: -3, T.UINT16: 60000, T.INT16: -300, T.UINT32: 4_000_000_000, T.INT32: -70000,
        T.FLOAT32: 0.5, T.BOOL: True, T.STRING: "wörd", T.UINT64: 1 << 63, T.INT64: -(1 << 62), T.FLOAT64: 0.1,
    }  # fmt: skip
    path = maker.write(tmp_path / "a.gguf", {kind.name: (kind, value) for kind, value in values.items()}, {})
    assert dict(gguf_file.read(path).metadata) == {kind.name: value for kind, value in values.items()}


def test_every_type_of_tensor_has_the_size_that_the_gguf_package_gives_it(tmp_path: Path) -> None:
    # No file holds Q8_1, and the package's table has given its blocks another size than ggml's.
    kinds = {kind: sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items() if kind != Q.Q8_1}
    shapes = {kind.name: ((256, 2), kind) for kind in kinds}
    tensors = gguf_file.read(maker.write(tmp_path / "a.gguf", {}, shapes)).tensors
    assert {t.type: t.size_bytes for t in tensors.values()} == {
        kind.name: 512 // block * size for kind, (block, size) in kinds.items()
    }


def test_a_name_that_is_missing_is_the_stem_of_the_file(tmp_path: Path) -> None:
    assert gguf_file.read(maker.write_text(tmp_path / "nameless.gguf", keys={"general.name": ()})).name == "nameless"


def test_version_2_is_read_as_version_3_is(text: Path) -> None:
    assert gguf_file.read(patch(text, b"GGUF", 0, struct.pack("<I", 2))).version == 2


def test_small_arrays_of_numbers_are_kept_and_large_ones_passed_over(tmp_path: Path) -> None:
    keys = {"small": array(T.INT32, list(range(4096))), "large": array(T.INT32, list(range(4097)))}
    metadata = gguf_file.read(maker.write(tmp_path / "a.gguf", keys, {})).metadata
    assert metadata["small"] == tuple(range(4096))
    large = metadata["large"]
    assert isinstance(large, gguf_file.ArrayInfo)
    assert (large.type, large.length) == ("i32", 4097)


def test_strings_that_were_passed_over_can_be_read_one_by_one(tmp_path: Path) -> None:
    rng = random.Random(5)
    words = ["x" * rng.choice((0, 1, 7, 300, 70_000)) + str(i) for i in range(300)]
    path = maker.write(tmp_path / "a.gguf", {"words": array(T.STRING, words), "last": u32(7)}, {})
    read = gguf_file.read(path)
    assert path.stat().st_size > 3 << 20, "the words are to straddle the chunks' ends"
    assert read.metadata["last"] == 7
    assert [word.decode() for word in gguf_file.strings(read, "words")] == words


def test_a_vocabulary_of_real_size_is_read_and_checked_in_a_moment(tmp_path: Path) -> None:
    n = 151_936
    keys = {
        "tokenizer.ggml.tokens": array(T.STRING, [f"token{i}" for i in range(n)]),
        "tokenizer.ggml.token_type": array(T.INT32, [1] * n),
        "tokenizer.ggml.merges": array(T.STRING, [f"tok {i}" for i in range(151_387)]),
    }
    path = maker.write_text(tmp_path / "a.gguf", keys=keys, tensors={"token_embd.weight": ((maker.WIDTH, n), Q.Q8_0)})
    read = gguf_file.read(path)
    seconds = min(_timed(gguf_file.read, path) for _ in range(3))
    assert seconds < 0.3
    assert min(_timed(gguf_check.check_text_model, read) for _ in range(2)) < 0.6


def _timed(function: object, *given: object) -> float:
    start = time.perf_counter()
    function(*given)  # type: ignore[operator]
    return time.perf_counter() - start


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"", "empty"),
        (b"GG", "something else"),
        (b"PK\x03\x04" + bytes(60), "zip archive"),
        (b"\x80\x02}q\x00.", "pickle"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\n <html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git-LFS pointer"),
        (b"tjgg\x01\x00\x00\x00", "before GGUF"),
        (struct.pack("<Q", 20) + b'{"a":{"dtype":"F32"}', "safetensors"),
        (b'{"error": "not found"}', "JSON"),
        (b"GGUF\x00\x00\x00\x03" + bytes(16), "big-endian"),
        (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "version 1"),
        (struct.pack("<4sIQQ", b"GGUF", 4, 0, 0), "version 4"),
        (b"GGUF\x03\x00\x00\x00\x01", "ends inside"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path: Path, head: bytes, words: str) -> None:
    (tmp_path / "a.gguf").write_bytes(head)
    assert words in refusal(tmp_path / "a.gguf")


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "missing.gguf")
    assert "is a folder" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")
    with pytest.raises(ModelFileError, match="cannot be opened"):
        gguf_file.read("a\0b.gguf")


def test_a_file_cut_anywhere_is_refused(text: Path) -> None:
    whole = text.read_bytes()
    last = max(t.offset + t.size_bytes for t in gguf_file.read(text).tensors.values())
    for size in [*range(0, 2000, 7), *range(2000, last, 997), last - 1]:
        text.write_bytes(whole[:size])
        refusal(text)


def test_a_file_that_lacks_tensor_data_says_how_much(text: Path) -> None:
    size = text.stat().st_size
    os.truncate(text, size // 2)
    message = refusal(text)
    assert f"{size // 2:,} bytes" in message
    assert f"{size:,}" in message
    assert "download it again" in message


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (8, 1 << 60, "the number of tensors"),
        (8, (1 << 64) - 1, "the number of tensors"),
        (16, 1 << 40, "the number of metadata keys"),
        (24, 1 << 60, "the length of the name of metadata key 0"),
        (24, 0, "nameless"),
    ],
)
def test_impossible_counts_are_refused(text: Path, at: int, value: int, words: str) -> None:
    data = bytearray(text.read_bytes())
    data[at : at + 8] = struct.pack("<Q", value)
    text.write_bytes(data)
    assert words in refusal(text)


@pytest.mark.parametrize("key", ["general.name", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"])
def test_a_hostile_length_costs_neither_time_nor_memory(text: Path, key: str) -> None:
    skip = 4 if key == "general.name" else 8
    patch(text, key.encode(), skip, struct.pack("<Q", 1 << 60))
    tracemalloc.start()
    start = time.perf_counter()
    refusal(text)
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 1
    assert peak < 64 << 20


def test_a_string_inside_an_array_that_runs_past_the_file_is_refused(text: Path) -> None:
    for length in (1 << 20, 1 << 62, (1 << 64) - 1):
        patch(text, b"tokenizer.ggml.tokens", 16, struct.pack("<Q", length))
        assert "ends inside tokenizer.ggml.tokens" in refusal(text)


def test_metadata_beyond_what_memory_may_hold_is_refused(tmp_path: Path) -> None:
    head = struct.pack("<4sIQQ", b"GGUF", 3, 0, 40)
    value = b"\0" * (1 << 20)
    body = b"".join(struct.pack("<QBIQ", 1, 65 + i, 8, len(value)) + value for i in range(40))
    (tmp_path / "a.gguf").write_bytes(head + body)
    tracemalloc.start()
    assert "bytes of metadata" in refusal(tmp_path / "a.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


def test_text_that_is_not_utf8_is_refused(text: Path) -> None:
    assert "not UTF-8" in refusal(patch(text, b"general.name", 12, b"\xff"))


def test_unknown_and_nested_value_types_are_refused(text: Path) -> None:
    whole = text.read_bytes()
    assert "unknown type 13" in refusal(patch(text, b"general.name", 0, struct.pack("<I", 13)))
    text.write_bytes(whole)
    assert "array of arrays" in refusal(patch(text, b"tokenizer.ggml.tokens", 4, struct.pack("<I", 9)))
    text.write_bytes(whole)
    assert "unknown type 77" in refusal(patch(text, b"tokenizer.ggml.tokens", 4, struct.pack("<I", 77)))


def test_a_key_that_occurs_twice_is_refused(text: Path) -> None:
    patch(text, b"qwen3vl.attention.", 0, b"value_length")
    data = text.read_bytes().replace(b"qwen3vl.attention.key_length", b"qwen3vl.attention.head_count")
    text.write_bytes(data)
    assert "twice" in refusal(text)


@pytest.mark.parametrize(
    "alignment", [u32(0), u32(1), u32(8), u32(48), (T.UINT64, 32), (T.STRING, "32"), (T.BOOL, True)]
)
def test_an_alignment_that_llama_cpp_cannot_map_is_refused(tmp_path: Path, alignment: tuple[object, ...]) -> None:
    path = maker.write_text(tmp_path / "a.gguf", keys={"general.alignment": alignment})
    assert "general.alignment" in refusal(path)


def test_a_larger_alignment_is_kept(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "none")
    writer.add_custom_alignment(256)
    for name in "ab":
        writer.add_tensor(name, np.zeros(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = gguf_file.read(tmp_path / "a.gguf")
    assert read.alignment == 256
    assert [t.offset % 256 for t in read.tensors.values()] == [0, 0]


# A row of the tensor table: the name, then n_dims (4 bytes), the dimensions (8 each), the type (4), the offset (8).
@pytest.mark.parametrize(
    ("skip", "new", "words"),
    [
        (0, struct.pack("<I", 5), "5 dimensions"),
        (4, struct.pack("<Q", 0), "impossible shape"),
        (4, struct.pack("<QQ", 1 << 32, 1 << 31), "impossible shape"),
        (4, struct.pack("<QQ", 1 << 63, 1), "impossible shape"),
        (4, struct.pack("<QQ", 1 << 20, 1 << 20), "overlaps"),
        (20, struct.pack("<I", 4), "unknown type 4"),
        (20, struct.pack("<I", 43), "unknown type 43"),
        (20, struct.pack("<I", 12), "in Q4_K, which comes in 256s"),
        (24, struct.pack("<Q", 32), "leaves a gap"),
        (24, struct.pack("<Q", 1 << 60), "leaves a gap"),
        (24, struct.pack("<Q", 1), "leaves a gap"),
    ],
)
def test_a_damaged_row_of_the_tensor_table_is_refused(text: Path, skip: int, new: bytes, words: str) -> None:
    data = bytearray(text.read_bytes())
    at = data.index(b"token_embd.weight") + len("token_embd.weight") + skip
    data[at : at + len(new)] = new
    text.write_bytes(data)
    assert words in refusal(text)


def test_overlapping_tensors_are_refused(text: Path) -> None:
    patch(text, b"blk.1.ffn_norm.weight", 16, struct.pack("<Q", 0))
    assert "overlaps the tensor before it" in refusal(text)


def test_a_tensor_name_that_occurs_twice_or_is_too_long_is_refused(tmp_path: Path) -> None:
    path = maker.write(tmp_path / "a.gguf", {}, {"aa": ((1,), Q.F32), "ab": ((1,), Q.F32)})
    path.write_bytes(path.read_bytes().replace(b"ab", b"aa"))
    assert "has the tensor aa twice" in refusal(path)
    path = maker.write(tmp_path / "b.gguf", {}, {"a" * 64: ((1,), Q.F32)})
    assert "the name of tensor 0" in refusal(path)
    gguf_file.read(maker.write(tmp_path / "c.gguf", {}, {"a" * 63: ((1,), Q.F32)}))


def split(folder: Path, count: int = 3) -> list[Path]:
    """Write a model of several parts, one tensor in each."""
    paths = [folder / f"m{{0}}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
    for i, path in enumerate(paths):
        keys = {"split.no": (T.UINT16, i), "split.count": (T.UINT16, count), "split.tensors.count": (T.INT32, count)}
        maker.write(path, keys, {f"t{i}": ((8,), Q.F32)})
    return paths


def test_the_first_part_stands_for_all_parts(tmp_path: Path) -> None:
    paths = split(tmp_path)
    read = gguf_file.read(paths[0])
    assert read.parts == tuple(paths)
    assert {t.name: t.part for t in read.tensors.values()} == {"t0": 0, "t1": 1, "t2": 2}
    assert read.size_bytes == sum(path.stat().st_size for path in paths)


def test_a_model_with_a_bad_part_is_refused(tmp_path: Path) -> None:
    paths = split(tmp_path)
    whole = paths[1].read_bytes()
    assert "give the first" in refusal(paths[1])
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(ModelFileError, match="is not part 2 of 3"):
        gguf_file.read(paths[0])
    paths[1].write_bytes(whole.replace(b"t1", b"t0"))
    with pytest.raises(ModelFileError, match="t0 twice"):
        gguf_file.read(paths[0])
    paths[1].write_bytes(whole[:-32])
    with pytest.raises(ModelFileError, match="cut short"):
        gguf_file.read(paths[0])
    paths[1].unlink()
    with pytest.raises(ModelFileError, match="is not beside it"):
        gguf_file.read(paths[0])


def test_a_part_that_was_renamed_or_miscounted_is_refused(tmp_path: Path) -> None:
    keys = {"split.no": (T.UINT16, 0), "split.count": (T.UINT16, 2), "split.tensors.count": (T.INT32, 2)}
    assert "-00001-of-00002.gguf" in refusal(maker.write(tmp_path / "a.gguf", keys, {}))
    path = maker.write(tmp_path / "b.gguf", keys | {"split.count": (T.STRING, "2")}, {})
    assert "download all parts again" in refusal(path)
    paths = split(tmp_path)
    for path in paths:
        path.write_bytes(path.read_bytes().replace(struct.pack("<Ii", 5, 3), struct.pack("<Ii", 5, 9)))
    assert "3 tensors where 9 are due" in refusal(paths[0])


def test_two_thousand_random_damages_each_end_in_a_file_or_a_refusal(tmp_path: Path) -> None:
    rng = random.Random(20)
    path = tmp_path / "damaged.gguf"
    sound = [
        maker.write_text(tmp_path / "text.gguf").read_bytes(),
        maker.write_projector(tmp_path / "mmproj.gguf").read_bytes(),
    ]
    messages = []
    for _ in range(2000):
        path.write_bytes(_damage(rng, rng.choice(sound)))
        start = time.perf_counter()
        try:
            read = gguf_file.read(path)
            (gguf_check.check_projector if read.architecture == "clip" else gguf_check.check_text_model)(read)
        except ModelFileError as error:
            messages.append(str(error))
        assert time.perf_counter() - start < 1
    assert len(messages) > 1000
    assert not [message for message in messages if "\n" in message]


def _damage(rng: random.Random, sound: bytes) -> bytes:
    data = bytearray(sound)
    head = 5000
    kind = rng.randrange(4)
    if kind == 0:
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(head)] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[rng.randrange(len(data)) :]
    elif kind == 2:
        at = rng.randrange(head)
        data[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 255, 1 << 31, 1 << 32, 1 << 60, (1 << 64) - 1)))
    else:
        start, size, to = rng.randrange(head), rng.randrange(1, 64), rng.randrange(head)
        data[to : to + size] = data[start : start + size]
    return bytes(data)
