"""Typed access to a GGUF header: each value and tensor is as it should be, or a `ModelFileError` says so.

It knows nothing of any architecture (see `gguf_check` and `gguf_qwen`).
"""

import math
from collections.abc import Collection

from lookonce.errors import ModelFileError
from lookonce.gguf_file import ArrayInfo, GgufFile

__all__ = ["array_length", "integer", "numbers", "optional", "positive", "require", "wrong"]

# The types that exist only inside a computation: ggml-cpu has no vec_dot for them and calls a null pointer.
_NO_WEIGHTS = frozenset({"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"})


def wrong(gguf: GgufFile, what: str) -> ModelFileError:
    """Return the error that says what a file is or has."""
    return ModelFileError(f"{gguf.path} {what}: download it, or convert the model, again")


def integer(gguf: GgufFile, key: str, low: int, high: int, default: int | None = None) -> int:
    """Return a u32, as llama.cpp reads all its counts."""
    value = gguf.metadata.get(key, default)
    if value is None:
        raise wrong(gguf, f"has no {key}")
    kind = gguf.types.get(key, "u32")
    if not isinstance(value, int) or kind != "u32":
        raise wrong(gguf, f"has {key} as {kind}, not u32")
    if not low <= value <= high:
        raise wrong(gguf, f"has {value:,} as {key}, not {f'{low:,} to {high:,}' if low < high else f'{low:,}'}")
    return value


def positive(gguf: GgufFile, key: str, default: float | None = None) -> None:
    """Require a finite f32 above zero: rms_norm and norm assert it of their epsilon."""
    value = gguf.metadata.get(key, default)
    if value is None:
        raise wrong(gguf, f"has no {key}")
    if not isinstance(value, float) or gguf.types.get(key, "f32") != "f32" or not 0 < value < math.inf:
        raise wrong(gguf, f"has {value!r} as {key}, not an f32 above 0")


def numbers(gguf: GgufFile, key: str, length: int, kinds: Collection[str]) -> tuple[float, ...]:
    """Return an array of numbers, of this length and of one of these types."""
    values = gguf.metadata.get(key)
    if not isinstance(values, tuple) or len(values) != length or gguf.types[key] not in kinds:
        raise wrong(gguf, f"has {values!r} as {key}, not {length} numbers ({' or '.join(kinds)})")
    return tuple(float(value) for value in values)


def array_length(gguf: GgufFile, key: str, kinds: Collection[str], length: int | None) -> int:
    """Return an array's length after checking its type and, if given, its length."""
    value, kind = gguf.metadata.get(key), gguf.types.get(key)
    if kind not in kinds or not isinstance(value, tuple | ArrayInfo):
        raise wrong(gguf, f"has {kind or 'nothing'} as {key}, not {' or '.join(kinds)}")
    n = value.length if isinstance(value, ArrayInfo) else len(value)
    if length is not None and n != length:
        raise wrong(gguf, f"has {n:,} entries in {key} for {length:,} tokens")
    return n


def require(gguf: GgufFile, name: str, *shape: int, types: Collection[str] = ()) -> None:
    """Require a tensor of this shape, of one of `types` if given.

    Otherwise one of a single dimension is to be F32 (ggml adds and multiplies rows in nothing else), any
    other of a type that ggml can multiply by.
    """
    info = gguf.tensors.get(name)
    if info is None:
        raise wrong(gguf, f"lacks the tensor {name}")
    if info.shape + (1,) * (4 - len(info.shape)) != shape + (1,) * (4 - len(shape)):
        raise wrong(gguf, f"has {name} in the shape {info.shape}, not {shape}")
    due = types or (("F32",) if len(shape) == 1 else ())
    if (due and info.type not in due) or info.type in _NO_WEIGHTS:
        raise wrong(gguf, f"has {name} in {info.type}, not {' or '.join(due) or 'a type for weights'}")


def optional(gguf: GgufFile, name: str, *shape: int) -> None:
    """Require a tensor of this shape if it is there at all."""
    if name in gguf.tensors:
        require(gguf, name, *shape)
