"""Copies named tensors out of a running graph, through ggml's evaluation callback.

Names are llama.cpp's own: `l_out-N` is what layer N of a text model gives (before DeepStack is added, `deepstack_out-N`
after), `result_norm` the final hidden state; in a vision graph `layer_out-N` and `ffn_out-N`. Asking for a tensor
splits the graph at that place, so a context with a capture is slower than one without.
"""

import ctypes
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from lookonce.native.library import read_tensor, tensor_name


class Capture:
    """Keeps a copy of every evaluation of the tensors in `names`.

    Give it to one context or one vision tower; `values[name]` then grows by one array, F32 in ggml's shape reversed
    (tokens, width), with each evaluated batch. `clear()` empties it. With `stop_after` nothing of the graph is
    computed after that tensor.
    """

    def __init__(self, names: Collection[str], *, stop_after: str | None = None) -> None:
        self._names = frozenset(names)
        self._stop_after = stop_after
        self.values: dict[str, list[NDArray[np.float32]]] = defaultdict(list)
        self._pending: BaseException | None = None
        self.callback = llama.ggml_backend_sched_eval_callback(self._on_tensor)

    def _on_tensor(self, tensor: int, ask: bool, _user_data: ctypes.c_void_p) -> bool:
        # ctypes prints and drops an exception raised here: it is kept, and raised after the native call.
        try:
            name = tensor_name(tensor)
            if ask:
                return name in self._names
            if name in self._names:
                self.values[name].append(read_tensor(tensor))
                return name != self._stop_after
        except BaseException as error:  # noqa: BLE001  nothing may raise here, Ctrl-C included
            self._pending = error
            return False
        return True

    @contextmanager
    def watch(self, names: Collection[str]) -> Iterator[None]:
        """Copy other tensors while the block runs."""
        before, self._names = self._names, frozenset(names)
        try:
            yield
        finally:
            self._names = before

    def raise_pending(self) -> None:
        """Raise what went wrong inside the callback, if anything did."""
        error, self._pending = self._pending, None
        if error is not None:
            raise error

    def clear(self) -> None:
        """Forget the copies made so far."""
        self.values.clear()
