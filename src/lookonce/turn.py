"""A reply in the making, and the sequence of the context that serves it. Records alone: no native work is done here."""

import weakref
from dataclasses import dataclass, field
from typing import Any

from lookonce.errors import ContextError
from lookonce.held import Held, Mark
from lookonce.kept_state import Origin
from lookonce.prompt import Prompt, Run, TokenRun, Unit


@dataclass(slots=True, eq=False)
class Cells:
    """The cells that one native call filled, and how many sequences hold them."""

    count: int
    holders: int = 1


@dataclass(slots=True, eq=False)
class Slot(Held):
    """One sequence of the context, and whose it is.

    `sound` is False while a native call changes it, and stays so if that call breaks off. `owed` is the end of the
    last picture of a prompt that was evaluated here, until the state up to there has been read out.
    """

    number: int = 0
    cells: list[Cells] = field(default_factory=list)
    turn: "Turn | None" = None
    owed: Mark | None = None
    last_use: int = 0
    sound: bool = True

    @property
    def owner(self) -> "Turn | None":
        """The turn that is under way here."""
        return None if self.turn is None or self.turn.ended or self.turn.slot is not self else self.turn

    def let_go(self, mark: Mark) -> int:
        """Record that everything after `mark` was dropped; give the number of cells that nobody holds any more."""
        freed, spare = 0, self.n_cells - mark.n_cells
        while spare:
            cells = self.cells.pop()
            spare -= cells.count
            cells.holders -= 1
            freed += 0 if cells.holders else cells.count
        self.cut(mark)
        if self.owed is not None and self.owed.n_units > mark.n_units:
            self.owed = None
        return freed

    def share(self, other: "Slot", mark: Mark) -> None:
        """Become a copy, on the same cells, of what `other` holds up to `mark`."""
        self.take_over(other, mark)
        wanted = mark.n_cells
        for cells in other.cells:
            if not wanted:
                break
            wanted -= cells.count
            cells.holders += 1
            self.cells.append(cells)


@dataclass(slots=True, eq=False)
class Turn:
    """One reply in the making: its prompt, the generated tokens that were evaluated, and the sequence that holds both.

    `n_drawn` also counts the token drawn last, which is evaluated only when another is wanted. `conversation` is what
    the turn belongs to, where that may go on; as long as it lives, what it holds is worth keeping.
    """

    prompt: Prompt
    conversation: "weakref.ref[Any] | None" = None
    generated: list[int] = field(default_factory=list)
    n_drawn: int = 0
    reused_cells: int = 0
    origin: Origin = "evaluated"
    slot: Slot | None = None
    ended: bool = False

    @property
    def n_cells(self) -> int:
        """Cells of the context that the turn takes."""
        return self.prompt.n_tokens + self.prompt.n_rows + len(self.generated)

    @property
    def runs(self) -> tuple[Run, ...]:
        """The prompt and what was generated after it."""
        return (*self.prompt.runs, *([TokenRun(tuple(self.generated))] if self.generated else ()))

    @property
    def units(self) -> tuple[Unit, ...]:
        """The same as it is compared with other prompts."""
        return tuple(Prompt(self.runs).units())

    @property
    def wanted(self) -> bool:
        """Whether it may go on."""
        return not self.ended or (self.conversation is not None and self.conversation() is not None)

    def end(self) -> None:
        """Let go of the turn's sequence. Takes no lock, so that a forgotten stream may be collected anywhere."""
        self.ended = True


def refuse_overflow(n_tokens: int, n_rows: int, n_ctx: int) -> None:
    """Raise ContextError where a prompt leaves no room for an answer."""
    if n_tokens + n_rows >= n_ctx:
        smaller = "make the pictures smaller with max_pixels" if n_rows > n_tokens else "shorten it"
        raise ContextError(
            f"the prompt has {n_tokens} tokens and {n_rows} image rows, but the context holds {n_ctx} with at least "
            f"one for the answer: {smaller}, or load the model with a larger n_ctx"
        )
