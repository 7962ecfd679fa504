"""What is held of a prompt after it was evaluated, and up to where another prompt may take it over.

A record alone: the cells themselves are in a sequence of the context, or in a state's bytes.
"""

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from lookonce.prompt import Run, TokenRun, Unit


@dataclass(frozen=True, slots=True)
class Mark:
    """A place to which a sequence can be cut back; `generated` says that a reply's token ends there."""

    n_units: int
    n_cells: int
    position: int
    generated: bool = False


START: Final = Mark(0, 0, 0)


@dataclass(slots=True, eq=False)
class Held:
    """The units that are held, the cells they take, the position that follows them, and where they can be cut."""

    units: list[Unit] = field(default_factory=list)
    n_cells: int = 0
    position: int = 0
    marks: list[Mark] = field(default_factory=lambda: [START])

    @classmethod
    def of(cls, calls: Sequence[Run]) -> Self:
        """What is held once `calls` have been evaluated from the start."""
        held = cls()
        for call in calls:
            held.hold(call)
        return held

    @classmethod
    def rebuilt(cls, units: Sequence[Unit], ends: Sequence[tuple[int, bool]]) -> Self:
        """What is held where calls ended at `ends`, each with whether a reply's token ended there.

        Raises ValueError where these are no ends.
        """
        held = cls()
        places = dict(ends)
        tokens: list[int] = []
        for number, unit in enumerate(units, start=1):
            if isinstance(unit, int):
                tokens.append(unit)
            elif tokens:
                raise ValueError("a call ends before each picture")
            else:
                held.hold(unit, generated=places.pop(number, False))
            if tokens and number in places:
                held.hold(TokenRun(tuple(tokens)), generated=places.pop(number))
                tokens = []
        if tokens or places:
            raise ValueError("a call ends somewhere else")
        return held

    @property
    def end(self) -> Mark:
        """The last place to cut."""
        return self.marks[-1]

    @property
    def positions(self) -> NDArray[np.int32]:
        """The position of each cell, (n_cells,); of an image row that in time."""
        found = [np.empty(0, dtype=np.int32)]
        position = 0
        for unit in self.units:
            if isinstance(unit, int):
                found.append(np.array([position], dtype=np.int32))
                position += 1
            else:
                found.append(unit.positions[:, 0] + np.int32(position))
                position += unit.advance
        return np.concatenate(found)

    @property
    def repeatable(self) -> bool:
        """Whether nothing of it was generated, so that evaluating the same prompt again gives the same bits."""
        return not any(mark.generated for mark in self.marks)

    def held_until(self, mark: Mark) -> "Held":
        """What is held up to `mark`."""
        held = Held()
        held.take_over(self, mark)
        return held

    def reusable(self, units: Sequence[Unit], cuts: Set[int]) -> Mark:
        """The last mark up to which `units` equal what is held, leaving at least one unit to evaluate.

        It is one of `cuts`, or stands in a reply.
        """
        same = 0
        for held, wanted in zip(self.units, units[:-1], strict=False):
            if held != wanted:
                break
            same += 1
        usable = (mark for mark in reversed(self.marks) if mark.generated or mark.n_units in cuts)
        return next((mark for mark in usable if mark.n_units <= same), START)

    def hold(self, run: Run, *, generated: bool = False) -> int:
        """Record what a native call has added; give the number of its cells."""
        if isinstance(run, TokenRun):
            self.units.extend(run.tokens)
            n_cells = advance = len(run.tokens)
        else:
            self.units.append(run)
            n_cells, advance = run.stop - run.start, run.advance
        self.n_cells += n_cells
        self.position += advance
        # Rows of one picture share their temporal position, so the cache cannot be cut between them.
        if advance:
            self.marks.append(Mark(len(self.units), self.n_cells, self.position, generated))
        return n_cells

    def cut(self, mark: Mark) -> None:
        """Record that everything after `mark` was dropped."""
        del self.units[mark.n_units :]
        del self.marks[self.marks.index(mark) + 1 :]
        self.n_cells, self.position = mark.n_cells, mark.position

    def take_over(self, other: "Held", mark: Mark) -> None:
        """Become a copy of what `other` holds up to `mark`."""
        self.units = other.units[: mark.n_units]
        self.marks = other.marks[: other.marks.index(mark) + 1]
        self.n_cells, self.position = mark.n_cells, mark.position


def calls(runs: Sequence[Run], size: int, start: int = 0) -> Iterator[Run]:
    """The native calls of at most `size` tokens that evaluate `runs` from unit `start` on."""
    offset = 0
    for run in runs:
        if not isinstance(run, TokenRun):
            if offset >= start:
                yield run
            offset += 1
            continue
        for first in range(max(0, start - offset), len(run.tokens), size):
            yield TokenRun(run.tokens[first : first + size])
        offset += len(run.tokens)
