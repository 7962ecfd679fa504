"""libllama's own quantizer: one text model file in, a smaller one out."""

import ctypes
import os
from pathlib import Path

import llama_cpp.llama_cpp as llama

from lookonce.errors import NativeError
from lookonce.native.library import listen

__all__ = ["quantize"]


def quantize(source: Path, target: Path) -> None:
    """Write `source` to `target` as Q4_K_M. Raises NativeError where that fails, as on a full disk."""
    params = llama.llama_model_quantize_default_params()
    params.ftype = llama.LLAMA_FTYPE_MOSTLY_Q4_K_M
    params.allow_requantize = True
    with listen() as log:
        status = llama.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params))
    if status:
        raise NativeError(f"{source} could not be quantized (status {status}); is the disk full?", log.tail())
