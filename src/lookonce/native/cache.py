"""What a sequence of the KV cache holds, as bytes: read out of one context, written into another of the same making.

The bytes are llama.cpp's own and are believed by it, so whoever writes them vouches for every one: the store and the
saved chats verify a checksum first, and that the bytes were read from a context made as this one.
"""

import ctypes
from typing import Final

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


_HEAD_WORDS: Final = 4  # magic, sequence, number of streams, number of cells


def holds(state: State, positions: NDArray[np.int32], *, mrope: bool) -> bool:
    """Whether a state of one sequence is for cells at exactly these positions, in any order.

    For states that a stranger may have written. A cell is its position, the number of its sequences, with M-RoPE the
    place in its picture and the token, and the sequences (llama-kv-cache.cpp, state_write_meta). The sizes of what
    follows are checked by the native library, which believes the cells.
    """
    width = 6 if mrope else 3
    words = state[: 4 * (_HEAD_WORDS + width * len(positions))]
    if len(words) != 4 * (_HEAD_WORDS + width * len(positions)):
        return False
    numbers = np.frombuffer(words.tobytes(), dtype="<i4")
    cells = numbers[_HEAD_WORDS:].reshape(-1, width)
    return (
        (int(numbers[2]), int(numbers[3])) == (1, len(positions))
        and bool((cells[:, 1] == 1).all())
        and np.array_equal(np.sort(cells[:, 0]), np.sort(positions))
    )


def _address(state: State) -> "ctypes._Pointer[ctypes.c_uint8]":
    return state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
