"""Hidden states of many sequences at once, out of a graph that stops at the wanted layer.

The language-model head is never computed: after the wanted tensor the evaluation callback ends the graph.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from lookonce.errors import InputError, NativeError
from lookonce.native.capture import Capture
from lookonce.native.text import Context, ContextOptions, TextModel

FINAL_STATE: Final = "result_norm"  # after the last layer and the final norm


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of one sequence in a batch: where they start in it and which of them are wanted."""

    sequence: int
    position: int
    tokens: tuple[int, ...]
    wanted: tuple[bool, ...]


def layer_tensor(model: TextModel, layer: int) -> tuple[int, str]:
    """The layer's number from 0, and the name of the tensor that holds its output.

    `layer` -1 is the last, whose output is taken after the final norm; a middle one's after DeepStack is added, as
    transformers' `hidden_states` are. Raises InputError for a layer that the model lacks.
    """
    n_layers = model.n_layers
    if isinstance(layer, bool) or not isinstance(layer, int) or not -n_layers <= layer < n_layers:
        raise InputError(f"layer is {layer!r}: {model.path.name} has layers 0 to {n_layers - 1}, or -1 to {-n_layers}")
    number = layer % n_layers
    if number == n_layers - 1:
        return number, FINAL_STATE
    n_deepstack = model.input_width // model.width - 1
    return number, f"deepstack_out-{number}" if number < n_deepstack else f"l_out-{number}"
