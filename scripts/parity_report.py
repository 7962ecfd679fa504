"""How far two arrays are apart, and the table that says so."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["Report", "lowest_cosine", "relative_error"]


@dataclass(slots=True)
class Report:
    """Prints lines and counts the bars that were missed."""

    missed: int = 0
    worst: dict[str, float] = field(default_factory=dict)

    def line(self, label: str, *cells: str, met: bool = True) -> None:
        """Print one line of a table."""
        self.missed += not met
        print(f"{label:<26}" + "".join(f"{cell:>13}" for cell in cells) + ("" if met else "   MISSED"), flush=True)

    def error(self, name: str, value: float) -> str:
        """Remember the largest error of a kind and give it as a cell."""
        self.worst[name] = max(value, self.worst.get(name, 0.0))
        return f"{value:.1e}"


def relative_error(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """Give the norm of the difference over the reference's norm; infinity for another shape."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def lowest_cosine(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """Give the lowest cosine between rows of the same place; -1 for another shape."""
    if ours.shape != theirs.shape:
        return -1.0
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    return float(np.min((a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))))
