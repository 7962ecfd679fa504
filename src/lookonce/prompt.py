"""From messages to what is evaluated: aliases, the model's chat template, and runs of tokens and rows.

Knows nothing of native code: it is given the function that splits text into tokens.
"""

import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Literal, Protocol, TypeVar

import jinja2
import numpy as np
from blake3 import blake3
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray

from lookonce.embedding import ImageEmbedding, RowSegment, TextSegment
from lookonce.errors import ContextError, PromptError
from lookonce.tensor_file import array_bytes

AUTOMATIC_ALIAS: Final = re.compile(r"<image_\d+>")


class Picture(Protocol):
    """A look, or a picture that was counted and not yet looked at."""

    @property
    def n_rows(self) -> int:
        """Number of image rows; 0 where only the tower will tell."""

    @property
    def alias(self) -> str | None:
        """The text that stands for it in a prompt."""


class Verbatim(str):
    """A text in which the names of special tokens are text like any other."""

    __slots__ = ()


Part = str | Picture
AnyPicture = TypeVar("AnyPicture", bound=Picture)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation: texts and pictures in the order in which they stand."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Tokens that are evaluated together."""

    tokens: tuple[int, ...]

    @property
    def n_cells(self) -> int:
        """Cells of the context that it takes."""
        return len(self.tokens)


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

    def __eq__(self, other: object) -> bool:
        """Whether both give the same rows. A look can be made by hand, so its key alone does not tell."""
        if not isinstance(other, RowRun) or self.identity != other.identity:
            return False
        return self.look is other.look or (
            _same_bytes(self.look.rows[self.start : self.stop], other.look.rows[other.start : other.stop])
            and _same_bytes(self.positions, other.positions)
        )

    def __hash__(self) -> int:
        return hash(self.identity)

    @property
    def n_cells(self) -> int:
        """Cells of the context that it takes: one a row."""
        return self.stop - self.start

    @property
    def identity(self) -> tuple[object, ...]:
        """All that tells it from another, but for the rows themselves and their positions."""
        return (self.look.key, self.start, self.stop, self.advance, self.causal)

    @property
    def rows(self) -> NDArray[np.float32]:
        """The rows in F32, (n, width)."""
        return np.asarray(self.look.rows[self.start : self.stop], dtype=np.float32)

    @property
    def positions(self) -> NDArray[np.int32]:
        """(t, y, x) of each row, (n, 3)."""
        return self.look.positions[self.start : self.stop]


Run = TokenRun | RowRun
Unit = int | RowRun


def _same_bytes(one: NDArray[Any], other: NDArray[Any]) -> bool:
    return one.dtype == other.dtype and np.array_equal(one.view(np.uint8), other.view(np.uint8))


@dataclass(frozen=True)
class Prompt:
    """A whole prompt, ready to be evaluated."""

    runs: tuple[Run, ...]

    @property
    def n_tokens(self) -> int:
        """Number of text tokens."""
        return sum(run.n_cells for run in self.runs if isinstance(run, TokenRun))

    @property
    def n_rows(self) -> int:
        """Number of image rows."""
        return sum(run.n_cells for run in self.runs if isinstance(run, RowRun))

    @cached_property
    def picture_ends(self) -> tuple[int, ...]:
        """The places, in units, that follow the last row of each picture."""
        ends: list[int] = []
        offset = 0
        before: RowRun | None = None
        for run in self.runs:
            offset += len(run.tokens) if isinstance(run, TokenRun) else 1
            if isinstance(run, RowRun):
                if before is not None and run.look is before.look and run.start == before.stop:
                    ends.pop()  # another part of the same picture
                ends.append(offset)
                before = run
        return tuple(ends)

    def units(self) -> Iterator[Unit]:
        """What the prompt consists of, to be compared with another's: each token, each run of rows."""
        for run in self.runs:
            if isinstance(run, TokenRun):
                yield from run.tokens
            else:
                yield run

    def digest(self) -> bytes:
        """The same for prompts of the same runs alone: 32 bytes to keep, where a picture's rows are megabytes."""
        digest = blake3()
        for run in self.runs:
            if isinstance(run, TokenRun):
                digest.update(f"{len(run.tokens)} tokens\n".encode())
                digest.update(array_bytes(np.asarray(run.tokens, dtype=np.int32)))
            else:
                rows = run.look.rows[run.start : run.stop]
                digest.update(f"{run.identity} {rows.dtype} {rows.shape}\n".encode())
                digest.update(array_bytes(rows))
                digest.update(array_bytes(run.positions))
        return digest.digest()


def name_looks(looks: Sequence[AnyPicture], known: Mapping[str, Picture]) -> dict[str, AnyPicture]:
    """Give each look its alias: its own, or `<image_N>` by its place in the conversation.

    `known` are the looks of earlier turns. Raises PromptError where two would share one alias.
    """
    named: dict[str, AnyPicture] = {}
    for number, look in enumerate(looks, start=len(known) + 1):
        alias = look.alias or f"<image_{number}>"
        if alias in named or alias in known:
            raise PromptError(f"two pictures have the alias {alias!r}: give each its own")
        named[alias] = look
    return named


def place_looks(text: str, new: Mapping[str, Picture], known: Mapping[str, Picture]) -> tuple[Part, ...]:
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
    if not any(not isinstance(part, str) or part.strip() for part in placed):
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
        except (jinja2.TemplateError, SyntaxError, ValueError, RecursionError) as error:
            raise PromptError(f"the model's chat template is not valid Jinja ({error}): use another GGUF") from error
        self._special = {"bos_token": bos, "eos_token": eos}

    def render(self, messages: Sequence[Message]) -> tuple[Part, ...]:
        """Render a conversation up to where the model answers, its pictures standing between the texts.

        Raises PromptError where the template refuses the conversation, or the user's text holds the template's own
        mark of a picture. A model that wrote the mark itself did so letter by letter, and is given it back so.
        """
        pictures = [part for message in messages for part in message.parts if not isinstance(part, str)]
        contents: list[dict[str, object]] = []
        for message in messages:
            parts = message.parts
            if message.role == "assistant":
                parts = tuple(map(self._veiled, parts))
            else:
                self.refuse_markup(message)
            contents.append({"role": message.role, "content": self._content(parts)})
        text = self._run(contents)
        pieces = text.split(self._picture_mark or _OWN_MARK)
        if len(pieces) != len(pictures) + 1:
            raise PromptError(
                f"the model's chat template placed {len(pieces) - 1} of {len(pictures)} pictures: use the GGUF of a "
                "vision-language model"
            )
        merged: list[Part] = [*self._unveiled(pieces[0])]
        for picture, piece in zip(pictures, pieces[1:], strict=True):
            merged += [picture, *self._unveiled(piece)]
        return tuple(merged)

    def refuse_markup(self, message: Message) -> None:
        """Raise PromptError where a text holds what the template writes for a picture."""
        for part in message.parts:
            if isinstance(part, str) and (held := next((one for one in self._markup if one in part), None)):
                raise PromptError(
                    f"the {message.role}'s text holds {held!r}, which only a picture may place: use an alias instead"
                )

    def _veiled(self, part: Part) -> Part:
        if not isinstance(part, str):
            return part
        for index, one in enumerate(self._markup):
            part = part.replace(one, f"{_VEIL}{chr(_VEILED + index)}")
        return part

    def _unveiled(self, text: str) -> Iterator[str]:
        codes = "".join(chr(_VEILED + index) for index in range(len(self._markup)))
        for number, piece in enumerate(re.split(f"{_VEIL}([{codes}])", text)):
            if number % 2:
                yield Verbatim(self._markup[ord(piece) - _VEILED])
            elif piece:
                yield piece

    @cached_property
    def _markup(self) -> tuple[str, ...]:
        """The parts of the picture's mark, none of which may stand in a text."""
        mark = self._picture_mark or _OWN_MARK
        return tuple(dict.fromkeys(re.findall(r"<[^<>\s]+>", mark))) or (mark,)

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

    def _content(self, parts: Sequence[Part]) -> str | list[dict[str, str]]:
        if all(isinstance(part, str) for part in parts):
            return "".join(str(part) for part in parts)
        if self._picture_mark is None:
            return "".join(part if isinstance(part, str) else _OWN_MARK for part in parts)
        return [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]

    def _run(self, messages: Sequence[Mapping[str, object]]) -> str:
        try:
            # transformers gives tools and documents too, so that a template may ask whether they are none.
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._special
            )
        except _TEMPLATE_FAULTS as error:
            raise PromptError(f"the model's chat template refuses this conversation: {error}") from error


# For a template that knows only texts; two characters of Unicode's private use, which no user's text should hold.
_OWN_MARK: Final = "\ue002picture\ue003"
# What stands in an assistant's text for a part of the picture's mark while the template runs: this and its number.
_VEIL: Final = "\ue004"
_VEILED: Final = 0xE010
_TEMPLATE_FAULTS: Final = (
    *(jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError),
)


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


class Tokenize(Protocol):
    """Splits a text into tokens; with `special` the names of special tokens in it are read."""

    def __call__(self, text: str, /, *, special: bool) -> Sequence[int]:
        """Give the token ids."""


def count(parts: Sequence[Part], tokenize: Tokenize) -> tuple[int, int]:
    """How many text tokens and image rows the parts take at least, pictures that were not looked at yet included."""
    texts = [tokenize(part, special=not isinstance(part, Verbatim)) for part in parts if isinstance(part, str)]
    return sum(map(len, texts)), sum(part.n_rows for part in parts if not isinstance(part, str))


def assemble(parts: Sequence[Part], tokenize: Tokenize, *, bos: int | None, batch_size: int) -> Prompt:
    """Turn rendered texts and looks into runs.

    `bos` is put before everything where the model wants it and the template did not write it. Raises PromptError
    where nothing is left to evaluate.
    """
    builder = _RunBuilder(batch_size)
    for part in parts:
        if isinstance(part, ImageEmbedding):
            builder.add_look(part)
        elif isinstance(part, str):
            builder.add_tokens(tokenize(part, special=not isinstance(part, Verbatim)))
    first = builder.runs[0] if builder.runs else None
    if bos is not None and not (isinstance(first, TokenRun) and first.tokens[0] == bos):
        builder.runs[:1] = (
            [TokenRun((bos, *first.tokens))] if isinstance(first, TokenRun) else [TokenRun((bos,)), *builder.runs[:1]]
        )
    if not builder.runs:
        raise PromptError("the prompt is empty once the model's chat template has made it: write a text")
    return Prompt(tuple(builder.runs))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # transformers' filter: no HTML escapes, no ASCII escapes.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
