"""The types that tensors are written in: which one llama.cpp's converter gives a tensor, and values as their bytes.

Knows nothing of files. Source: llama.cpp's conversion/{base,qwenvl,qwen3vl}.py.
"""

from typing import Final

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GgmlType
from numpy.typing import NDArray

__all__ = ["CHUNK_VALUES", "FILE_TYPES", "converter_type", "decode", "encode"]

FILE_TYPES: Final = {
    "F32": (gguf.LlamaFileType.ALL_F32, GgmlType.F32),
    "F16": (gguf.LlamaFileType.MOSTLY_F16, GgmlType.F16),
    "BF16": (gguf.LlamaFileType.MOSTLY_BF16, GgmlType.BF16),
    "Q8_0": (gguf.LlamaFileType.MOSTLY_Q8_0, GgmlType.Q8_0),
}
CHUNK_VALUES: Final = 1 << 24  # quantizing needs many times the memory of what is quantized at once


def converter_type(name: str, n_dims: int, row: int, type: str) -> GgmlType:
    """Give the type that the converter chooses in a file of `type` for a tensor whose rows are `row` long.

    What cannot be or must not be small stays F32 or F16.
    """
    if "patch_embd.weight" in name:
        return GgmlType.F16 if type == "F16" else GgmlType.F32
    if n_dims == 1 or "position_embd" in name:
        return GgmlType.F32
    wanted = FILE_TYPES[type][1]
    return wanted if row % gguf.GGML_QUANT_SIZES[wanted][0] == 0 else GgmlType.F16


def encode(values: NDArray[np.float32], kind: GgmlType) -> NDArray[np.uint8]:
    """Turn values, (..., row), into the bytes of a type, a slice at a time."""
    if kind is GgmlType.F32:
        return np.ascontiguousarray(values).view(np.uint8).reshape(-1)
    flat = values.reshape(-1, values.shape[-1])
    step = max(1, CHUNK_VALUES // flat.shape[1])
    parts = [gguf.quants.quantize(flat[at : at + step], kind) for at in range(0, len(flat), step)]
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8).reshape(-1) for part in parts])


def decode(data: NDArray[np.uint8], kind: GgmlType) -> NDArray[np.float32]:
    """Turn the bytes of whole rows, (rows, bytes of a row), into values.

    Raises NotImplementedError for a type that the gguf package does not read.
    """
    return np.asarray(gguf.quants.dequantize(data, kind), dtype=np.float32)
