"""Vectors for retrieval: texts, pictures and both together, pooled from the text model's hidden states."""

import asyncio
import logging
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from os import PathLike
from types import TracebackType
from typing import Any, Final, Literal, overload

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self, Unpack

from lookonce.embedding import ImageEmbedding
from lookonce.encoding import ArrayOptions, EncodeOptions, Encoding, check_flag
from lookonce.engine import Engine
from lookonce.errors import ClosedError, InputError, NotFiniteError
from lookonce.item import (
    Item,
    Picture,
    WantedItem,
    check_number,
    checked_instruction,
    checked_picture,
    checked_pictures,
    checked_text,
    kind_of,
    number_error,
    read_items,
)
from lookonce.looker import LookOptions, PendingLook
from lookonce.model import Model
from lookonce.native.hidden import layer_tensor
from lookonce.pooling import Pooling, check_pooling, cut, normalize, pool
from lookonce.principal import Principal
from lookonce.prompt import Message, Part, Prompt, RowRun, count
from lookonce.states import StateRunner, check_room
from lookonce.terminal import bar

logger = logging.getLogger(__name__)

Vector = NDArray[np.float32]
PromptStyle = Literal["chat", "plain"]
PooledTokens = Literal["all", "text", "image"]

# Qwen3-VL-Embedding's own prompt: QwenLM/Qwen3-VL-Embedding, src/models/qwen3_vl_embedding.py.
DEFAULT_INSTRUCTION: Final = "Represent the user's input."
_REMEDY: Final = "shorten the text, or make the embedder with truncate=True"
_CHANGE: Final = "leave it out, or write it otherwise"
_PROBE: Final = "a"  # a text that every sound model takes
_NAMED_CHARACTERS: Final = 40  # of a text, to tell it from others
_STATES_AT_ONCE: Final = 16_384  # hidden states in memory before they are pooled: 128 MB for a model of 2 B
_ROWS_AT_ONCE: Final = 4096  # image rows in memory before they are evaluated: 64 MB for a model of 2 B


def _ignore(_: int) -> None:
    """Stands where nobody wants to know how much is done."""


class Embedder:
    """Makes vectors with a loaded model. Safe to use from several threads.

    pooling: which hidden state, or what of all, becomes the vector: `last`, `mean`, `cls` (the first) or `max`; None is
        what the model's card says, else `last`.
    layer: whose output is pooled: -1 is the last, after the final norm; others by number from 0 or from the end.
    tokens: what is pooled: `all`, `text` (all that is no image row) or `image` rows.
    normalize: divide each vector by its L2 norm.
    dimension: keep this many values of each vector (before the norm); None is the model's width.
    instruction: what the model is told about the task; None is the card's, else `Represent the user's input.`
    prompt: `chat` is the prompt of Qwen3-VL-Embedding through the model's chat template, `plain` only the input, after
        an instruction if one is given; None is the card's, else `chat`.
    min_pixels, max_pixels: as `Model.look` takes them.
    truncate: cut a text that does not fit the context, with a warning in the log, where otherwise it is an error.
    pca: a scikit-learn PCA, or a file that `save_pca` wrote, fitted on what this embedder gives without it (and without
        `dimension`), normalised or not; what it gives is cut, and normalised again.

    Raises InputError for an option that the model cannot serve. The memory of its context, as large as the work so
    far needed, is given back by `close` or at the end of a `with` block, and with the model's.

    >>> embedder = Embedder(model, pooling="last")                         # doctest: +SKIP
    >>> embedder.embed_text("a cat") @ embedder.embed_image("cat.jpg")     # doctest: +SKIP
    """

    def __init__(
        self,
        model: Model,
        *,
        pooling: Pooling | None = None,
        layer: int = -1,
        tokens: PooledTokens = "all",
        normalize: bool = True,
        dimension: int | None = None,
        instruction: str | None = None,
        prompt: PromptStyle | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        truncate: bool = False,
        pca: object | str | PathLike[str] | None = None,
    ) -> None:
        if not isinstance(model, Model):
            raise InputError(f"model is {kind_of(model)}: load one with lookonce.load and give that")
        self._engine = model.engine
        if (card := model.card) is not None:
            if instruction is None and prompt in (None, card.prompt or "chat"):  # it belongs to the card's prompt
                instruction = card.instruction
            pooling = card.pooling if pooling is None else pooling
            prompt = card.prompt if prompt is None else prompt
        pooling, prompt = "last" if pooling is None else pooling, "chat" if prompt is None else prompt
        self._pooling = check_pooling(pooling)
        self._layer, _ = layer_tensor(self._engine.text, layer)
        _check_choice("tokens", tokens, ("all", "text", "image"))
        _check_choice("prompt", prompt, ("chat", "plain"))
        self._tokens = tokens
        self._normalize = check_flag("normalize", normalize)
        self._pca = None if pca is None else Principal.of(pca, self._engine.text.width)
        width = self._engine.text.width if self._pca is None else self._pca.dimension
        self.dimension: Final = width if dimension is None else check_number("dimension", dimension, width)
        self._instruction = checked_instruction(instruction)
        self._style = prompt
        self._look_options = LookOptions(min_pixels, max_pixels)
        self._engine.looker.check_options(self._look_options)
        self._truncate = check_flag("truncate", truncate)
        self._one_each = self._pooling in ("last", "cls")
        self._runner = StateRunner(self._engine, layer, one_each=self._one_each)
        self._closed = False

    @property
    def model_name(self) -> str:
        """The text model's own name."""
        return self._engine.name

    def settings(self) -> dict[str, object]:
        """What a text's vector depends on, in the types of JSON; the first time it reads the model's file."""
        return {
            "model": self._engine.name,
            "fingerprint": self._engine.fingerprint,
            "pooling": self._pooling,
            "layer": self._layer,
            "tokens": self._tokens,
            "normalize": self._normalize,
            "dimension": self.dimension,
            "prompt": self._style,
            "instruction": self._instruction,
            "pca": None if self._pca is None else self._pca.digest(),
        }

    def get_embedding_dimension(self) -> int:
        """`dimension`, as sentence-transformers spells it."""
        return self.dimension

    def embed_text(self, text: str, *, instruction: str | None = None) -> Vector:
        """Vector of a text, (dimension,)."""
        return self._one(WantedItem(checked_text("text", text), (), checked_instruction(instruction)))

    def embed_image(self, image: Picture, *, instruction: str | None = None) -> Vector:
        """Vector of a picture, (dimension,)."""
        return self._one(WantedItem("", (checked_picture(image),), checked_instruction(instruction)))

    def embed_multimodal(
        self, text: str, images: Picture | list[Picture] | tuple[Picture, ...], *, instruction: str | None = None
    ) -> Vector:
        """Vector of a text with one picture or several, which stand before it, (dimension,)."""
        pictures = checked_pictures(images if isinstance(images, list | tuple) else [images])
        return self._one(WantedItem(checked_text("text", text), pictures, checked_instruction(instruction)))

    def embed_batch(
        self,
        items: Iterable[str | Item],
        *,
        batch_size: int = 256,
        progress: Callable[[int, int], None] | None = None,
    ) -> Vector:
        """Vectors of many items, (n, dimension), in their order.

        batch_size: how many items at most are evaluated before the next; it changes speed and memory, not the vectors.
        progress: is told how many of how many are done.

        Raises InputError, with the item's number from 0, for one that cannot be embedded.
        """
        wanted = read_items(items)
        if not wanted:
            raise InputError("there is nothing to embed: give at least one item")
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, len(wanted))

        return self._vectors(wanted, batch_size=batch_size, advance=advance)

    async def aembed_text(self, text: str, *, instruction: str | None = None) -> Vector:
        """`embed_text` without blocking the event loop."""
        return await asyncio.to_thread(self.embed_text, text, instruction=instruction)

    async def aembed_image(self, image: Picture, *, instruction: str | None = None) -> Vector:
        """`embed_image` without blocking the event loop."""
        return await asyncio.to_thread(self.embed_image, image, instruction=instruction)

    async def aembed_multimodal(
        self, text: str, images: Picture | list[Picture] | tuple[Picture, ...], *, instruction: str | None = None
    ) -> Vector:
        """`embed_multimodal` without blocking the event loop."""
        return await asyncio.to_thread(self.embed_multimodal, text, images, instruction=instruction)

    async def aembed_batch(
        self,
        items: Iterable[str | Item],
        *,
        batch_size: int = 256,
        progress: Callable[[int, int], None] | None = None,
    ) -> Vector:
        """`embed_batch` without blocking the event loop; `progress` is called in another thread."""
        return await asyncio.to_thread(self.embed_batch, items, batch_size=batch_size, progress=progress)

    @overload
    def encode(
        self,
        sentences: str | Item | Sequence[str | Item],
        *,
        convert_to_tensor: Literal[False] = False,
        **options: Unpack[ArrayOptions],
    ) -> Vector: ...

    @overload
    def encode(
        self,
        sentences: str | Item | Sequence[str | Item],
        *,
        convert_to_tensor: Literal[True],
        **options: Unpack[ArrayOptions],
    ) -> Any: ...

    def encode(self, sentences: str | Item | Sequence[str | Item], **options: Unpack[EncodeOptions]) -> Any:
        """Vectors as sentence-transformers' `encode` gives them: (dimension,) for one input, (n, dimension) for many.

        prompt: the instruction; a prompt_name is refused.
        batch_size: as `embed_batch` takes it.
        show_progress_bar: draw one on a terminal's stderr.
        normalize_embeddings, truncate_dim: replace the embedder's `normalize`, and shorten its `dimension`.
        convert_to_tensor: give a torch tensor, on the CPU.
        device: the model's own; precision, output_value, convert_to_numpy: their defaults alone.
        """
        given = Encoding(**options)
        given.check_device(self._engine.device_names)
        single = isinstance(sentences, str | Mapping)
        wanted = read_items([sentences] if isinstance(sentences, str | Mapping) else sentences, given.prompt)
        dimension = self.dimension
        if given.truncate_dim is not None:
            dimension = check_number("truncate_dim", given.truncate_dim, dimension)
        drawn = bar(total=len(wanted), what="Embedding") if given.show_progress_bar else nullcontext(_ignore)
        with drawn as advance:
            vectors = self._vectors(
                wanted,
                batch_size=given.batch_size,
                dimension=dimension,
                normalized=given.normalize_embeddings,
                advance=advance,
            )
        return given.converted(np.asarray(vectors[0]) if single else vectors)

    def prompts(self, items: Iterable[str | Item]) -> list[Prompt]:
        """What is evaluated for items, their pictures looked at, in their order."""
        self._check_open()
        looks = _CallLooks(self._engine, self._look_options)
        return [self._prompt(item, looks) for item in read_items(items)]

    def save_pca(self, path: str | PathLike[str]) -> None:
        """Write the PCA in use to a `.npz` file. Raises InputError where there is none."""
        if self._pca is None:
            raise InputError("this embedder has no PCA to save: make it with pca=")
        self._pca.save(path)

    def close(self) -> None:
        """Give the memory of the embedder's context back; may be called twice."""
        self._closed = True
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the embedder is closed: make it again with lookonce.Embedder(model)")
        self._engine.check_open()

    def _one(self, wanted: WantedItem) -> Vector:
        return np.asarray(self._vectors([wanted])[0])

    def _vectors(
        self,
        wanted: Sequence[WantedItem],
        *,
        batch_size: int = 256,
        dimension: int | None = None,
        normalized: bool | None = None,
        advance: Callable[[int], object] = _ignore,
    ) -> Vector:
        self._check_open()
        check_number("batch_size", batch_size, None)
        dimension = self.dimension if dimension is None else dimension
        vectors = np.empty((len(wanted), dimension), dtype=np.float32)
        for numbers, prompts in self._batches(wanted, batch_size):
            try:
                vectors[numbers] = cut(self._evaluate(prompts), dimension)
            except NotFiniteError:
                pairs = [(wanted[number], prompt) for number, prompt in zip(numbers, prompts, strict=True)]
                self._blame(sorted(pairs, key=lambda pair: pair[0].number or 0))
                raise
            advance(len(numbers))
        return normalize(vectors) if (self._normalize if normalized is None else normalized) else vectors

    def _batches(self, wanted: Sequence[WantedItem], batch_size: int) -> Iterator[tuple[list[int], list[Prompt]]]:
        """Places and prompts of what is evaluated together."""
        looks = _CallLooks(self._engine, self._look_options)
        places: list[int] = []
        prompts: list[Prompt] = []
        n_rows = n_states = 0
        for place in _order(wanted):
            prompt = self._prompt(wanted[place], looks)
            places.append(place)
            prompts.append(prompt)
            n_rows += prompt.n_rows
            n_states += 1 if self._one_each else prompt.n_tokens + prompt.n_rows
            if len(prompts) == batch_size or n_rows >= _ROWS_AT_ONCE or n_states >= _STATES_AT_ONCE:
                yield places, prompts
                places, prompts = [], []
                n_rows = n_states = 0
        if prompts:
            yield places, prompts

    def _evaluate(self, prompts: Sequence[Prompt]) -> Vector:
        """Vectors of prompts, neither cut nor normalised."""
        states = self._runner.run(prompts, [self._flags(prompt) for prompt in prompts])
        pooled = np.stack([pool(one, self._pooling) for one in states])
        if self._pca is not None:
            pooled = self._pca.apply(normalize(pooled) if self._normalize else pooled)
        return pooled

    def _blame(self, failed: Sequence[tuple[WantedItem, Prompt]]) -> None:
        """Of items that failed together, raise the error of the first that fails alone, if other texts do not fail."""
        probe = self._engine.plain_prompt(self._render(None, (_PROBE,)))
        last = np.zeros(probe.n_tokens, dtype=np.bool_)
        last[-1] = True
        if self._fails([probe], [last]):
            return
        while len(failed) > 1:
            half = failed[: len(failed) // 2]
            failed = half if self._fails(*self._flagged(half)) else failed[len(half) :]
        if self._fails(*self._flagged(failed)):
            told = NotFiniteError(
                f"{self._engine.name} gave values for it that are not finite, but not for others: {_CHANGE}"
            )
            number = failed[0][0].number
            raise told if number is None else number_error(told, number) from told

    def _flagged(self, pairs: Sequence[tuple[WantedItem, Prompt]]) -> tuple[list[Prompt], list[NDArray[np.bool_]]]:
        prompts = [prompt for _, prompt in pairs]
        return prompts, [self._flags(prompt) for prompt in prompts]

    def _fails(self, prompts: Sequence[Prompt], flags: Sequence[NDArray[np.bool_]]) -> bool:
        try:
            self._runner.run(prompts, flags)
        except NotFiniteError:
            return True
        return False

    def _flags(self, prompt: Prompt) -> NDArray[np.bool_]:
        """Which cells of a prompt are evaluated for the pooling: all of the chosen kind, or the one that it takes."""
        chosen = self._chosen(prompt)
        if self._pooling in ("last", "cls"):
            place = np.flatnonzero(chosen)[-1 if self._pooling == "last" else 0]
            chosen = np.zeros_like(chosen)
            chosen[place] = True
        return chosen

    def _chosen(self, prompt: Prompt) -> NDArray[np.bool_]:
        rows = np.concatenate([np.full(run.n_cells, isinstance(run, RowRun)) for run in prompt.runs])
        if self._tokens == "all":
            return np.ones_like(rows)
        return rows if self._tokens == "image" else ~rows

    def _prompt(self, item: WantedItem, looks: "_CallLooks") -> Prompt:
        """An item's prompt, its pictures looked at. Raises InputError's kinds, with the item's number if it has one."""
        try:
            self._check_poolable(item)
            prepared = [looks.prepare(picture) for picture in item.pictures]
            if prepared:  # before they cost work
                parts = self._render(item.instruction, (*prepared, "" if self._truncate else item.text))
                check_room(*count(parts, self._engine.text.tokenize), self._engine.n_ctx, _REMEDY)
            return self._fitted(item, [looks.finish(one) for one in prepared])
        except (InputError, NotFiniteError) as error:
            raise error if item.number is None else number_error(error, item.number) from error

    def _check_poolable(self, item: WantedItem) -> None:
        if self._tokens == "image" and not item.pictures:
            raise InputError("tokens is 'image', but there is no picture: give one, or pool other tokens")

    def _fitted(self, item: WantedItem, looks: Sequence[ImageEmbedding]) -> Prompt:
        """The item's prompt; of a text that does not fit the context, as much as does if `truncate` says so."""
        engine, text = self._engine, item.text
        n_before = n_tokens = 0
        while True:
            prompt = engine.plain_prompt(self._render(item.instruction, (*looks, text)))
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

    def _render(self, instruction: str | None, parts: Sequence[Part]) -> tuple[Part, ...]:
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


def _order(wanted: Sequence[WantedItem]) -> list[int]:
    """Places in the order of work: texts of one length side by side, then pictures, those of the same one likewise."""
    first: dict[object, int] = {}

    def rank(place: int) -> tuple[bool, int, int]:
        item = wanted[place]
        if not item.pictures:
            return False, 0, -len(item.text)
        picture = item.pictures[0]
        name = str(picture) if isinstance(picture, str | PathLike) else id(picture)
        return True, first.setdefault(name, place), -len(item.text)

    return sorted(range(len(wanted)), key=rank)


class _CallLooks:
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
        while len(self._held) > 1 and sum(one.n_rows for one in self._held.values()) > _ROWS_AT_ONCE:
            self._held.popitem(last=False)
        return look


def _ended(instruction: str) -> str:
    """The instruction with a full stop where it ends without punctuation, as Qwen3-VL-Embedding has it."""
    instruction = instruction.strip()
    return instruction if unicodedata.category(instruction[-1]).startswith("P") else instruction + "."


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} is {value!r}: choose one of {', '.join(choices)}")
