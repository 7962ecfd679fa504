"""What each sequence of the context holds, and how a prompt is evaluated with the least work.

A prompt is evaluated in calls whose cuts depend on its content alone, and what is kept of it is reused only up to such
a cut. So a prompt that finds the beginning of another kept gives the same logits, to the bit, as one that does not,
as long as turns do not overlap: what lies before a prompt's cells in the cache decides how sums are rounded, so the
first sequence is left alone in it whenever it can be, and what others held is kept as a state's bytes.
A reply is kept token by token, as it was generated: the next turn of its chat, which reuses it, has the logits of the
whole conversation evaluated afresh up to rounding, as has a stream that goes on after another took its sequence.
"""

import logging
import weakref
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, Literal

import numpy as np

from lookonce.errors import ContextError, NativeError
from lookonce.held import START, Held, Mark, calls
from lookonce.kept_state import KeptState, KeptStates, Origin
from lookonce.native.cache import read_state, span, state_size, write_state
from lookonce.native.text import Context
from lookonce.prompt import Prompt, Run, TokenRun, Unit

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Cells:
    """The cells that one native call filled, and how many sequences hold them."""

    count: int
    holders: int = 1


@dataclass(slots=True, eq=False)
class _Slot(Held):
    """One sequence of the context, and whose it is.

    `sound` is False while a native call changes it, and stays so if that call breaks off. `owed` is the end of the
    last picture of a prompt that was evaluated here, until the state up to there has been read out.
    """

    number: int = 0
    cells: list[_Cells] = field(default_factory=list)
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

    def share(self, other: "_Slot", mark: Mark) -> None:
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
    slot: _Slot | None = None
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


class Sequences:
    """Shares the sequences of one context among turns.

    The caller holds the model's lock in every method. A turn whose sequence another one took is restored or evaluated
    again when it goes on, so any number of turns may be under way; up to `count` of them without that cost. The
    context has one sequence more than `count`. Without `kept`, nothing that leaves the context is kept. With `owes`,
    `take_owed` has to be called after each turn.
    """

    def __init__(self, context: Context, count: int, kept: KeptStates | None = None, *, owes: bool = False) -> None:
        self._context = context
        self._slots = [_Slot(number=number) for number in range(count)]
        self._spare = count
        self._kept = kept
        self._owes = owes
        self._owed: list[KeptState] = []
        self._taken = 0
        self._clock = 0

    @property
    def room(self) -> int:
        """Cells that nothing holds."""
        return self._context.n_ctx - self._taken

    @property
    def n_free(self) -> int:
        """Sequences that no turn is under way in."""
        return sum(slot.owner is None for slot in self._slots)

    def reset(self) -> None:
        """Let go of everything, the values in the cells included; turns under way are evaluated again."""
        for slot in self._slots:
            slot.turn = None
            slot.sound = False
        self._context.clear()
        for slot in self._slots:
            slot.let_go(START)
            slot.sound = True
        self._taken = 0
        if self._kept is not None:
            self._kept.clear()

    def reusable_units(self, prompt: Prompt) -> int:
        """How many units of a prompt need no evaluation."""
        units, cuts = list(prompt.units()), self._cuts(prompt.runs)
        held = [slot.reusable(units, cuts).n_units for slot in self._slots if slot.sound]
        return max(*held, self._best_kept(units, cuts)[1].n_units, 0)

    def begin(self, turn: Turn) -> None:
        """Evaluate a turn's prompt, and what it has generated; the logits then follow its last token.

        Raises ContextError where it cannot fit, before any work.
        """
        last = self.prepare(turn)
        slot = turn.slot
        assert slot is not None  # noqa: S101  prepare has given it one
        self._evaluate(slot, last, wanted=True)

    def prepare(self, turn: Turn) -> Run:
        """Evaluate all but the last call of a turn, and give that one."""
        refuse_overflow(turn.prompt.n_tokens + len(turn.generated), turn.prompt.n_rows, self._context.n_ctx)
        runs = turn.runs
        units, cuts = list(Prompt(runs).units()), self._cuts(runs)
        slot = self._choose(units, cuts)
        mark, origin = self._place(slot, turn, units, cuts)
        if not turn.generated:
            turn.reused_cells, turn.origin = mark.n_cells, origin
        self._make_room(turn.n_cells - mark.n_cells, slot)
        *before, last = calls(runs, self._context.batch_size, mark.n_units)
        for call in before:
            self._evaluate(slot, call)
        self._owe(slot, turn.prompt, mark)
        return last

    def extend(self, turn: Turn, token: int) -> None:
        """Evaluate the token that a turn has generated."""
        turn.generated.append(token)
        slot = self._slot_of(turn)
        if slot is None:
            self.begin(turn)
            return
        self._own(slot, turn)
        self._make_room(1, slot)
        self._evaluate(slot, TokenRun((token,)), wanted=True, generated=True)

    def _slot_of(self, turn: Turn) -> _Slot | None:
        slot = turn.slot
        return slot if slot is not None and slot.turn is turn and slot.sound else None

    # --- which sequence a turn gets, and what it finds there

    def _choose(self, units: list[Unit], cuts: Set[int]) -> _Slot:
        self._leave_ended()
        free = [slot for slot in self._slots if slot.owner is None]
        if not free:
            return min(self._slots, key=lambda slot: slot.last_use)
        return max(free, key=lambda slot: (slot.sound and slot.reusable(units, cuts).n_units, -slot.number))

    def _leave_ended(self) -> None:
        # Only the first sequence stays where it is: others' cells before its own would change how it is rounded.
        for slot in self._slots[1:]:
            if slot.owner is None and (slot.units or not slot.sound):
                self._vacate(slot)

    def _own(self, slot: _Slot, turn: Turn) -> None:
        self._clock += 1
        slot.last_use = self._clock
        slot.turn = turn
        turn.slot = slot

    def _place(self, slot: _Slot, turn: Turn, units: list[Unit], cuts: Set[int]) -> tuple[Mark, Origin]:
        """Let a slot hold as much of `units` as there is anywhere; give up to where, and where it was."""
        here = slot.reusable(units, cuts) if slot.sound else START
        others = [one for one in self._slots if one is not slot and one.sound]
        source = max(others, key=lambda one: one.reusable(units, cuts).n_units, default=slot)
        shared = source.reusable(units, cuts)
        kept, restored = self._best_kept(units, cuts)
        if kept is not None and restored.n_units > max(here.n_units, shared.n_units):
            self._vacate(slot)
            self._own(slot, turn)
            if self._restore(slot, kept):
                origin, kept.origin = kept.origin, "memory"
                return self._cut_back(slot, restored), origin
            here, shared = START, source.reusable(units, cuts)
        if shared.n_units > here.n_units:
            self._vacate(slot)
            self._own(slot, turn)
            return self._copy(source, slot, shared), "memory"
        self._leave(slot, here, turn)
        self._own(slot, turn)
        mark = self._cut_back(slot, here)
        return mark, "memory" if mark.n_units else "evaluated"

    def _best_kept(self, units: Sequence[Unit], cuts: Set[int]) -> tuple[KeptState | None, Mark]:
        return (None, START) if self._kept is None else self._kept.best(units, cuts)

    def _restore(self, slot: _Slot, kept: KeptState) -> bool:
        self._make_room(kept.held.n_cells, slot)
        slot.sound = False
        try:
            write_state(self._context, slot.number, kept.state, last=kept.last)
        except NativeError as error:
            logger.warning("a kept state is evaluated again: %s", error)
            self._clear(slot)
            if self._kept is not None:
                self._kept.drop(kept)
            return False
        slot.take_over(kept.held, kept.held.end)
        # One entry for each mark: only whole ones are ever let go.
        ends = [mark.n_cells for mark in slot.marks]
        slot.cells = [_Cells(stop - start) for start, stop in pairwise(ends)]
        self._taken += slot.n_cells
        slot.sound = True
        if self._kept is not None:
            self._kept.use(kept)
        return True

    def _copy(self, source: _Slot, target: _Slot, mark: Mark) -> Mark:
        target.sound = False
        self._context.copy(source.number, target.number, stop=mark.position)
        if span(self._context, target.number)[1] >= mark.position:  # a recurrent memory cannot be cut
            self._clear(target)
            return START
        target.share(source, mark)
        target.sound = True
        return mark

    def _cut_back(self, slot: _Slot, mark: Mark) -> Mark:
        if mark is START:
            self._clear(slot)
        elif mark.n_units < len(slot.units):
            slot.sound = False
            if not self._context.forget(slot.number, mark.position):
                self._clear(slot)
                return START
            self._taken -= slot.let_go(mark)
            slot.sound = True
        return mark

    def _clear(self, slot: _Slot) -> None:
        slot.sound = False
        self._context.forget(slot.number)
        self._taken -= slot.let_go(START)
        slot.sound = True

    def _make_room(self, n_cells: int, keep: _Slot) -> None:
        """Free cells until `n_cells` more fit beside what `keep` holds."""
        if self._taken + n_cells <= self._context.n_ctx and all(slot.sound for slot in self._slots):
            return
        others = [slot for slot in self._slots if slot is not keep and (slot.units or not slot.sound)]
        others.sort(key=lambda slot: (slot.owner is not None, slot.last_use))
        for slot in others:
            if not slot.sound or self._taken + n_cells > self._context.n_ctx:
                self._vacate(slot)

    # --- what is kept of what leaves

    def _vacate(self, slot: _Slot) -> None:
        self._leave(slot, START, None)
        slot.turn = None
        self._clear(slot)

    def _leave(self, slot: _Slot, mark: Mark, following: Turn | None) -> None:
        """Before a slot loses what follows `mark`: keep as bytes what may be wanted again."""
        if self._kept is None or not slot.sound:
            return
        if slot.owed is not None and slot.owed.n_units > mark.n_units:
            state = self._keep(slot, slot.owed)
            if state is not None and self._owes and state.held.repeatable:
                self._owed.append(state)
        turn = slot.turn
        if turn is None or not turn.wanted or slot.end.n_units <= mark.n_units:
            return
        goes_on = following is not None and following.conversation == turn.conversation is not None
        if not goes_on and slot.end.n_cells == slot.n_cells:
            self._keep(slot, slot.end)

    def _keep(self, slot: _Slot, mark: Mark) -> KeptState | None:
        state = self._read(slot, mark)
        if state is not None and self._kept is not None:
            self._kept.add(state)
        return state

    def take_owed(self, turn: Turn | None = None) -> list[KeptState]:
        """The states up to the last picture of prompts that were evaluated here, `turn`'s or all.

        Only those that another process would evaluate alike: not where a reply stands before the picture.
        """
        found, self._owed = self._owed, []
        for slot in self._slots:
            if slot.owed is None or not slot.sound or not (turn is None or slot.turn is turn):
                continue
            if slot.held_until(slot.owed).repeatable:
                state = self._keep(slot, slot.owed)
                slot.owed = None
                found += [] if state is None else [state]
        return found

    def _owe(self, slot: _Slot, prompt: Prompt, reused: Mark) -> None:
        end = prompt.picture_ends[-1] if prompt.picture_ends else 0
        if self._kept is not None and reused.n_units < end:
            slot.owed = next((mark for mark in slot.marks if mark.n_units == end), None)

    def read(self, units: Sequence[Unit]) -> KeptState | None:
        """What is held of a conversation, as far as any sequence or kept state holds it; None where nothing is."""
        probe = [*units, -1]  # so that the last unit counts as well
        cuts = frozenset(range(len(probe)))
        slot = max((slot for slot in self._slots if slot.sound), key=lambda one: one.reusable(probe, cuts).n_units)
        mark = slot.reusable(probe, cuts)
        kept, other = self._best_kept(probe, cuts)
        if kept is not None and other.n_units >= mark.n_units:
            return kept
        return self._read(slot, mark) if mark.n_units else None

    def _read(self, slot: _Slot, mark: Mark) -> KeptState | None:
        """What a slot holds up to `mark`; None where the memory of this model cannot be read out so."""
        number = slot.number
        held = slot.held_until(mark)
        try:
            if mark.n_units < len(slot.units):
                number = self._spare
                self._context.copy(slot.number, number, stop=mark.position)
            first, last = span(self._context, number)
            if first or last >= mark.position:
                logger.debug("no state is kept: the memory of this model cannot be read out in part")
                return None
            state = np.empty(state_size(self._context, number), dtype=np.uint8)
            read_state(self._context, number, state)
        except (NativeError, MemoryError) as error:
            logger.warning("a state is not kept: %s", error)
            return None
        finally:
            self._context.forget(self._spare)
        return KeptState(held, state, last)

    # --- native calls

    def _cuts(self, runs: tuple[Run, ...]) -> Set[int]:
        """The places, in units, between the calls that evaluate `runs` from the start."""
        each = calls(runs, self._context.batch_size)
        lengths = (len(call.tokens) if isinstance(call, TokenRun) else 1 for call in each)
        return frozenset(accumulate(lengths, initial=0))

    def _evaluate(self, slot: _Slot, run: Run, *, wanted: bool = False, generated: bool = False) -> None:
        """One native call. The slot counts as unsound until its record agrees with the cache again."""
        slot.sound = False
        outputs: Literal["last", "none"] = "last" if wanted else "none"
        if isinstance(run, TokenRun):
            self._context.decode_tokens(run.tokens, position=slot.position, sequence=slot.number, outputs=outputs)
        else:
            positions = run.positions + slot.position
            self._context.decode_rows(run.rows, positions, sequence=slot.number, causal=run.causal, outputs=outputs)
        self._hold(slot, run, generated=generated)
        slot.sound = True

    def _hold(self, slot: _Slot, run: Run, *, generated: bool) -> None:
        n_cells = slot.hold(run, generated=generated)
        slot.cells.append(_Cells(n_cells))
        self._taken += n_cells
