"""Reads the header, metadata and tensor table of a GGUF file, and refuses what is damaged.

Whatever the bytes are, reading ends in a `GgufFile` or a `ModelFileError`, within bounded time and memory,
and never touches tensor data. It knows nothing of native code, nor of what an architecture needs (see
`gguf_check`).

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; where llama.cpp's own reader
(ggml/src/gguf.cpp) is stricter than that page, this one is as strict.
"""

import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

from lookonce.errors import ModelFileError
from lookonce.gguf_cursor import Cursor, open_file

__all__ = ["ArrayInfo", "GgufFile", "TensorInfo", "Value", "plain_name", "read", "strings"]

Scalar: TypeAlias = "bool | int | float | str"

# Value types by number: GGUF's name and struct's letter; 8 is a string, 9 an array.
_NUMBERS = {
    0: ("u8", "B"),
    1: ("i8", "b"),
    2: ("u16", "H"),
    3: ("i16", "h"),
    4: ("u32", "I"),
    5: ("i32", "i"),
    6: ("f32", "f"),
    7: ("bool", "?"),
    10: ("u64", "Q"),
    11: ("i64", "q"),
    12: ("f64", "d"),
}
_STRING, _ARRAY = 8, 9

# Tensor types by number: name, elements a block, bytes a block (ggml.c). Written out because importing the
# gguf package takes longer than reading a file.
# fmt: off
_TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}
# fmt: on

# The largest real models have some 2,000 tensors.
_MAX_KEYS = 1 << 14
_MAX_TENSORS = 1 << 15
_MAX_STRING_BYTES = 16 << 20
_MAX_KEY_BYTES = (1 << 16) - 1
_MAX_NAME_BYTES = 63
_MAX_KEPT_ELEMENTS = 4096
_KEPT_BYTES_AN_ELEMENT = 32
_MAX_SPLITS = 999
# llama.cpp maps the file and asserts that the tensors start on such a boundary.
_MIN_ALIGNMENT = 32

_SPLIT_NAME = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One row of the tensor table.

    `shape` is in ggml's order, `ne[0]` (the row length) first. `offset` counts from the start of the file
    that holds the tensor, which is `GgufFile.parts[part]`.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    size_bytes: int
    part: int = 0


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """A metadata array that was passed over: strings, or more than 4,096 numbers.

    `type` is the elements' type as GGUF names it; `offset` is where the first one stands in the file.
    """

    type: str
    length: int
    offset: int


Value: TypeAlias = "Scalar | tuple[Scalar, ...] | ArrayInfo"


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The checked header of a GGUF file, or of all the parts of a split one.

    `size_bytes` covers all parts; `types` holds each key's type as GGUF names it (`u32`, `str`, `[i32]`). `statuses`
    are the parts' as they were opened, by which a later change is known (see `fingerprint`).
    """

    path: Path
    size_bytes: int
    version: int
    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]
    types: Mapping[str, str]
    alignment: int
    parts: tuple[Path, ...]
    statuses: tuple[os.stat_result, ...] = field(repr=False, compare=False)

    @property
    def architecture(self) -> str:
        """`general.architecture`, or the empty string."""
        value = self.metadata.get("general.architecture")
        return value if isinstance(value, str) else ""

    @property
    def name(self) -> str:
        """`general.name`, or the file's stem."""
        value = self.metadata.get("general.name")
        return value if isinstance(value, str) and value else self.path.stem


def plain_name(name: str) -> str:
    """A model's name as its makers agree on it: `Qwen3-VL 2B Instruct` and `qwen3vl-2b-instruct` are one."""
    return "".join(character for character in name.lower() if character.isalnum())


def read(path: str | Path) -> GgufFile:
    """Read and check the header of a GGUF file; the first part of a split one stands for all its parts.

    Raises:
        ModelFileError: the file is missing, is something else, is damaged or is cut short.
    """
    first = _read_part(Path(path))
    return first if first.metadata.get("split.count", 1) in (0, 1) else _join(first)


def strings(gguf: GgufFile, key: str) -> Iterator[bytes]:
    """Yield the elements of a string array, undecoded, from the file.

    Raises:
        ModelFileError: `key` is no string array, or the file has changed since it was read.
    """
    info = gguf.metadata.get(key)
    if not isinstance(info, ArrayInfo) or info.type != "str":
        raise ModelFileError(f"{gguf.path} has no array of strings {key}: convert the model again")
    with open_file(gguf.path) as file:
        cursor = Cursor(file, gguf.path)
        cursor.seek(info.offset)
        yield from cursor.strings(info.length, _MAX_STRING_BYTES, key)


def _read_part(path: Path) -> GgufFile:
    with open_file(path) as file:
        status = os.fstat(file.fileno())
        cursor = Cursor(file, path)
        version = _read_version(cursor)
        n_tensors = cursor.count(_MAX_TENSORS, "the number of tensors")
        n_keys = cursor.count(_MAX_KEYS, "the number of metadata keys")
        metadata: dict[str, Value] = {}
        types: dict[str, str] = {}
        for number in range(n_keys):
            key = cursor.string(_MAX_KEY_BYTES, f"the name of metadata key {number}")
            if not key or key in metadata:
                raise cursor.damaged(f"has the metadata key {key!r} twice" if key else "has a nameless key")
            types[key], metadata[key] = _read_value(cursor, key)
        alignment = _alignment(cursor, metadata, types)
        return GgufFile(
            path=path,
            size_bytes=cursor.size,
            version=version,
            metadata=MappingProxyType(metadata),
            tensors=MappingProxyType(_read_tensors(cursor, n_tensors, alignment)),
            types=MappingProxyType(types),
            alignment=alignment,
            parts=(path,),
            statuses=(status,),
        )


def _read_version(cursor: Cursor) -> int:
    head = cursor.take(min(cursor.size, 512), "the first bytes")
    if not head.startswith(b"GGUF"):
        what, remedy = _describe(head)
        raise ModelFileError(f"{cursor.path} is {what}, but a GGUF file was expected: {remedy}")
    cursor.seek(4)
    version = cursor.u32("the version")
    if version & 0xFFFF == 0:
        raise ModelFileError(f"{cursor.path} is a big-endian GGUF file: convert it with gguf-convert-endian")
    if version not in (2, 3):
        raise ModelFileError(
            f"{cursor.path} is GGUF version {version:,}, but only 2 and 3 are read: convert the model again"
        )
    return version


def _describe(head: bytes) -> tuple[str, str]:
    """Say what a file with another magic is, and what to do about it."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    again, convert = (
        "download it again",
        "convert it with llama.cpp's convert_hf_to_gguf.py or download a GGUF",
    )
    if not head:
        return "empty (0 bytes)", again
    if head.startswith(b"version https://git-lfs"):
        return "a git-LFS pointer, not the file that it points to", "fetch that with git lfs pull"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page", again
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive (perhaps a PyTorch .pt checkpoint)", convert
    if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return "a pickle (perhaps an old PyTorch checkpoint)", convert
    if head[:4] in (b"lmgg", b"fmgg", b"tjgg", b"algg"):
        return "a GGML file of the time before GGUF", again
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return "a safetensors file", convert
    if text.startswith(b"{"):
        return "a JSON text", again
    return f"something else (it starts with {head[:4]!r})", again


def _read_value(cursor: Cursor, key: str) -> tuple[str, Value]:
    """Return the value's type as GGUF names it, and the value."""
    kind = cursor.u32(key)
    if kind == _STRING:
        return "str", cursor.string(_MAX_STRING_BYTES, key)
    if kind in _NUMBERS:
        name, letter = _NUMBERS[kind]
        return name, _unpack(cursor, letter, 1, key)[0]
    if kind != _ARRAY:
        raise cursor.damaged(f"gives {key} the unknown type {kind:,}")
    kind, length = cursor.u32(key), cursor.u64(key)
    if kind == _ARRAY:
        raise cursor.damaged(f"has an array of arrays in {key}, which llama.cpp does not read")
    if kind != _STRING and kind not in _NUMBERS:
        raise cursor.damaged(f"gives the elements of {key} the unknown type {kind:,}")
    name, letter = _NUMBERS.get(kind, ("str", "Q"))
    size = length * struct.calcsize("<" + letter)
    if size > cursor.size - cursor.position:
        raise cursor.damaged(f"gives {key} {length:,} elements, more than {cursor.size:,} bytes can hold")
    offset = cursor.position
    if kind == _STRING:
        cursor.skip_strings(length, key)
    elif length <= _MAX_KEPT_ELEMENTS:
        cursor.keep(length * _KEPT_BYTES_AN_ELEMENT, key)
        return f"[{name}]", _unpack(cursor, letter, length, key)
    else:
        cursor.skip(size, key)
    return f"[{name}]", ArrayInfo(name, length, offset)


def _unpack(cursor: Cursor, letter: str, length: int, key: str) -> tuple[Scalar, ...]:
    layout = struct.Struct(f"<{length}{letter}")
    return layout.unpack(cursor.take(layout.size, key))


def _alignment(cursor: Cursor, metadata: Mapping[str, Value], types: Mapping[str, str]) -> int:
    value = metadata.get("general.alignment", _MIN_ALIGNMENT)
    kind = types.get("general.alignment", "u32")
    if not isinstance(value, int) or kind != "u32" or value < _MIN_ALIGNMENT or value & (value - 1):
        raise cursor.damaged(
            f"gives general.alignment as {value!r} ({kind}), not a power of two (u32) from {_MIN_ALIGNMENT}"
        )
    return value


def _read_tensors(cursor: Cursor, n_tensors: int, alignment: int) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    end = 0
    for number in range(n_tensors):
        name = cursor.string(_MAX_NAME_BYTES, f"the name of tensor {number}")
        if name in tensors:
            raise cursor.damaged(f"has the tensor {name} twice")
        shape, kind, size = _read_shape(cursor, name)
        offset = cursor.u64(name)
        due = -(-end // alignment) * alignment
        if offset != due:
            # llama.cpp takes no gaps either: each tensor follows the one before it.
            what = "overlaps the tensor before it" if offset < due else "leaves a gap before it"
            raise cursor.damaged(f"places the tensor {name} at {offset:,} where {due:,} is due: it {what}")
        tensors[name] = TensorInfo(name, shape, kind, offset, size)
        end = offset + size
    data = -(-cursor.position // alignment) * alignment
    if tensors and data + end > cursor.size:
        raise ModelFileError(
            f"{cursor.path} has {cursor.size:,} bytes, but its tensors need {data + end:,}: "
            "it is cut short, download it again"
        )
    return {name: replace(info, offset=data + info.offset) for name, info in tensors.items()}


def _read_shape(cursor: Cursor, name: str) -> tuple[tuple[int, ...], str, int]:
    """Return a tensor's shape, its type's name and its size in bytes."""
    n_dims = cursor.u32(name)
    if n_dims > 4:
        raise cursor.damaged(f"gives the tensor {name} {n_dims:,} dimensions, more than 4")
    shape: tuple[int, ...] = struct.unpack(f"<{n_dims}Q", cursor.take(8 * n_dims, name))
    elements = 1
    for n in shape:
        elements *= n
    number = cursor.u32(name)
    if number not in _TENSOR_TYPES:
        raise cursor.damaged(f"gives the tensor {name} the unknown type {number:,}")
    kind, block, block_bytes = _TENSOR_TYPES[number]
    row = shape[0] if shape else 1
    if row % block:
        raise cursor.damaged(f"gives the tensor {name} rows of {row:,} in {kind}, which comes in {block}s")
    size = elements // block * block_bytes
    if not 0 < elements < 1 << 63 or size >= 1 << 63:
        raise cursor.damaged(f"gives the tensor {name} the impossible shape {shape}")
    return shape, kind, size


def _siblings(path: Path, count: int) -> list[Path]:
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count or not 1 <= count <= _MAX_SPLITS:
        raise ModelFileError(
            f"{path} is one of {count:,} parts, so its name must end in -00001-of-{count:05}.gguf: "
            "give it back its original name"
        )
    prefix = match["prefix"]
    return [path.with_name(f"{prefix}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]


def _join(first: GgufFile) -> GgufFile:
    """Read the other parts of a split model and unite their tensor tables."""
    keys = ("split.count", "split.no", "split.tensors.count")
    count, number, total = (first.metadata.get(key) for key in keys)
    types = [first.types.get(key) for key in keys]
    if types != ["u16", "u16", "i32"] or not isinstance(count, int) or not isinstance(number, int):
        raise ModelFileError(
            f"{first.path} has {count!r}, {number!r} and {total!r} as {', '.join(keys)}, "
            "not two u16 and one i32: download all parts again"
        )
    paths = _siblings(first.path, count)
    if number != 0:
        raise ModelFileError(f"{first.path} is part {number + 1} of {count}: give the first, {paths[0].name}")
    if lacking := [path.name for path in paths[1:] if not path.exists()]:
        named = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
        raise ModelFileError(
            f"{first.path} is the first of {count} parts, and {named} is not beside it: "
            "download all parts into one folder"
        )
    tensors = dict(first.tensors)
    size = first.size_bytes
    statuses = first.statuses
    for index, path in enumerate(paths[1:], start=1):
        part = _read_part(path)
        if part.metadata.get("split.no") != index or part.types["split.no"] != "u16":
            raise ModelFileError(f"{path} is not part {index + 1} of {count}: download all parts again")
        if twice := tensors.keys() & part.tensors.keys():
            raise ModelFileError(f"{path} has the tensor {min(twice)} twice: download all parts again")
        tensors |= {name: replace(info, part=index) for name, info in part.tensors.items()}
        size += part.size_bytes
        statuses += part.statuses
    if len(tensors) != total:
        raise ModelFileError(
            f"{first.path} and its other parts have {len(tensors)} tensors where {total} are due: "
            "download all parts again"
        )
    united = MappingProxyType(tensors)
    return replace(first, size_bytes=size, tensors=united, parts=tuple(paths), statuses=statuses)
