"""Hidden states of many sequences at once, out of a graph that stops at the wanted layer.

The language-model head is never computed: after the wanted tensor the evaluation callback ends the graph.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from lookonce.errors import InputError, NativeError
from lookonce.native.capture import Capture
from lookonce.native.text import Context, ContextOptions, TextModel

FINAL_STATE: Final = "result_norm"  # after the last layer and the final norm


def layer_tensor(model: TextModel, layer: int) -> tuple[int, str]:
    """The layer's number from 0, and the name of the tensor that holds its output.

    `layer` -1 is the last, whose output is taken after the final norm; a middle one's before DeepStack is added: both
    as transformers' `hidden_states` have them. Raises InputError for a layer that the model lacks.
    """
    n_layers = model.n_layers
    if isinstance(layer, bool) or not isinstance(layer, int) or not -n_layers <= layer < n_layers:
        raise InputError(f"layer is {layer!r}: {model.path.name} has layers 0 to {n_layers - 1}, or -1 to {-n_layers}")
    number = layer % n_layers
    return number, FINAL_STATE if number == n_layers - 1 else f"l_out-{number}"


class HiddenContext:
    """A context that gives one layer's hidden states, F32 (n, width), instead of logits."""

    def __init__(self, model: TextModel, options: ContextOptions, layer: int) -> None:
        _, self._tensor = layer_tensor(model, layer)
        self._capture = Capture({self._tensor}, stop_after=self._tensor)
        self._context = Context(model, options, self._capture)
        self._model = model
        self.options = options

    def evaluate_tokens(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        sequences: NDArray[np.int32],
        wanted: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        """Evaluate tokens of one or several sequences; give the states of the wanted ones, in the batch's order."""
        self._capture.clear()
        self._context.decode_many(tokens, positions, sequences, wanted & self._drops_rows)
        return self._states(wanted)

    def evaluate_rows(
        self,
        rows: NDArray[np.float32],
        positions: NDArray[np.int32],
        sequence: int,
        wanted: NDArray[np.bool_],
        *,
        causal: bool,
    ) -> NDArray[np.float32]:
        """Evaluate image rows, (n, input width) at absolute (t, y, x); give the states of the wanted ones."""
        self._capture.clear()
        kept = wanted & self._drops_rows
        self._context.decode_rows(rows, positions, sequence=sequence, causal=causal, outputs=kept)
        return self._states(wanted)

    @property
    def _drops_rows(self) -> bool:
        # After the last layer's attention llama.cpp goes on with the flagged rows alone; a middle layer has all.
        return self._tensor == FINAL_STATE

    def _states(self, wanted: NDArray[np.bool_]) -> NDArray[np.float32]:
        width = self._model.width
        if not wanted.any():
            return np.empty((0, width), dtype=np.float32)
        captured = self._capture.values[self._tensor]
        if not captured:
            raise NativeError(
                f"llama.cpp shows no {self._tensor} of {self._model.path.name}: its architecture gives no hidden states"
            )
        states = captured[-1].reshape(-1, width)
        if len(states) != (np.count_nonzero(wanted) if self._drops_rows else len(wanted)):
            raise NativeError(f"llama.cpp gave {len(states)} states of {self._tensor} for {len(wanted)} tokens or rows")
        return states if self._drops_rows else states[wanted]

    def copy(self, source: int, target: int) -> None:
        """Let sequence `target` hold all that `source` holds."""
        self._context.copy(source, target)

    def forget(self, sequence: int) -> None:
        """Empty a sequence."""
        self._context.forget(sequence)

    def close(self) -> None:
        """Free the context; may be called twice."""
        self._context.close()
