"""Many questions at once: their common beginning is evaluated once, and all answers go on in one batch."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Final

from typing_extensions import Self

from lookonce.chat import opening
from lookonce.embedding import ImageEmbedding
from lookonce.engine import OVERLAPPING_TURNS, Engine
from lookonce.errors import ClosedError, InputError
from lookonce.images import PictureSource
from lookonce.looker import LookOptions
from lookonce.prompt import Message, name_looks, place_looks
from lookonce.reply import Answer, Asked, Reply
from lookonce.sampling import Sampling
from lookonce.sequences import Sequences
from lookonce.turn import Turn, refuse_overflow

# Cells for each answer under way, before another question is let in: those let in too early are put off again, and what
# was evaluated of them is evaluated anew.
_HEADROOM: Final = 64
_NAMED_CHARACTERS: Final = 40  # of a question that cannot be asked


class ReplyStreams(Iterator[tuple[int, str]]):
    """Replies to many questions as they are generated: pairs of a question's number, from 0, and a piece of its reply.

    The pieces of one question come in order; those of several are mixed. Closing it, or an exception in the loop over
    it, leaves the model as usable as before. One that is forgotten is closed.
    """

    def __init__(self, engine: Engine, sampling: Sampling, asked: Sequence[Asked]) -> None:
        self._engine = engine
        answers = tuple(Answer(engine, sampling, one) for one in asked)
        for first in answers[:1]:
            _ = first.sampler  # a grammar that cannot be used is refused now
        self._answers = answers
        self._queue = deque(range(len(answers)))
        self._active: list[int] = []
        self._pieces: deque[tuple[int, str]] = deque()
        self._closed = False
        self._settled = False

    def __next__(self) -> tuple[int, str]:
        while not self._pieces and (self._active or self._queue) and not self._closed:
            try:
                self._step()
            except BaseException as error:
                if isinstance(error, ClosedError) and self._is_closed():  # by another thread, meanwhile
                    break
                self._drop()
                raise
        if self._pieces and not self._closed:
            return self._pieces.popleft()
        self._settle()
        raise StopIteration

    def _is_closed(self) -> bool:
        return self._closed

    def _step(self) -> None:
        """One more token of every answer under way, and the first of those that there is room for."""
        if not self._active:
            self._engine.fetch(self._answers[self._queue[0]].turn.prompt)
        for number in list(self._queue)[: OVERLAPPING_TURNS - len(self._active)]:
            _ = self._answers[number].sampler  # makes it, which needs the lock that is held below
        drawn: list[tuple[int, int]] = []
        with self._engine.together() as (sequences, context):
            self._put_off(sequences)
            self._let_in(sequences)
            answers = [(number, self._answers[number]) for number in self._active]
            for finished in sequences.advance([(answer.turn, answer.token) for _, answer in answers]):
                for place, index in finished:
                    number, answer = answers[place]
                    drawn.append((number, answer.sampler.sample(context, index)))
        for number, token in drawn:
            if piece := self._answers[number].take(token):
                self._pieces.append((number, piece))
        self._active = [number for number in self._active if self._answers[number].open]

    def _put_off(self, sequences: Sequences) -> None:
        """Let the youngest answers wait where there is no room for one token more of each.

        That may take as much as a whole question: of those whose sequence another turn took.
        """
        while len(self._active) > 1 and not sequences.reserve(self._missing(sequences)):
            number = self._active.pop()
            sequences.release(self._answers[number].turn)
            self._queue.appendleft(number)

    def _let_in(self, sequences: Sequences) -> None:
        """Begin as many of the waiting questions as there are sequences and cells for; at least one answer goes on.

        The first comes alone, so that the others find the common beginning evaluated.
        """
        first = not self._active
        n_free = sequences.n_free
        n_cells = self._missing(sequences) + _HEADROOM * len(self._active)
        while self._queue and len(self._active) < OVERLAPPING_TURNS:
            n_cells += sequences.missing_cells(self._answers[self._queue[0]].turn) + _HEADROOM
            if self._active and (first or n_free == 0 or not sequences.reserve(n_cells)):
                return
            self._active.append(self._queue.popleft())
            n_free -= 1

    def _missing(self, sequences: Sequences) -> int:
        return sum(sequences.missing_cells(self._answers[number].turn) for number in self._active)

    @property
    def replies(self) -> list[Reply]:
        """The replies so far, in the order of the questions; whole once the loop has ended."""
        return [answer.reply for answer in self._answers]

    def _drop(self) -> None:
        self._closed = True
        for answer in self._answers:
            answer.drop()

    def _settle(self) -> None:
        if not self._settled:
            self._settled = True
            self._engine.settle()

    def close(self) -> None:
        """Stop generating; `replies` has what came so far. May be called twice."""
        self._drop()
        self._settle()

    def __del__(self) -> None:
        if hasattr(self, "_answers"):  # else it was refused when it was made
            self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def begin_many(
    engine: Engine,
    prompts: Sequence[str],
    images: Sequence[PictureSource | ImageEmbedding],
    *,
    system: str | None,
    options: LookOptions,
    sampling: Sampling,
) -> ReplyStreams:
    """Check all questions, look at the pictures, and make the streams. Raises what `Model.ask_many` raises."""
    started = time.perf_counter()
    before = opening(engine, system)
    prepared = engine.prepare(images, options)
    for number, prompt in enumerate(prompts):
        with _named(number, prompt):
            engine.refuse([*before, Message("user", place_looks(prompt, name_looks(prepared, {}), {}))])
    looks = engine.finish(prepared)
    named = name_looks(looks, {})
    looked = time.perf_counter()
    asked = []
    for number, prompt in enumerate(prompts):
        with _named(number, prompt):
            whole = engine.prompt([*before, Message("user", place_looks(prompt, named, {}))])
            refuse_overflow(whole.n_tokens, whole.n_rows, engine.n_ctx)
        asked.append(Asked(started, looked, tuple(looks), Turn(whole), lambda _text: None))
    return ReplyStreams(engine, sampling, asked)


@contextmanager
def _named(number: int, prompt: str) -> Iterator[None]:
    """Say which question it is that cannot be asked."""
    try:
        yield
    except InputError as error:
        text = f" ({_shortened(prompt)!r})" if isinstance(prompt, str) else ""
        named = type(error)(f"prompts[{number}]{text} cannot be asked: {error}")
        named.item = number
        raise named from error


def _shortened(text: str) -> str:
    return text if len(text) <= _NAMED_CHARACTERS else f"{text[:_NAMED_CHARACTERS]}..."
