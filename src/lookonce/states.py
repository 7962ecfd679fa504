"""Hidden states of many prompts: what they share is evaluated once, and short ones go together in one batch.

Knows nothing of pooling: whoever asks says which cells (tokens and image rows) of each prompt are wanted.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lookonce.engine import Engine
from lookonce.errors import ContextError
from lookonce.fork_lock import ForkLock
from lookonce.native.hidden import FINAL_STATE, HiddenContext, layer_tensor
from lookonce.native.text import BATCH_TOKENS
from lookonce.pooling import check_finite
from lookonce.prompt import Prompt, Run, TokenRun, Unit

_SEQUENCES: Final = 64  # sequence 0 holds the shared beginning, the others one short prompt each
_GRANULE: Final = 256  # contexts grow by this many cells
_LEAST_SHARED: Final = 8  # units; a beginning of fewer is not worth a call of its own

States = NDArray[np.float32]
Flags = NDArray[np.bool_]


def check_room(n_tokens: int, n_rows: int, n_ctx: int, remedy: str) -> None:
    """Raise ContextError where what is to be evaluated does not fit the context; `remedy` is for its text."""
    if n_tokens + n_rows > n_ctx:
        raise ContextError(
            f"the prompt has {n_tokens} tokens and {n_rows} image rows, but the context holds {n_ctx}: "
            f"{remedy}, make the pictures smaller with max_pixels, or load the model with a larger n_ctx"
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Beginning:
    """What sequence 0 holds for the prompts that begin with it, and the states of its wanted cells."""

    units: tuple[Unit, ...]
    wanted: Flags
    states: States
    position: int


@dataclass(frozen=True, slots=True, eq=False)
class _Tail:
    """What of one prompt is its own: the runs after the shared beginning, and which of their cells are wanted."""

    index: int
    runs: tuple[Run, ...]
    wanted: Flags

    @property
    def n_cells(self) -> int:
        return len(self.wanted)

    @property
    def packable(self) -> bool:
        """Whether it can share a batch: a text that fits one."""
        return len(self.runs) == 1 and isinstance(self.runs[0], TokenRun) and self.n_cells <= BATCH_TOKENS


class StateRunner:
    """Evaluates prompts for the hidden states of one layer. Safe to use from several threads.

    Its context is as large as the work so far needed, and apart from the one that replies are made in. The beginning
    that prompts share stays in it from call to call. `one_each` promises that of each prompt at most one cell is
    wanted, which saves memory: llama.cpp keeps room for the logits of every wanted cell.
    """

    def __init__(self, engine: Engine, layer: int, *, one_each: bool = False) -> None:
        self._engine = engine
        self._layer = layer
        # A middle layer's states are taken before llama.cpp picks its outputs: none is ever flagged.
        one_each = one_each or layer_tensor(engine.text, layer)[1] != FINAL_STATE
        self._n_outputs = _SEQUENCES if one_each else BATCH_TOKENS
        self._context: HiddenContext | None = None
        self._beginning: _Beginning | None = None
        self._last_units: list[Unit] = []
        self._turn = ForkLock()  # one call at a time uses the sequences; the engine's lock is taken per batch

    def run(self, prompts: Sequence[Prompt], wanted: Sequence[Flags]) -> list[States]:
        """Each prompt's states of its wanted cells, (n, width) in prompt order. `wanted` is (n_cells,) for each.

        Raises NotFiniteError for states that are not finite; nothing that was evaluated stays for later prompts then.
        """
        with self._turn:
            try:
                return [check_finite(states, self._engine.name) for states in self._run(prompts, wanted)]
            except BaseException:
                self._drop()  # what its sequences hold is not known any more
                raise

    def _run(self, prompts: Sequence[Prompt], wanted: Sequence[Flags]) -> list[States]:
        lists = [list(prompt.units()) for prompt in prompts]
        shared = self._choose_beginning(lists)
        runs, _ = _split(prompts[0].runs, shared)
        n_shared = sum(run.n_cells for run in runs)
        kept = np.logical_or.reduce([flags[:n_shared] for flags in wanted])
        tails = [
            _tail(index, _split(prompt.runs, shared)[1], flags[n_shared:])
            for index, (prompt, flags) in enumerate(zip(prompts, wanted, strict=True))
        ]
        # All sequences share the cells, of which a context has no more than the model was trained for.
        groups = list(_groups(tails, min(BATCH_TOKENS, self._engine.text.context_length - n_shared)))
        context = self._reserve(n_shared + max((sum(tail.n_cells for tail in group) for group in groups), default=1))
        beginning = self._begin(context, tuple(lists[0][:shared]), runs, kept)
        own: dict[int, States] = {}
        for group in groups:
            found = self._evaluate_group(context, group, beginning.position)
            own |= {tail.index: states for tail, states in zip(group, found, strict=True)}
        self._last_units = lists[-1]
        return [
            np.concatenate([beginning.states[flags[:n_shared][beginning.wanted]], *([own[i]] if i in own else ())])
            for i, flags in enumerate(wanted)
        ]

    def _choose_beginning(self, lists: Sequence[list[Unit]]) -> int:
        """How many units at the start of all prompts are evaluated apart, leaving each at least one of its own."""
        shared = _shared_units(lists if len(lists) > 1 else [*lists, self._last_units])
        if len(lists) == 1 and shared < _LEAST_SHARED:
            shared = 0
        if self._beginning is not None:
            held = len(self._beginning.units)
            fits = all(tuple(units[:held]) == self._beginning.units and len(units) > held for units in lists)
            if fits and (shared - held) * max(1, len(lists) - 1) <= held:  # cheaper than a longer one made anew
                return held
        return shared

    def _begin(self, context: HiddenContext, units: tuple[Unit, ...], runs: Sequence[Run], wanted: Flags) -> _Beginning:
        """Have sequence 0 hold the beginning, with the states of its wanted cells."""
        held = self._beginning
        if held is None or held.units != units or (wanted & ~held.wanted).any():
            self._beginning = None
            with self._engine.lock:
                context.forget(0)
            states, position = self._evaluate(context, runs, wanted, sequence=0, position=0)
            held = self._beginning = _Beginning(units, wanted, states, position)
        return held

    def _reserve(self, n_cells: int) -> HiddenContext:
        """The context, made anew where it is too small."""
        if self._context is None or self._context.options.n_ctx < n_cells:
            before = 0 if self._context is None else self._context.options.n_ctx
            self._drop()
            n_ctx = -(-max(n_cells, before * 3 // 2) // _GRANULE) * _GRANULE
            n_ctx = min(n_ctx, self._engine.text.context_length)
            n_outputs = min(self._n_outputs, n_ctx)
            options = replace(self._engine.options, n_ctx=n_ctx, n_sequences=_SEQUENCES, n_outputs=n_outputs)
            with self._engine.lock:
                self._context = HiddenContext(self._engine.text, options, self._layer)
        return self._context

    def _evaluate_group(self, context: HiddenContext, group: Sequence[_Tail], position: int) -> list[States]:
        if not group[0].packable:
            (tail,) = group
            with self._engine.lock:
                context.copy(0, 1)
            states, _ = self._evaluate(context, tail.runs, tail.wanted, sequence=1, position=position)
            with self._engine.lock:
                context.forget(1)
            return [states]
        lengths = [tail.n_cells for tail in group]
        numbers = np.arange(1, len(group) + 1, dtype=np.int32)
        flags = np.concatenate([tail.wanted for tail in group])
        with self._engine.lock:
            for number in numbers:
                context.copy(0, int(number))
            states = context.evaluate_tokens(
                np.concatenate([_tokens(tail.runs[0]) for tail in group]),
                np.concatenate([np.arange(position, position + n, dtype=np.int32) for n in lengths]),
                np.repeat(numbers, lengths),
                flags,
            )
            for number in numbers:
                context.forget(int(number))
        ends = np.cumsum([np.count_nonzero(tail.wanted) for tail in group])
        return np.split(states, ends[:-1])

    def _evaluate(
        self, context: HiddenContext, runs: Iterable[Run], wanted: Flags, *, sequence: int, position: int
    ) -> tuple[States, int]:
        """Evaluate runs one after the other in one sequence; their wanted states and the position that follows."""
        found = [np.empty((0, self._engine.text.width), dtype=np.float32)]
        done = 0
        for run in _pieces(runs):
            count = run.n_cells
            flags = wanted[done : done + count]
            done += count
            with self._engine.lock:
                if isinstance(run, TokenRun):
                    places = np.arange(position, position + count, dtype=np.int32)
                    same = np.full(count, sequence, dtype=np.int32)
                    found.append(context.evaluate_tokens(_tokens(run), places, same, flags))
                    position += count
                else:
                    places = run.positions + np.int32(position)
                    found.append(context.evaluate_rows(run.rows, places, sequence, flags, causal=run.causal))
                    position += run.advance
        return np.concatenate(found), position

    def close(self) -> None:
        """Give the context's memory back; may be called twice. The next run makes it anew."""
        with self._turn:
            self._drop()

    def _drop(self) -> None:
        self._beginning = None
        self._last_units = []
        with self._engine.lock:
            if self._context is not None:
                self._context.close()
                self._context = None


def _shared_units(lists: Sequence[list[Unit]]) -> int:
    """How many units all begin with, leaving each at least one of its own."""
    first, longest = lists[0], max(0, min(map(len, lists)) - 1)
    return next((n for n in range(longest) if any(units[n] != first[n] for units in lists)), longest)


def _tail(index: int, runs: Sequence[Run], wanted: Flags) -> _Tail:
    """One prompt's own runs up to the last that holds a wanted cell: what follows changes nothing before it."""
    kept: list[Run] = []
    done, end = 0, int(np.max(np.flatnonzero(wanted), initial=-1)) + 1
    for run in runs:
        if done >= end:
            break
        kept.append(TokenRun(run.tokens[: end - done]) if isinstance(run, TokenRun) else run)
        done += kept[-1].n_cells
    return _Tail(index, tuple(kept), wanted[:done])


def _split(runs: Sequence[Run], n_units: int) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
    """Runs before and after the first `n_units` units."""
    before: list[Run] = []
    for index, run in enumerate(runs):
        if n_units == 0:
            return tuple(before), tuple(runs[index:])
        size = len(run.tokens) if isinstance(run, TokenRun) else 1
        if isinstance(run, TokenRun) and n_units < size:
            head, tail = TokenRun(run.tokens[:n_units]), TokenRun(run.tokens[n_units:])
            return (*before, head), (tail, *runs[index + 1 :])
        before.append(run)
        n_units -= size
    return tuple(before), ()


def _groups(tails: Iterable[_Tail], room: int) -> Iterator[list[_Tail]]:
    """Tails that go into one batch of `room`, the longest first; one that does not fit a batch goes alone."""
    group: list[_Tail] = []
    for tail in sorted(tails, key=lambda tail: (-tail.n_cells, tail.index)):
        if not tail.n_cells:
            continue
        full = len(group) == _SEQUENCES - 1 or sum(one.n_cells for one in group) + tail.n_cells > room
        if group and (full or not tail.packable or not group[0].packable):
            yield group
            group = []
        group.append(tail)
    if group:
        yield group


def _pieces(runs: Iterable[Run]) -> Iterator[Run]:
    """Runs cut to the size of one batch, in equal parts: a short last one costs more than its tokens."""
    for run in runs:
        if isinstance(run, TokenRun):
            size = -(-len(run.tokens) // -(-len(run.tokens) // BATCH_TOKENS))
            for start in range(0, len(run.tokens), size):
                yield TokenRun(run.tokens[start : start + size])
        else:
            yield run  # cut when the prompt was made


def _tokens(run: Run) -> NDArray[np.int32]:
    return np.asarray(run.tokens if isinstance(run, TokenRun) else (), dtype=np.int32)
