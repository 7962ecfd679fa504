"""The safetensors container: named arrays and texts as bytes, and back without a copy.

Knows nothing about looks. The format (https://huggingface.co/docs/safetensors) is a little-endian 64-bit
header length, a JSON header, and the tensors' bytes. It is read here, not by the safetensors library, because
that one wants a whole file or a copy, and writes the metadata in no fixed order.
"""

import json
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lookonce.errors import SavedLookError

__all__ = ["DTYPE_NAMES", "MAX_HEADER_BYTES", "Array", "array_bytes", "compact_json", "head", "pack", "unpack"]

MAX_HEADER_BYTES = 1 << 20

Array: TypeAlias = NDArray[Any]

DTYPE_NAMES: dict[np.dtype[Any], str] = {
    np.dtype(np.float16): "F16",
    np.dtype(np.float32): "F32",
    np.dtype(np.int32): "I32",
    np.dtype(np.uint8): "U8",
}
_DTYPES = {name: dtype.newbyteorder("<") for dtype, name in DTYPE_NAMES.items()}
_MAX_NUMBER = 1 << 48

_Place: TypeAlias = tuple["np.dtype[Any]", tuple[int, ...], int, int]


def compact_json(value: object) -> str:
    """Give JSON with no blanks and no escapes that could be spelt otherwise."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def array_bytes(array: Array) -> bytes | memoryview:
    """Give a contiguous array's little-endian bytes, without a copy on a little-endian machine."""
    return array.astype(array.dtype.newbyteorder("<"), copy=False).data.cast("B")


def pack(metadata: Mapping[str, str], tensors: Mapping[str, Array]) -> bytes:
    """Give the file; equal contents give equal bytes."""
    return b"".join([head(metadata, tensors), *map(array_bytes, tensors.values())])


def head(metadata: Mapping[str, str], tensors: Mapping[str, Array]) -> bytes:
    """Give the beginning of the file, after which the tensors' bytes follow in order."""
    layout: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, tensor in tensors.items():
        offsets = [start, start + tensor.nbytes]
        layout[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        start += tensor.nbytes
    header = compact_json(layout).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > MAX_HEADER_BYTES:
        raise SavedLookError(
            f"the look's text and names take {len(header):,} bytes, and a saved look holds at most "
            f"{MAX_HEADER_BYTES:,}: shorten the text saved beside it"
        )
    return len(header).to_bytes(8, "little") + header


def unpack(
    data: bytes | memoryview,
    names: Iterable[str] | None,
    *,
    name: str,
    what: str = "saved look",
    certain: bool = False,
    total_bytes: int | None = None,
) -> tuple[dict[str, str], dict[str, Array]]:
    """Give the metadata and exactly the tensors called `names` (None: all), which share the memory of `data`.

    All are matrices. With `total_bytes`, `data` is the beginning of so long a file, and no arrays are made. Raises
    `SavedLookError`, calling the file `name` and its kind `what`, unless every byte of it is accounted for; `certain`
    says that it is of that kind, or was.
    """
    begin = f"{name} is a {what}, but" if certain else f"{name} is not a {what}, or"
    total = len(data) if total_bytes is None else total_bytes
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, total - 8):
        raise SavedLookError(f"{begin} is cut short")
    try:
        metadata, places = _read_header(bytes(data[8 : 8 + length]), names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SavedLookError(f"{begin} its header is damaged") from error
    order = sorted(places.values(), key=lambda place: place[2])
    end = order[-1][3]
    if order[0][2] != 0 or any(first[3] != second[2] for first, second in pairwise(order)):
        raise SavedLookError(f"{name} is damaged: its tensors do not follow one another")
    if 8 + length + end != total:
        raise SavedLookError(f"{name} is {total} bytes long, expected {8 + length + end}: it is damaged")
    if total_bytes is not None:
        return metadata, {}
    body = memoryview(data)[8 + length :]
    return metadata, {
        tensor: np.frombuffer(body[start:stop], dtype=dtype).reshape(shape)
        for tensor, (dtype, shape, start, stop) in places.items()
    }


def _read_header(raw: bytes, names: Iterable[str] | None) -> tuple[dict[str, str], dict[str, _Place]]:
    # Control characters are white space to JSON, so a changed blank could pass unseen.
    if min(raw) < 0x20:
        raise ValueError("control characters")
    header = json.loads(raw.decode())
    metadata = header.pop("__metadata__")
    places = {name: _read_place(header.pop(name)) for name in (list(header) if names is None else names)}
    if not places:
        raise ValueError("no contents")
    if header or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("other contents")
    return metadata, places


def _read_place(entry: Mapping[str, Any]) -> _Place:
    dtype, shape, (start, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    numbers = (*shape, start, end)
    if len(shape) != 2 or not all(type(number) is int and 0 <= number < _MAX_NUMBER for number in numbers):
        raise ValueError("not a matrix")
    if shape[0] * shape[1] * dtype.itemsize != end - start:
        raise ValueError("not its size")
    return dtype, tuple(shape), start, end
