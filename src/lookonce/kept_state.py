"""States that left the context and are still in memory: read out before their cells went to another prompt.

Knows nothing of native code or the store.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from lookonce.held import START, Held, Mark
from lookonce.prompt import Unit

MEMORY_LIMIT_BYTES: Final = 512 << 20

Origin = Literal["evaluated", "memory", "store", "file"]
"""Where the beginning of a prompt came from; `evaluated` where nothing of it was kept."""


@dataclass(slots=True, eq=False)
class KeptState:
    """What a sequence held, its bytes, and the highest position in them."""

    held: Held
    state: NDArray[np.uint8]
    last: int
    origin: Origin = "memory"


class KeptStates:
    """At most `limit_bytes` of states and `limit_cells` in them; the least recently used go first.

    The caller holds the model's lock.

    They are kept as bytes, not in cells: what lies before a prompt's cells in the cache, even of another sequence,
    decides how the sums over them are rounded, so a conversation would depend on others that the context also holds.
    """

    def __init__(self, limit_cells: int, limit_bytes: int = MEMORY_LIMIT_BYTES) -> None:
        self.limit_cells: Final = limit_cells
        self.limit_bytes: Final = limit_bytes
        self._states: list[KeptState] = []  # the one used last at the end

    def add(self, state: KeptState) -> None:
        """Keep a state, in place of those that it contains. One larger than the limits is kept until the next."""
        whole = state.held.units
        self._states = [one for one in self._states if one.held.units != whole[: len(one.held.units)]]
        self._states.append(state)
        while len(self._states) > 1 and self._is_over():
            del self._states[0]

    def _is_over(self) -> bool:
        n_bytes = sum(one.state.nbytes for one in self._states)
        return n_bytes > self.limit_bytes or sum(one.held.n_cells for one in self._states) > self.limit_cells

    def best(self, units: Sequence[Unit], cuts: Set[int]) -> tuple[KeptState | None, Mark]:
        """The state of which the most can be reused for `units`, and up to where."""
        found: KeptState | None = None
        best = START
        for state in self._states:
            mark = state.held.reusable(units, cuts)
            if mark.n_units > best.n_units:
                found, best = state, mark
        return found, best

    def use(self, state: KeptState) -> None:
        """Note that a state was used; one that had to go in the meantime stays gone."""
        if state in self._states:
            self._states.remove(state)
            self._states.append(state)

    def drop(self, state: KeptState) -> None:
        """Let go of one state."""
        if state in self._states:
            self._states.remove(state)

    def clear(self) -> None:
        """Let go of all."""
        self._states.clear()
