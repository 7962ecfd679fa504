"""What each sequence of the context holds, and how a prompt is evaluated with the least work.

A prompt is evaluated in calls whose cuts depend on its content alone, and what is kept of it is reused only up to such
a cut. So a prompt that finds the beginning of another kept gives the same logits, to the bit, as one that does not.
A reply is kept token by token, as it was generated: the next turn of its chat, which reuses it, has the logits of the
whole conversation evaluated afresh up to rounding, as has a stream that goes on after another took its sequence.
"""

from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

from lookonce.errors import ContextError
from lookonce.native.text import Context
from lookonce.prompt import Prompt, Run, TokenRun, Unit


@dataclass(frozen=True, slots=True)
class _Mark:
    """A place to which a sequence can be cut back; `generated` says that a reply's token ends there."""

    n_units: int
    n_cells: int
    position: int
    generated: bool = False


_START = _Mark(0, 0, 0)


@dataclass(slots=True, eq=False)
class _Slot:
    """One sequence of the context: the units it holds, the cells they take and the position that follows them.

    `sound` is False while a native call changes it, and stays so if that call breaks off.
    """

    number: int
    units: list[Unit] = field(default_factory=list)
    n_cells: int = 0
    position: int = 0
    marks: list[_Mark] = field(default_factory=lambda: [_START])
    owner: "Turn | None" = None
    last_use: int = 0
    sound: bool = True

    def reusable(self, units: list[Unit], cuts: Set[int]) -> _Mark:
        """The last mark up to which `units` equal what is held, leaving at least one unit to evaluate.

        It is one of `cuts`, or stands in a reply.
        """
        if not self.sound:
            return _START
        same = 0
        for held, wanted in zip(self.units, units[:-1], strict=False):
            if held != wanted:
                break
            same += 1
        usable = (mark for mark in reversed(self.marks) if mark.generated or mark.n_units in cuts)
        return next((mark for mark in usable if mark.n_units <= same), _START)

    def hold(self, run: Run, *, generated: bool) -> None:
        """Record what a native call has added."""
        if isinstance(run, TokenRun):
            self.units.extend(run.tokens)
            self.n_cells += len(run.tokens)
            advance = len(run.tokens)
        else:
            self.units.append(run)
            self.n_cells += run.stop - run.start
            advance = run.advance
        self.position += advance
        # Rows of one picture share their temporal position, so the cache cannot be cut between them.
        if advance:
            self.marks.append(_Mark(len(self.units), self.n_cells, self.position, generated))

    def cut(self, mark: _Mark) -> None:
        """Record that everything after `mark` was dropped."""
        del self.units[mark.n_units :]
        del self.marks[self.marks.index(mark) + 1 :]
        self.n_cells, self.position = mark.n_cells, mark.position


@dataclass(slots=True, eq=False)
class Turn:
    """One reply in the making: its prompt, the generated tokens that were evaluated, and the sequence that holds both.

    `n_drawn` also counts the token drawn last, which is evaluated only when another is wanted.
    """

    prompt: Prompt
    generated: list[int] = field(default_factory=list)
    n_drawn: int = 0
    reused_cells: int = 0
    slot: _Slot | None = None
    ended: bool = False

    @property
    def n_cells(self) -> int:
        """Cells of the context that the turn takes."""
        return self.prompt.n_tokens + self.prompt.n_rows + len(self.generated)

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

    The caller holds the model's lock in every method. A turn whose sequence another one took is evaluated again when
    it goes on, so any number of turns may be under way; up to `count` of them without that cost.
    """

    def __init__(self, context: Context, count: int) -> None:
        self._context = context
        self._slots = [_Slot(number) for number in range(count)]
        self._clock = 0

    def reset(self) -> None:
        """Let go of everything, the values in the cells included; turns under way are evaluated again."""
        for slot in self._slots:
            slot.owner = None
            slot.sound = False
        self._context.clear()
        for slot in self._slots:
            slot.cut(_START)
            slot.sound = True

    def begin(self, turn: Turn) -> None:
        """Evaluate a turn's prompt, and what it has generated; the logits then follow its last token.

        Raises ContextError where it cannot fit, before any work.
        """
        refuse_overflow(turn.prompt.n_tokens + len(turn.generated), turn.prompt.n_rows, self._context.n_ctx)
        runs = turn.prompt.runs
        if turn.generated:
            runs = (*runs, TokenRun(tuple(turn.generated)))
        units = list(Prompt(runs).units())
        cuts = self._cuts(runs)
        slot = self._choose(units, cuts)
        self._own(slot, turn)
        mark = self._cut_back(slot, units, cuts)
        if not turn.generated:
            turn.reused_cells = mark.n_cells
        self._make_room(turn.n_cells, slot)
        calls = list(self._calls(runs, mark.n_units))
        for index, call in enumerate(calls):
            self._evaluate(slot, call, wanted=index == len(calls) - 1)

    def extend(self, turn: Turn, token: int) -> None:
        """Evaluate the token that a turn has generated."""
        turn.generated.append(token)
        if turn.slot is None or turn.slot.owner is not turn or not turn.slot.sound:
            self.begin(turn)
            return
        self._own(turn.slot, turn)
        self._make_room(turn.n_cells, turn.slot)
        self._evaluate(turn.slot, TokenRun((token,)), wanted=True, generated=True)

    def _choose(self, units: list[Unit], cuts: Set[int]) -> _Slot:
        self._release_ended()
        free = [slot for slot in self._slots if slot.owner is None]
        if not free:
            return min(self._slots, key=lambda slot: slot.last_use)
        return max(free, key=lambda slot: (slot.reusable(units, cuts).n_units, -slot.number))

    def _release_ended(self) -> None:
        # The first sequence keeps what it holds for the next prompt; the others only serve turns that overlap.
        for slot in self._slots:
            if slot.owner is not None and slot.owner.ended:
                slot.owner = None
                if slot.number:
                    self._clear(slot)

    def _own(self, slot: _Slot, turn: Turn) -> None:
        self._clock += 1
        slot.last_use = self._clock
        slot.owner = turn
        turn.slot = slot

    def _cut_back(self, slot: _Slot, units: list[Unit], cuts: Set[int]) -> _Mark:
        mark = slot.reusable(units, cuts)
        if mark is _START:
            self._clear(slot)
        elif mark.n_units < len(slot.units):
            slot.sound = False
            if not self._context.forget(slot.number, mark.position):
                self._clear(slot)
                return _START
            slot.cut(mark)
            slot.sound = True
        return mark

    def _clear(self, slot: _Slot) -> None:
        slot.sound = False
        self._context.forget(slot.number)
        slot.cut(_START)
        slot.sound = True

    def _make_room(self, n_cells: int, keep: _Slot) -> None:
        others = [slot for slot in self._slots if slot is not keep and (slot.units or not slot.sound)]
        others.sort(key=lambda slot: (slot.owner is not None and not slot.owner.ended, slot.last_use))
        taken = sum(slot.n_cells for slot in others)
        for slot in others:
            if slot.sound and n_cells + taken <= self._context.n_ctx:
                continue
            taken -= slot.n_cells
            slot.owner = None
            self._clear(slot)

    def _calls(self, runs: tuple[Run, ...], start: int) -> Iterator[Run]:
        size = self._context.batch_size
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

    def _cuts(self, runs: tuple[Run, ...]) -> Set[int]:
        """The places, in units, between the calls that evaluate `runs` from the start."""
        lengths = (len(call.tokens) if isinstance(call, TokenRun) else 1 for call in self._calls(runs, 0))
        return frozenset(accumulate(lengths, initial=0))

    def _evaluate(self, slot: _Slot, run: Run, *, wanted: bool, generated: bool = False) -> None:
        """One native call. The slot counts as unsound until its record agrees with the cache again."""
        slot.sound = False
        outputs: Literal["last", "none"] = "last" if wanted else "none"
        if isinstance(run, TokenRun):
            self._context.decode_tokens(run.tokens, position=slot.position, sequence=slot.number, outputs=outputs)
        else:
            positions = run.positions + slot.position
            self._context.decode_rows(run.rows, positions, sequence=slot.number, causal=run.causal, outputs=outputs)
        slot.hold(run, generated=generated)
        slot.sound = True
