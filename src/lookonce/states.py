"""Hidden states of many prompts: what they share is evaluated once, and short ones go together in one batch.

Knows nothing of pooling: whoever asks says which cells (tokens and image rows) of each prompt are wanted.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lookonce.engine import Engine
from lookonce.native.hidden import HiddenContext
from lookonce.native.text import BATCH_TOKENS
from lookonce.prompt import Prompt, Run, TokenRun

_SEQUENCES: Final = 64  # sequence 0 holds the shared beginning, the others one short prompt each
_GRANULE: Final = 256  # contexts grow by this many cells

States = NDArray[np.float32]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
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

    Its context is as large as the work so far needed, and apart from the one that replies are made in. `one_each`
    promises that of each prompt at most one cell is wanted, which saves memory: llama.cpp keeps room for the logits
    of every wanted cell.
    """

    def __init__(self, engine: Engine, layer: int, *, one_each: bool = False) -> None:
        self._engine = engine
        self._layer = layer
        self._n_outputs = _SEQUENCES if one_each else BATCH_TOKENS
        self._context: HiddenContext | None = None
        self._turn = threading.Lock()  # one call at a time uses the sequences; the engine's lock is taken per batch

    def run(self, prompts: Sequence[Prompt], wanted: Sequence[Flags]) -> list[States]:
        """Each prompt's states of its wanted cells, (n, width) in prompt order. `wanted` is (n_cells,) for each."""
        shared = _shared_units(prompts)
        beginning, _ = _split(prompts[0].runs, shared)
        n_shared = sum(map(_n_cells, beginning))
        kept = np.logical_or.reduce([flags[:n_shared] for flags in wanted])
        tails = [
            _Tail(index, _split(prompt.runs, shared)[1], flags[n_shared:])
            for index, (prompt, flags) in enumerate(zip(prompts, wanted, strict=True))
        ]
        groups = list(_groups(tails))
        found: list[States] = [np.empty((0, 0), dtype=np.float32)] * len(prompts)
        with self._turn:
            context = self._reserve(n_shared + max(sum(tail.n_cells for tail in group) for group in groups))
            head, position = self._evaluate(context, beginning, kept, sequence=0, position=0)
            for group in groups:
                for tail, states in zip(group, self._evaluate_group(context, group, position), strict=True):
                    own = wanted[tail.index][:n_shared][kept]
                    found[tail.index] = np.concatenate([head[own], states])
            with self._engine.lock:
                context.forget(0)
        return found

    def _reserve(self, n_cells: int) -> HiddenContext:
        """The context, made anew where it is too small."""
        with self._engine.lock:
            if self._context is None or self._context.options.n_ctx < n_cells:
                self.close()
                n_ctx = min(-(-n_cells // _GRANULE) * _GRANULE, self._engine.text.context_length)
                options = replace(
                    self._engine.options, n_ctx=n_ctx, n_sequences=_SEQUENCES, n_outputs=min(self._n_outputs, n_ctx)
                )
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
        found: list[States] = []
        done = 0
        for run in _pieces(runs):
            count = _n_cells(run)
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
        width = self._engine.text.width
        return np.concatenate(found) if found else np.empty((0, width), dtype=np.float32), position

    def close(self) -> None:
        """Free the context; may be called twice. The caller holds the engine's lock, or is its last user."""
        if self._context is not None:
            self._context.close()
            self._context = None


def _shared_units(prompts: Sequence[Prompt]) -> int:
    """How many units all prompts begin with, leaving each at least one of its own."""
    lists = [list(prompt.units()) for prompt in prompts]
    if len(lists) == 1:
        return 0
    first, longest = lists[0], min(map(len, lists)) - 1
    return next((n for n in range(longest) if any(units[n] != first[n] for units in lists)), longest)


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


def _groups(tails: Iterable[_Tail]) -> Iterator[list[_Tail]]:
    """Tails that go into one batch, the longest first; one that does not fit a batch goes alone."""
    group: list[_Tail] = []
    for tail in sorted(tails, key=lambda tail: (-tail.n_cells, tail.index)):
        full = len(group) == _SEQUENCES - 1 or sum(one.n_cells for one in group) + tail.n_cells > BATCH_TOKENS
        if group and (full or not tail.packable or not group[0].packable):
            yield group
            group = []
        group.append(tail)
    if group:
        yield group


def _pieces(runs: Iterable[Run]) -> Iterator[Run]:
    """Runs cut to the size of one batch; rows are so already."""
    for run in runs:
        if isinstance(run, TokenRun):
            for start in range(0, len(run.tokens), BATCH_TOKENS):
                yield TokenRun(run.tokens[start : start + BATCH_TOKENS])
        else:
            yield run


def _n_cells(run: Run) -> int:
    return len(run.tokens) if isinstance(run, TokenRun) else run.stop - run.start


def _tokens(run: Run) -> NDArray[np.int32]:
    return np.asarray(run.tokens if isinstance(run, TokenRun) else (), dtype=np.int32)
