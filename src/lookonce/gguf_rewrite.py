"""Writes a GGUF file anew: its metadata with some values replaced or added, some of its tensors, in chosen types.

Metadata that stay are copied byte for byte, in their order. Tensors are read, turned and written a slice at a time.
"""

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Final

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GgmlType
from numpy.typing import NDArray

from lookonce.errors import InputError, ModelFileError
from lookonce.gguf_cursor import open_file
from lookonce.gguf_file import GgufFile, TensorInfo
from lookonce.gguf_type import CHUNK_VALUES, decode, encode

__all__ = ["NewTensor", "booleans", "rewrite", "size_bytes", "text", "u32"]

_VERSION: Final = 3
_LARGEST_F16: Final = 65504.0
_U32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9  # value types, gguf.md


@dataclass(frozen=True, slots=True)
class NewTensor:
    """One tensor of the file to be written: what it is made from, its name there and its type."""

    source: TensorInfo
    name: str
    type: GgmlType

    @property
    def n_bytes(self) -> int:
        """Bytes that it takes."""
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.source.shape) // int(block) * int(block_bytes)


def u32(value: int) -> bytes:
    """A number as a metadata value."""
    return struct.pack("<II", _U32, value)


def text(value: str) -> bytes:
    """A text as a metadata value."""
    data = value.encode()
    return struct.pack("<IQ", _STRING, len(data)) + data


def booleans(values: Sequence[bool]) -> bytes:
    """A list of truths as a metadata value."""
    return struct.pack(f"<IIQ{len(values)}?", _ARRAY, _BOOL, len(values), *values)


def size_bytes(source: GgufFile, tensors: Sequence[NewTensor]) -> int:
    """About how large the new file will be: its data, and its head as large as the source's."""
    head = min(info.offset for info in source.tensors.values())
    return head + sum(tensor.n_bytes + source.alignment for tensor in tensors)


def rewrite(
    source: GgufFile,
    target: BinaryIO,
    values: Mapping[str, bytes],
    tensors: Sequence[NewTensor],
    advance: Callable[[int], object] = lambda _: None,
) -> None:
    """Write a new file to `target`.

    values: metadata by key, as the functions here give them; those that the source has not are added at the end.
    advance: told the bytes of tensors as they are written.

    Raises InputError where a value does not fit its new type, ModelFileError where the source cannot be read, OSError
    where the target cannot be written.
    """
    entries = _entries(source, values)
    head = b"GGUF" + struct.pack("<IQQ", _VERSION, len(tensors), len(entries)) + b"".join(entries)
    offset = 0
    for tensor in tensors:
        name, shape = tensor.name.encode(), tensor.source.shape
        head += struct.pack("<Q", len(name)) + name
        head += struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, tensor.type.value, offset)
        offset += _padded(tensor.n_bytes, source.alignment)
    target.write(head.ljust(_padded(len(head), source.alignment), b"\0"))
    for tensor in tensors:
        for piece in _pieces(source, tensor):
            target.write(piece.data)
            advance(piece.nbytes)
        target.write(bytes(_padded(tensor.n_bytes, source.alignment) - tensor.n_bytes))


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _entries(source: GgufFile, values: Mapping[str, bytes]) -> list[bytes]:
    """Every key with its value, as bytes of the file."""
    fields = {
        key: b"".join(part.tobytes() for part in field.parts)
        for key, field in gguf.GGUFReader(source.path).fields.items()
        if not key.startswith("GGUF.")  # which the reader makes of the file's first numbers
    }
    for key, value in values.items():
        name = key.encode()
        fields[key] = struct.pack("<Q", len(name)) + name + value
    return list(fields.values())


def _pieces(source: GgufFile, tensor: NewTensor) -> Iterator[NDArray[np.uint8]]:
    """The tensor's bytes in its new type, slice by slice."""
    info = tensor.source
    row = info.shape[0]
    n_rows = math.prod(info.shape) // row
    row_bytes = info.size_bytes // n_rows
    step = max(1, CHUNK_VALUES // row)
    kind = GgmlType[info.type]
    with open_file(source.parts[info.part]) as file:
        file.seek(info.offset)
        for start in range(0, n_rows, step):
            count = min(step, n_rows - start)
            data = np.frombuffer(_read(source, file, count * row_bytes), dtype=np.uint8).reshape(count, row_bytes)
            if kind is tensor.type:
                yield data.reshape(-1)
                continue
            try:
                decoded = decode(data, kind)
            except NotImplementedError as error:
                raise InputError(
                    f"{source.path} has {info.name} in {info.type}, which cannot be read here: retype the F16, BF16 "
                    "or Q8_0 file of the model"
                ) from error
            _check_range(source, tensor, decoded)
            yield encode(decoded, tensor.type)


def _read(source: GgufFile, file: BinaryIO, count: int) -> bytes:
    try:
        data = file.read(count)
        while data and len(data) < count and (more := file.read(count - len(data))):
            data += more
    except OSError as error:
        raise ModelFileError(f"{source.path} cannot be read ({error}): check the disk") from error
    if len(data) != count:
        raise ModelFileError(f"{source.path} was changed while it was read: do it again")
    return data


def _check_range(source: GgufFile, tensor: NewTensor, values: NDArray[np.float32]) -> None:
    largest = float(np.abs(values).max())
    if not math.isfinite(largest):
        raise ModelFileError(
            f"{source.path} has values in {tensor.source.name} that are not finite: download it, or convert it, again"
        )
    # The scale of a block of 32 in Q8_0 is an F16 too: 127 times as far.
    if largest > {GgmlType.F16: _LARGEST_F16, GgmlType.Q8_0: 127 * _LARGEST_F16}.get(tensor.type, math.inf):
        raise InputError(
            f"{source.path} has values to {largest:.3g} in {tensor.source.name}, beyond what {tensor.type.name} holds: "
            "choose BF16"
        )
