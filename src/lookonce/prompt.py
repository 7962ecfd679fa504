"""From messages to what is evaluated: aliases, the model's chat template, and runs of tokens and rows.

Knows nothing of native code: it is given the function that splits text into tokens.
"""

import datetime
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Literal

import jinja2
import numpy as np
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray

from lookonce.embedding import ImageEmbedding, RowSegment, TextSegment
from lookonce.errors import ContextError, PromptError

AUTOMATIC_ALIAS: Final = re.compile(r"<image_\d+>")

Part = str | ImageEmbedding


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation: texts and pictures in the order in which they stand."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Tokens that are evaluated together."""

    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class RowRun:
    """Rows of one look that are evaluated in one call.

    `positions` (n, 3) are relative to where the look's segment starts; `advance` is how far the position moves
    after the run: 0 within a segment, since its later rows start from the same place.
    """

    look: ImageEmbedding
    start: int
    stop: int
    advance: int
    causal: bool

    @property
    def identity(self) -> tuple[str, int, int]:
        """What names these rows wherever they are evaluated."""
        return (self.look.key, self.start, self.stop)

    @property
    def rows(self) -> NDArray[np.float32]:
        """The rows in F32, (n, width)."""
        return np.asarray(self.look.rows[self.start : self.stop], dtype=np.float32)

    @property
    def positions(self) -> NDArray[np.int32]:
        """(t, y, x) of each row, (n, 3)."""
        return self.look.positions[self.start : self.stop]


Run = TokenRun | RowRun
Unit = int | tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A whole prompt, ready to be evaluated."""

    runs: tuple[Run, ...]

    @property
    def n_tokens(self) -> int:
        """Number of text tokens."""
        return sum(len(run.tokens) for run in self.runs if isinstance(run, TokenRun))

    @property
    def n_rows(self) -> int:
        """Number of image rows."""
        return sum(run.stop - run.start for run in self.runs if isinstance(run, RowRun))

    def units(self) -> Iterator[Unit]:
        """What the prompt consists of, to be compared with another's: each token, each run of rows."""
        for run in self.runs:
            if isinstance(run, TokenRun):
                yield from run.tokens
            else:
                yield run.identity


def name_looks(looks: Sequence[ImageEmbedding], known: Mapping[str, ImageEmbedding]) -> dict[str, ImageEmbedding]:
    """Give each look its alias: its own, or `<image_N>` by its place in the conversation.

    `known` are the looks of earlier turns. Raises PromptError where two would share one alias.
    """
    named: dict[str, ImageEmbedding] = {}
    for number, look in enumerate(looks, start=len(known) + 1):
        alias = look.alias or f"<image_{number}>"
        if alias in named or alias in known:
            raise PromptError(f"two pictures have the alias {alias!r}: give each its own")
        named[alias] = look
    return named


def place_looks(text: str, new: Mapping[str, ImageEmbedding], known: Mapping[str, ImageEmbedding]) -> tuple[Part, ...]:
    """Put each picture where its alias stands in `text`; new ones whose alias does not stand there come first.

    Raises PromptError for an alias that no picture has, for one that was chosen and does not stand in the text, and
    for an empty text with no picture.
    """
    if not isinstance(text, str):
        raise PromptError(f"the prompt is a {type(text).__name__}: give a text")
    everything = {**known, **new}
    pattern = "|".join(re.escape(alias) for alias in sorted(everything, key=len, reverse=True))
    parts: list[Part] = []
    used: set[str] = set()
    for piece in re.split(f"({pattern})", text) if pattern else [text]:
        if piece in everything:
            used.add(piece)
            parts.append(everything[piece])
        elif unknown := AUTOMATIC_ALIAS.search(piece):
            have = ", ".join(everything) or "none, as no picture was given"
            raise PromptError(f"the prompt names {unknown[0]}, but the pictures' aliases are: {have}")
        elif piece:
            parts.append(piece)
    unplaced = [alias for alias in new if alias not in used]
    if chosen := [alias for alias in unplaced if not AUTOMATIC_ALIAS.fullmatch(alias)]:
        raise PromptError(f"the alias {chosen[0]!r} does not stand in the prompt: write it where the picture belongs")
    placed = (*(new[alias] for alias in unplaced), *parts)
    if not any(isinstance(part, ImageEmbedding) or part.strip() for part in placed):
        raise PromptError("the prompt is empty and there is no picture: write a question, or give a picture")
    return placed


class ChatTemplate:
    """A model's own Jinja chat template, run in a sandbox as transformers runs it.

    Raises PromptError where the template is missing or cannot be compiled.
    """

    def __init__(self, source: str | None, *, bos: str = "", eos: str = "") -> None:
        if source is None:
            raise PromptError("the text model has no chat template: use an instruct model's GGUF")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals.update(
            raise_exception=_raise_exception, strftime_now=lambda form: datetime.datetime.now().strftime(form)
        )
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise PromptError(f"the model's chat template is not valid Jinja ({error}): use another GGUF") from error
        self._special = {"bos_token": bos, "eos_token": eos}

    def render(self, messages: Sequence[Message]) -> tuple[Part, ...]:
        """Render a conversation up to where the model answers, its pictures standing between the texts.

        Raises PromptError where the template refuses the conversation, or a text holds the template's own mark of a
        picture.
        """
        mark = self._picture_mark
        markup = re.findall(r"<[^<>\s]+>", mark or "")
        pictures: list[ImageEmbedding] = []
        contents: list[dict[str, object]] = []
        for message in messages:
            for part in message.parts:
                if isinstance(part, ImageEmbedding):
                    pictures.append(part)
                elif held := next((one for one in markup if one in part), None):
                    raise PromptError(f"the text holds {held!r}, which only a picture may place: use an alias instead")
            contents.append({"role": message.role, "content": self._content(message, mark)})
        text = self._run(contents)
        pieces = text.split(mark or _OWN_MARK)
        if len(pieces) != len(pictures) + 1:
            raise PromptError(
                f"the model's chat template placed {len(pieces) - 1} of {len(pictures)} pictures: use the GGUF of a "
                "vision-language model"
            )
        merged: list[Part] = [pieces[0]]
        for picture, piece in zip(pictures, pieces[1:], strict=True):
            merged += [picture, piece]
        return tuple(part for part in merged if part)

    @cached_property
    def _picture_mark(self) -> str | None:
        """What the template writes for a picture; None where it knows only texts."""
        probe = [
            {"type": "text", "text": "\ue000"},
            {"type": "image"},
            {"type": "text", "text": "\ue001"},
        ]
        try:
            text = self._run([{"role": "user", "content": probe}])
        except PromptError:
            return None
        found = re.search("\ue000(.+?)\ue001", text, flags=re.DOTALL)
        return found[1].strip() or None if found else None

    def _content(self, message: Message, mark: str | None) -> str | list[dict[str, str]]:
        if all(isinstance(part, str) for part in message.parts):
            return "".join(str(part) for part in message.parts)
        if mark is None:
            return "".join(part if isinstance(part, str) else _OWN_MARK for part in message.parts)
        return [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in message.parts
        ]

    def _run(self, messages: Sequence[Mapping[str, object]]) -> str:
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._special)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise PromptError(f"the model's chat template refuses this conversation: {error}") from error


# For a template that knows only texts; two characters of Unicode's private use, which no user's text should hold.
_OWN_MARK: Final = "\ue002picture\ue003"


@dataclass(slots=True)
class _RunBuilder:
    """Joins neighbouring tokens and cuts rows to the size of one call."""

    batch_size: int
    runs: list[Run] = field(default_factory=list)

    def add_tokens(self, tokens: Sequence[int]) -> None:
        last = self.runs[-1] if self.runs else None
        if isinstance(last, TokenRun):
            self.runs[-1] = TokenRun((*last.tokens, *tokens))
        elif tokens:
            self.runs.append(TokenRun(tuple(tokens)))

    def add_look(self, look: ImageEmbedding) -> None:
        start = 0
        for segment in look.segments:
            if isinstance(segment, TextSegment):
                self.add_tokens(segment.tokens)
            else:
                self._add_rows(look, segment, start)
                start += segment.n_rows

    def _add_rows(self, look: ImageEmbedding, segment: RowSegment, start: int) -> None:
        if not segment.causal and segment.n_rows > self.batch_size:
            raise ContextError(
                f"a picture has {segment.n_rows} rows that must be evaluated together, more than the "
                f"{self.batch_size} of one batch: use a smaller picture or a larger n_ctx"
            )
        end = start + segment.n_rows
        for first in range(start, end, self.batch_size):
            stop = min(first + self.batch_size, end)
            advance = segment.n_positions if stop == end else 0
            self.runs.append(RowRun(look, first, stop, advance, segment.causal))


def assemble(
    parts: Sequence[Part], tokenize: Callable[[str], Sequence[int]], *, bos: int | None, batch_size: int
) -> Prompt:
    """Turn rendered texts and pictures into runs.

    `bos` is put before everything where the model wants it and the template did not write it.
    """
    builder = _RunBuilder(batch_size)
    for part in parts:
        if isinstance(part, ImageEmbedding):
            builder.add_look(part)
        else:
            builder.add_tokens(tokenize(part))
    first = builder.runs[0] if builder.runs else None
    if bos is not None and not (isinstance(first, TokenRun) and first.tokens[0] == bos):
        builder.runs[:1] = (
            [TokenRun((bos, *first.tokens))] if isinstance(first, TokenRun) else [TokenRun((bos,)), *builder.runs[:1]]
        )
    return Prompt(tuple(builder.runs))


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    # transformers' filter: no HTML escapes, no ASCII escapes.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
