"""What a sequence of the KV cache holds, as bytes: read out of one context, written into another of the same making.

The bytes are llama.cpp's own and are believed by it, so whoever writes them vouches for every one: the store and the
saved chats verify a checksum first, and that the bytes were read from a context made as this one.
"""

import ctypes

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from lookonce.errors import InputError, NativeError
from lookonce.native.library import listen
from lookonce.native.text import Context

State = NDArray[np.uint8]


def state_size(context: Context, sequence: int) -> int:
    """How many bytes `read_state` will fill."""
    size = int(llama.llama_state_seq_get_size(context.handle, context.checked_sequence(sequence)))
    if not size:
        raise NativeError(f"the state of sequence {sequence} cannot be read: this kind of model has none")
    return size


def read_state(context: Context, sequence: int, target: State) -> None:
    """Copy what a sequence holds into `target`, contiguous bytes of `state_size`.

    Raises NativeError where the native library cannot, InputError for another length.
    """
    size = state_size(context, sequence)
    if target.shape != (size,):
        raise InputError(f"the room for a state is {target.shape}: expected ({size},)")
    with listen() as log:
        written = llama.llama_state_seq_get_data(context.handle, _address(target), size, sequence)
    if written != size:
        raise NativeError(f"{written} of {size} bytes of a state were read", log.tail())


def write_state(context: Context, sequence: int, state: State, *, last: int) -> None:
    """Let a sequence hold what `read_state` gave, and nothing else; `last` is the highest position in it.

    Raises NativeError where the native library refuses it, or where it holds something else afterwards; the sequence
    is then empty.
    """
    context.forget(context.checked_sequence(sequence))
    with listen() as log:
        taken = llama.llama_state_seq_set_data(context.handle, _address(state), len(state), sequence)
    if taken == len(state) and span(context, sequence) == (0, last):
        return
    context.forget(sequence)
    raise NativeError(f"a state of {len(state)} bytes was not taken up ({taken})", log.tail())


def span(context: Context, sequence: int) -> tuple[int, int]:
    """The lowest and the highest position that a sequence holds; (-1, -1) where it is empty."""
    memory = llama.llama_get_memory(context.handle)
    number = context.checked_sequence(sequence)
    return int(llama.llama_memory_seq_pos_min(memory, number)), int(llama.llama_memory_seq_pos_max(memory, number))


def _address(state: State) -> "ctypes._Pointer[ctypes.c_uint8]":
    return state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
