"""A reply: what it tells, and how it comes about token by token, until something ends it."""

import codecs
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from lookonce.embedding import ImageEmbedding
from lookonce.engine import Engine
from lookonce.kept_state import Origin
from lookonce.native.sampler import Sampler
from lookonce.sampling import Sampling
from lookonce.turn import Turn

FinishReason = Literal["stop", "length", "closed"]


@dataclass(frozen=True, slots=True)
class Usage:
    """What a reply took of the context, in cells: text tokens, image rows and generated tokens.

    `reused` of the prompt's were not evaluated again: `prefix` says whether they were still in memory, or came from
    the store or a saved chat's file.
    """

    text_tokens: int
    image_rows: int
    generated: int
    reused: int
    prefix: Origin = "evaluated"


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a reply's time went, in seconds.

    `look_s` finds or encodes the pictures, `prefill_s` evaluates the prompt, `first_token_s` is all from the call to
    the first token, `generation_s` all after it.
    """

    look_s: float
    prefill_s: float
    first_token_s: float
    generation_s: float


@dataclass(frozen=True, slots=True)
class ImageUse:
    """A picture of a reply's prompt, and where its look came from."""

    key: str
    source: Literal["encoded", "store", "file"]
    rows: int


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer. `finish_reason` is `stop` where the model or a stop text ended it, `length` where a
    limit did, `closed` where the stream was not read to its end."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    images: tuple[ImageUse, ...]

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Asked:
    """One question on its way: when it came, when its pictures had been looked at, and what to do with the answer."""

    started: float
    looked: float
    looks: tuple[ImageEmbedding, ...]
    turn: Turn
    answered: Callable[[str], None]


class Answer:
    """One reply in the making. Takes the tokens that are drawn for its turn with its sampler."""

    def __init__(self, engine: Engine, sampling: Sampling, asked: Asked) -> None:
        self._engine = engine
        self._sampling = sampling
        self._asked = asked
        self.turn: Final = asked.turn
        self._sampler: Sampler | None = None
        self.token: int | None = None
        """The token drawn last, which was not evaluated yet."""
        self.open = True
        self._text = StoppedText(sampling.stop_texts)
        self._finish: FinishReason = "closed"
        self._first = self._last = asked.looked

    @property
    def sampler(self) -> Sampler:
        """What draws the tokens, made when first wanted. Raises PromptError for a grammar that cannot be used."""
        if self._sampler is None:
            self._sampler = self._engine.sampler(self._sampling, self.turn.prompt)
        return self._sampler

    def take(self, token: int) -> str:
        """Take the next token; give the text that is certain by it. `open` tells whether more are wanted."""
        self._last = time.perf_counter()
        if self.token is None:
            self._first = self._last
        engine, turn = self._engine, self.turn
        if engine.text.ends_generation(token):
            return self._end("stop")
        self.token = token
        turn.n_drawn += 1
        # A grammar takes a control token for the text of its name.
        piece = self._text.add(engine.text.piece(token, special=self._sampling.has_grammar))
        if self._text.stopped:
            return piece + self._end("stop")
        if turn.n_drawn == self._sampling.max_tokens or turn.n_cells + 1 >= engine.n_ctx:
            return piece + self._end("length")
        return piece

    def _end(self, reason: FinishReason) -> str:
        piece = self._text.rest()
        self._finish = reason
        self.drop()
        self._asked.answered(self._text.given)
        return piece

    def drop(self) -> None:
        """End as if the question had not been asked: the turn does not count. May be called twice."""
        if self.open:
            self.open = False
            self.turn.end()
            if self._sampler is not None:
                self._sampler.close()

    def close(self) -> None:
        """End; the turn counts as far as it came, if it began. May be called twice."""
        if self.open:
            self.drop()
            if self.token is not None:
                self._asked.answered(self._text.given)

    @property
    def reply(self) -> Reply:
        """The reply so far."""
        turn = self.turn
        return Reply(
            text=self._text.given,
            finish_reason=self._finish,
            usage=Usage(turn.prompt.n_tokens, turn.prompt.n_rows, turn.n_drawn, turn.reused_cells, turn.origin),
            timings=Timings(
                look_s=self._asked.looked - self._asked.started,
                prefill_s=self._first - self._asked.looked,
                first_token_s=self._first - self._asked.started,
                generation_s=self._last - self._first,
            ),
            images=tuple(ImageUse(look.key, look.source, look.n_rows) for look in self._asked.looks),
        )


class StoppedText:
    """Turns the bytes of tokens into text, and holds back what could be the beginning of a stop text."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = stops
        self._held = ""
        self.given = ""
        self.stopped = False

    def add(self, data: bytes) -> str:
        """Take a token's bytes; give the text that is certain."""
        self._held += self._decoder.decode(data)
        if found := [place for stop in self._stops if (place := self._held.find(stop)) >= 0]:
            self.stopped = True
            return self._give(min(found), dropped=True)
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        return self._give(len(self._held) - keep)

    def rest(self) -> str:
        """Give what was held back; a text cut inside a character ends in a replacement character."""
        if not self.stopped:
            self._held += self._decoder.decode(b"", final=True)
        return self._give(len(self._held))

    def _give(self, length: int, *, dropped: bool = False) -> str:
        piece, self._held = self._held[:length], "" if dropped else self._held[length:]
        self.given += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
