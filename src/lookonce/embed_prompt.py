"""What an embedder evaluates for an item: its pictures looked at, its prompt written, its text cut to the context.

Knows nothing of pooling.
"""

import logging
import unicodedata
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, Literal

from lookonce.embedding import ImageEmbedding
from lookonce.engine import Engine
from lookonce.errors import InputError, NotFiniteError
from lookonce.item import Picture, WantedItem, number_error
from lookonce.looker import LookOptions, PendingLook
from lookonce.prompt import Message, Part, Prompt, count
from lookonce.states import check_room

logger = logging.getLogger(__name__)

PromptStyle = Literal["chat", "plain"]

# Qwen3-VL-Embedding's own prompt: QwenLM/Qwen3-VL-Embedding, src/models/qwen3_vl_embedding.py.
DEFAULT_INSTRUCTION: Final = "Represent the user's input."
_REMEDY: Final = "shorten the text, or make the embedder with truncate=True"
_NAMED_CHARACTERS: Final = 40  # of a text, to tell it from others
ROWS_AT_ONCE: Final = 4096  # image rows in memory before they are evaluated: 64 MB for a model of 2 B


class PromptMaker:
    """Makes the prompts of one embedder, which says what the options mean.

    `needs_picture` refuses items that have none, as nothing of them would be pooled.
    """

    def __init__(
        self, engine: Engine, style: PromptStyle, instruction: str | None, *, truncate: bool, needs_picture: bool
    ) -> None:
        self._engine = engine
        self._style = style
        self._instruction = instruction
        self._truncate = truncate
        self._needs_picture = needs_picture

    def make(self, item: WantedItem, looks: "CallLooks") -> Prompt:
        """An item's prompt, its pictures looked at. Raises InputError's kinds, with the item's number if it has one."""
        try:
            self._check_poolable(item)
            prepared = [looks.prepare(picture) for picture in item.pictures]
            if prepared:  # before they cost work
                parts = self.render(item.instruction, (*prepared, "" if self._truncate else item.text))
                check_room(*count(parts, self._engine.text.tokenize), self._engine.n_ctx, _REMEDY)
            return self._fitted(item, [looks.finish(one) for one in prepared])
        except (InputError, NotFiniteError) as error:
            raise error if item.number is None else number_error(error, item.number) from error

    def _check_poolable(self, item: WantedItem) -> None:
        if self._needs_picture and not item.pictures:
            raise InputError("tokens is 'image', but there is no picture: give one, or pool other tokens")

    def _fitted(self, item: WantedItem, looks: Sequence[ImageEmbedding]) -> Prompt:
        """The item's prompt; of a text that does not fit the context, as much as does if `truncate` says so."""
        engine, text = self._engine, item.text
        n_before = n_tokens = 0
        while True:
            prompt = engine.plain_prompt(self.render(item.instruction, (*looks, text)))
            over = prompt.n_tokens + prompt.n_rows - engine.n_ctx
            if over <= 0:
                break
            tokens = engine.text.tokenize(text)
            if not self._truncate or len(tokens) <= over:
                check_room(prompt.n_tokens, prompt.n_rows, engine.n_ctx, _REMEDY)
            n_before, n_tokens = n_before or len(tokens), len(tokens) - over
            kept = b"".join(engine.text.piece(token, special=True) for token in tokens[:n_tokens])
            text = kept.decode("utf-8", errors="ignore")  # a character can be cut in two
            if not text:
                check_room(prompt.n_tokens, prompt.n_rows, engine.n_ctx, _REMEDY)
        if n_before:
            logger.warning(
                "the text that begins with %r was cut from %d tokens to %d to fit the context",
                item.text[:_NAMED_CHARACTERS],
                n_before,
                n_tokens,
            )
        return prompt

    def render(self, instruction: str | None, parts: Sequence[Part]) -> tuple[Part, ...]:
        """What stands in the prompt, for pictures and a text that may be empty."""
        told = self._instruction if instruction is None else instruction
        filled = tuple(part for part in parts if part != "")
        if self._style == "plain":
            plain = filled if told is None else (f"{told}\n", *filled)
            if self._engine.text.chat_template is not None:  # which alone says how a picture is written
                self._engine.template.refuse_markup(Message("user", plain))
            return plain
        messages = [Message("system", (_ended(told or DEFAULT_INSTRUCTION),)), Message("user", filled)]
        return self._engine.template.render(messages)


class CallLooks:
    """The looks of one call: a picture that comes again, near enough to be held still, is not encoded again."""

    def __init__(self, engine: Engine, options: LookOptions) -> None:
        self._engine = engine
        self._options = options
        self._held: OrderedDict[str, ImageEmbedding] = OrderedDict()

    def prepare(self, picture: Picture) -> ImageEmbedding | PendingLook:
        """The picture's look, or the picture made ready for the tower."""
        (prepared,) = self._engine.prepare([picture], self._options)
        return prepared

    def finish(self, prepared: ImageEmbedding | PendingLook) -> ImageEmbedding:
        """The look, through the tower where it is not held."""
        if isinstance(prepared, ImageEmbedding):
            return prepared
        look = self._held.pop(prepared.key, None) or self._engine.finish([prepared])[0]
        self._held[prepared.key] = look
        while len(self._held) > 1 and sum(one.n_rows for one in self._held.values()) > ROWS_AT_ONCE:
            self._held.popitem(last=False)
        return look


def _ended(instruction: str) -> str:
    """The instruction with a full stop where it ends without punctuation, as Qwen3-VL-Embedding has it."""
    instruction = instruction.strip()
    return instruction if unicodedata.category(instruction[-1]).startswith("P") else instruction + "."
