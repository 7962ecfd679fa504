"""What each sequence of the context holds, and how a prompt is evaluated with the least work.

A prompt is evaluated in calls whose cuts depend on its content alone, and what is kept of it is reused only up to such
a cut. So a prompt that finds the beginning of another kept gives the same logits, to the bit, as one that does not,
as long as turns do not overlap: what lies before a prompt's cells in the cache decides how sums are rounded, so the
first sequence is left alone in it whenever it can be, and what others held is kept as a state's bytes.
A reply is kept token by token, as it was generated: the next turn of its chat, which reuses it, has the logits of the
whole conversation evaluated afresh up to rounding, as has a stream that goes on after another took its sequence.
"""

import logging
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import numpy as np

from lookonce.errors import NativeError
from lookonce.held import START, Mark, calls
from lookonce.kept_state import KeptState, KeptStates, Origin
from lookonce.native.cache import read_state, span, state_size, write_state
from lookonce.native.text import Context
from lookonce.prompt import Prompt, Run, TokenRun, Unit
from lookonce.turn import Cells, Slot, Turn, refuse_overflow

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Move:
    """What one turn has to be evaluated for its next token; no run where that is a picture."""

    number: int
    turn: Turn
    run: TokenRun | None
    generated: bool = False

    @property
    def tokens(self) -> tuple[int, ...]:
        return () if self.run is None else self.run.tokens

    def __len__(self) -> int:
        return len(self.tokens)


class Sequences:
    """Shares the sequences of one context among turns.

    The caller holds the model's lock in every method. A turn whose sequence another one took is restored or evaluated
    again when it goes on, so any number of turns may be under way; up to `count` of them without that cost. The
    context has one sequence more than `count`. Without `kept`, nothing that leaves the context is kept. With `owes`,
    `take_owed` has to be called after each turn.
    """

    def __init__(self, context: Context, count: int, kept: KeptStates | None = None, *, owes: bool = False) -> None:
        self._context = context
        self._slots = [Slot(number=number) for number in range(count)]
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
        """Let go of everything, values in cells and what is owed included; turns under way are evaluated again."""
        for slot in self._slots:
            slot.turn = None
            slot.sound = False
        self._context.clear()
        for slot in self._slots:
            slot.let_go(START)
            slot.sound = True
        self._taken = 0
        self._owed.clear()
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

    # --- several turns in one batch

    def missing_cells(self, turn: Turn) -> int:
        """How many cells a turn's next token would add to those that are taken, where it begins or begins again too."""
        if self._slot_of(turn) is not None:
            return 1
        units, cuts = list(turn.units), self._cuts(turn.runs)
        held = [slot.reusable(units, cuts).n_cells for slot in self._slots if slot.sound]
        return turn.prompt.n_tokens + turn.prompt.n_rows + turn.n_drawn - max(held, default=0)

    def reserve(self, n_cells: int) -> bool:
        """Whether so many cells are free, once what no turn needs has left the context."""
        if self.room < n_cells:
            for slot in self._slots:
                if slot.owner is None and (slot.units or not slot.sound):
                    self._vacate(slot)
        return self.room >= n_cells

    def release(self, turn: Turn) -> None:
        """Take a turn's sequence from it; it is restored or evaluated again when it goes on."""
        if turn.slot is not None and turn.slot.turn is turn:
            self._vacate(turn.slot)

    def advance(self, moves: Sequence[tuple[Turn, int | None]]) -> Iterator[list[tuple[int, int]]]:
        """Evaluate a token more of several turns, None where a turn begins, as many as possible in one call.

        Gives after each call which moves it finished, by their places in `moves`, and where their logits are, which
        the next call overwrites. Whoever gives more turns than sequences or cells has them evaluated in several calls.
        """
        waiting: list[_Move] = []
        for number, (turn, token) in enumerate(moves):
            move = self._begin_move(number, turn, token)
            if move.run is None or sum(map(len, waiting)) + len(move) > self._context.batch_size:
                yield from self._finish_moves(waiting)
                waiting = []
            waiting.append(move)
        yield from self._finish_moves(waiting)

    def _begin_move(self, number: int, turn: Turn, token: int | None) -> _Move:
        if token is not None:
            turn.generated.append(token)
        slot = self._slot_of(turn)
        if token is not None and slot is not None:
            self._own(slot, turn)
            return _Move(number, turn, TokenRun((token,)), generated=True)
        last = self.prepare(turn)
        return _Move(number, turn, last if isinstance(last, TokenRun) else None)

    def _finish_moves(self, moves: list[_Move]) -> Iterator[list[tuple[int, int]]]:
        waiting = moves
        while together := self._fitting(waiting):
            yield self._evaluate_together(together)
            done = {move.number for move, _ in together}
            waiting = [move for move in waiting if move.number not in done]
        for move in waiting:  # a prompt that ends with a picture, or a turn whose sequence another of these took
            self.begin(move.turn)
            yield [(move.number, -1)]

    def _fitting(self, moves: list[_Move]) -> list[tuple[_Move, Slot]]:
        """The first moves that the context holds all at once: each was prepared as if it had the room to itself."""
        found = [(move, slot) for move in moves if move.run is not None and (slot := self._slot_of(move.turn))]
        if sum(len(move) for move, _ in found) <= self.room:
            return found
        held: set[Cells] = set()
        n_cells = 0
        for count, (move, slot) in enumerate(found):
            n_cells += len(move) + sum(cells.count for cells in slot.cells if cells not in held)
            if n_cells > self._context.n_ctx:
                return found[:count]
            held.update(slot.cells)
        return found

    def _evaluate_together(self, moves: list[tuple[_Move, Slot]]) -> list[tuple[int, int]]:
        slots = [slot for _, slot in moves]
        lengths = [len(move) for move, _ in moves]
        self._make_room(sum(lengths), *slots)
        tokens = np.array([token for move, _ in moves for token in move.tokens], dtype=np.int32)
        sequences = np.repeat(np.array([slot.number for slot in slots], dtype=np.int32), lengths)
        positions = np.concatenate(
            [np.arange(slot.position, slot.position + len(move), dtype=np.int32) for move, slot in moves]
        )
        ends = np.cumsum(lengths) - 1
        outputs = np.zeros(len(tokens), dtype=np.bool_)
        outputs[ends] = True
        for slot in slots:
            slot.sound = False
        self._context.decode_many(tokens, positions, sequences, outputs)
        for move, slot in moves:
            self._hold(slot, TokenRun(move.tokens), generated=move.generated)
            slot.sound = True
        return [(move.number, int(end)) for (move, _), end in zip(moves, ends, strict=True)]

    def _slot_of(self, turn: Turn) -> Slot | None:
        slot = turn.slot
        return slot if slot is not None and slot.turn is turn and slot.sound else None

    # --- which sequence a turn gets, and what it finds there

    def _choose(self, units: list[Unit], cuts: Set[int]) -> Slot:
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

    def _own(self, slot: Slot, turn: Turn) -> None:
        self._clock += 1
        slot.last_use = self._clock
        slot.turn = turn
        turn.slot = slot

    def _place(self, slot: Slot, turn: Turn, units: list[Unit], cuts: Set[int]) -> tuple[Mark, Origin]:
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

    def _restore(self, slot: Slot, kept: KeptState) -> bool:
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
        slot.cells = [Cells(stop - start) for start, stop in pairwise(ends)]
        self._taken += slot.n_cells
        slot.sound = True
        if self._kept is not None:
            self._kept.use(kept)
        return True

    def _copy(self, source: Slot, target: Slot, mark: Mark) -> Mark:
        target.sound = False
        self._context.copy(source.number, target.number, stop=mark.position)
        if span(self._context, target.number)[1] >= mark.position:  # a recurrent memory cannot be cut
            self._clear(target)
            return START
        target.share(source, mark)
        target.sound = True
        return mark

    def _cut_back(self, slot: Slot, mark: Mark) -> Mark:
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

    def _clear(self, slot: Slot) -> None:
        slot.sound = False
        self._context.forget(slot.number)
        self._taken -= slot.let_go(START)
        slot.sound = True

    def _make_room(self, n_cells: int, *keep: Slot) -> None:
        """Free cells until `n_cells` more fit beside what `keep` hold."""
        if self._taken + n_cells <= self._context.n_ctx and all(slot.sound for slot in self._slots):
            return
        others = [slot for slot in self._slots if slot not in keep and (slot.units or not slot.sound)]
        others.sort(key=lambda slot: (slot.owner is not None, slot.last_use))
        for slot in others:
            if not slot.sound or self._taken + n_cells > self._context.n_ctx:
                self._vacate(slot)

    # --- what is kept of what leaves

    def _vacate(self, slot: Slot) -> None:
        self._leave(slot, START, None)
        slot.turn = None
        self._clear(slot)

    def _leave(self, slot: Slot, mark: Mark, following: Turn | None) -> None:
        """Before a slot loses what follows `mark`: keep as bytes what may be wanted again."""
        if self._kept is None or not slot.sound:
            return
        if slot.owed is not None and slot.owed.n_units > mark.n_units:
            state = self._keep(slot, slot.owed)
            if state is not None and self._owes and state.held.repeatable:
                self._owed.append(state)
                # Streams that nobody asked a second piece of leave theirs, until another settles.
                while len(self._owed) > 1 and sum(one.state.nbytes for one in self._owed) > self._kept.limit_bytes:
                    del self._owed[0]
        turn = slot.turn
        if turn is None or not turn.wanted or slot.end.n_units <= mark.n_units:
            return
        goes_on = following is not None and following.conversation == turn.conversation is not None
        if not goes_on and slot.end.n_cells == slot.n_cells:
            self._keep(slot, slot.end, self._kept.limit_bytes)

    def _keep(self, slot: Slot, mark: Mark, limit_bytes: int | None = None) -> KeptState | None:
        state = self._read(slot, mark, limit_bytes)
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

    def _owe(self, slot: Slot, prompt: Prompt, reused: Mark) -> None:
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
            return kept if other == kept.held.end else self._read_part(kept, other)
        return self._read(slot, mark) if mark.n_units else None

    def _read_part(self, kept: KeptState, mark: Mark) -> KeptState | None:
        """A kept state up to `mark`: what follows there is another conversation's."""
        self._make_room(kept.held.n_cells)
        slot = Slot(number=self._spare)
        try:
            write_state(self._context, slot.number, kept.state, last=kept.last)
            if not self._context.forget(slot.number, mark.position):
                return None
            slot.take_over(kept.held, mark)
            return self._read(slot, mark)
        except NativeError as error:
            logger.warning("a state is not kept: %s", error)
            return None
        finally:
            self._context.forget(self._spare)

    def _read(self, slot: Slot, mark: Mark, limit_bytes: int | None = None) -> KeptState | None:
        """What a slot holds up to `mark`; None where it is more than `limit_bytes` or cannot be read out so."""
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
            size_bytes = state_size(self._context, number)
            if limit_bytes is not None and size_bytes > limit_bytes:
                logger.debug("a conversation of %d bytes leaves the context and is not kept", size_bytes)
                return None
            state = np.empty(size_bytes, dtype=np.uint8)
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

    def _evaluate(self, slot: Slot, run: Run, *, wanted: bool = False, generated: bool = False) -> None:
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

    def _hold(self, slot: Slot, run: Run, *, generated: bool) -> None:
        n_cells = slot.hold(run, generated=generated)
        slot.cells.append(Cells(n_cells))
        self._taken += n_cells
