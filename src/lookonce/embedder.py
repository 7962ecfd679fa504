"""Vectors for retrieval: texts, pictures and both together, pooled from the text model's hidden states."""

import asyncio
import logging
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypedDict

from lookonce.embedding import ImageEmbedding
from lookonce.errors import ContextError, InputError
from lookonce.images import PictureSource
from lookonce.looker import LookOptions
from lookonce.model import Model
from lookonce.native.hidden import layer_tensor
from lookonce.pooling import Pooling, check_finite, check_pooling, cut, normalize, pool
from lookonce.principal import Principal
from lookonce.prompt import Message, Part, Prompt, RowRun
from lookonce.states import StateRunner

logger = logging.getLogger(__name__)

Vector = NDArray[np.float32]
Picture = PictureSource | ImageEmbedding
PromptStyle = Literal["chat", "plain"]
PooledTokens = Literal["all", "text", "image"]

# Qwen3-VL-Embedding's own prompt: QwenLM/Qwen3-VL-Embedding, src/models/qwen3_vl_embedding.py.
DEFAULT_INSTRUCTION: Final = "Represent the user's input."


class Item(TypedDict, total=False):
    """One thing to embed: a text, one picture or several, or both; `instruction` replaces the embedder's."""

    text: str
    image: Picture
    images: Sequence[Picture]
    instruction: str


@dataclass(frozen=True, slots=True)
class _Wanted:
    """An item in one form: its text, its pictures before it, its instruction."""

    text: str
    pictures: tuple[Picture, ...]
    instruction: str | None


class Embedder:
    """Makes vectors with a loaded model. Safe to use from several threads.

    pooling: which hidden state, or what of all, becomes the vector: `last`, `mean`, `cls` (the first) or `max`.
    layer: whose output is pooled: -1 is the last, after the final norm; others by number from 0 or from the end.
    tokens: what is pooled: `all`, `text` (all that is no image row) or `image` rows.
    normalize: divide each vector by its L2 norm.
    dimension: keep this many values of each vector (before the norm); None is the model's width.
    instruction: what the model is told about the task; None is `Represent the user's input.`
    prompt: `chat` is the prompt of Qwen3-VL-Embedding through the model's chat template, `plain` only the input, after
        an instruction if one is given.
    truncate: cut a text that does not fit the context, with a warning in the log, where otherwise it is an error.
    pca: a fitted scikit-learn PCA, or a file that `save_pca` wrote, applied before `dimension`.

    Raises InputError for an option that the model cannot serve.

    >>> embedder = Embedder(model, pooling="last")                         # doctest: +SKIP
    >>> embedder.embed_text("a cat") @ embedder.embed_image("cat.jpg")     # doctest: +SKIP
    """

    def __init__(
        self,
        model: Model,
        *,
        pooling: Pooling = "last",
        layer: int = -1,
        tokens: PooledTokens = "all",
        normalize: bool = True,
        dimension: int | None = None,
        instruction: str | None = None,
        prompt: PromptStyle = "chat",
        truncate: bool = False,
        pca: object | str | PathLike[str] | None = None,
    ) -> None:
        self._engine = model.engine
        self._pooling = check_pooling(pooling)
        layer_tensor(self._engine.text, layer)
        _check_choice("tokens", tokens, ("all", "text", "image"))
        _check_choice("prompt", prompt, ("chat", "plain"))
        self._tokens = tokens
        self._normalize = normalize
        self._pca = None if pca is None else Principal.of(pca, self._engine.text.width)
        width = self._engine.text.width if self._pca is None else self._pca.dimension
        if dimension is not None and (isinstance(dimension, bool) or not 1 <= dimension <= width):
            raise InputError(f"dimension is {dimension!r}: give a whole number from 1 to {width}")
        self.dimension: Final = dimension or width
        self._instruction = _checked_text("instruction", instruction) if instruction is not None else None
        self._style = prompt
        self._truncate = truncate
        self._runner = StateRunner(self._engine, layer, one_each=pooling in ("last", "cls"))

    @property
    def model_name(self) -> str:
        """The text model's own name."""
        return self._engine.name

    def get_embedding_dimension(self) -> int:
        """`dimension`, as sentence-transformers spells it."""
        return self.dimension

    def embed_text(self, text: str, *, instruction: str | None = None) -> Vector:
        """Vector of a text, (dimension,)."""
        return self._one(_Wanted(_checked_text("text", text), (), instruction))

    def embed_image(self, image: Picture, *, instruction: str | None = None) -> Vector:
        """Vector of a picture, (dimension,)."""
        return self._one(_Wanted("", (_checked_picture(image),), instruction))

    def embed_multimodal(
        self, text: str, images: Picture | Sequence[Picture], *, instruction: str | None = None
    ) -> Vector:
        """Vector of a text with one picture or several, which stand before it, (dimension,)."""
        pictures = tuple(images) if isinstance(images, list | tuple) else (images,)
        return self._one(_Wanted(_checked_text("text", text), tuple(map(_checked_picture, pictures)), instruction))

    def embed_batch(
        self,
        items: Iterable[str | Item],
        *,
        batch_size: int = 256,
        progress: Callable[[int, int], None] | None = None,
    ) -> Vector:
        """Vectors of many items, (n, dimension), in their order.

        batch_size: how many items are looked at and evaluated before the next; it changes speed and memory, not the
            vectors.
        progress: is told how many of how many are done.

        Raises InputError, with the item's number, for one that cannot be embedded.
        """
        wanted = [_read_item(number, item) for number, item in enumerate(items)]
        if not wanted:
            raise InputError("there is nothing to embed: give at least one item")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size is {batch_size!r}: give a whole number of at least 1")
        vectors = np.empty((len(wanted), self.dimension), dtype=np.float32)
        for start in range(0, len(wanted), batch_size):
            part = wanted[start : start + batch_size]
            vectors[start : start + len(part)] = self._vectors(part)
            if progress is not None:
                progress(start + len(part), len(wanted))
        return vectors

    async def aembed_text(self, text: str, *, instruction: str | None = None) -> Vector:
        """`embed_text` without blocking the event loop."""
        return await asyncio.to_thread(self.embed_text, text, instruction=instruction)

    async def aembed_image(self, image: Picture, *, instruction: str | None = None) -> Vector:
        """`embed_image` without blocking the event loop."""
        return await asyncio.to_thread(self.embed_image, image, instruction=instruction)

    async def aembed_multimodal(
        self, text: str, images: Picture | Sequence[Picture], *, instruction: str | None = None
    ) -> Vector:
        """`embed_multimodal` without blocking the event loop."""
        return await asyncio.to_thread(self.embed_multimodal, text, images, instruction=instruction)

    async def aembed_batch(self, items: Iterable[str | Item], *, batch_size: int = 256) -> Vector:
        """`embed_batch` without blocking the event loop."""
        return await asyncio.to_thread(self.embed_batch, items, batch_size=batch_size)

    def encode(
        self,
        sentences: str | Item | Sequence[str | Item],
        *,
        prompt: str | None = None,
        batch_size: int = 256,
        normalize_embeddings: bool | None = None,
    ) -> Vector:
        """Vectors as sentence-transformers' `encode` gives them: (dimension,) for one input, (n, dimension) for many.

        `prompt` is the instruction; `normalize_embeddings` replaces the embedder's `normalize`.
        """
        single = isinstance(sentences, str | Mapping)
        items: Sequence[str | Item] = [sentences] if isinstance(sentences, str | Mapping) else sentences
        wanted = [_read_item(number, item) for number, item in enumerate(items)]
        if not wanted:
            return np.empty((0, self.dimension), dtype=np.float32)
        told = [_Wanted(one.text, one.pictures, one.instruction or prompt) for one in wanted]
        parts = [told[start : start + batch_size] for start in range(0, len(told), batch_size)]
        vectors = np.concatenate([self._vectors(part, normalized=normalize_embeddings) for part in parts])
        return np.asarray(vectors[0]) if single else vectors

    def save_pca(self, path: str | PathLike[str]) -> None:
        """Write the PCA in use to a `.npz` file. Raises InputError where there is none."""
        if self._pca is None:
            raise InputError("this embedder has no PCA to save: make it with pca=")
        self._pca.save(path)

    def _one(self, wanted: _Wanted) -> Vector:
        return np.asarray(self._vectors([wanted])[0])

    def _vectors(self, items: Sequence[_Wanted], *, normalized: bool | None = None) -> Vector:
        pictures = [one for item in items for one in item.pictures]
        looks = iter(self._engine.finish(self._engine.prepare(pictures, LookOptions())))
        prompts = [self._prompt(item, tuple(next(looks) for _ in item.pictures)) for item in items]
        flags = [self._flags(prompt) for prompt in prompts]
        states = self._runner.run(prompts, flags)
        pooled = np.stack([pool(one, self._pooling) for one in states])
        check_finite(pooled, self._engine.name)
        if self._pca is not None:
            pooled = self._pca.apply(pooled)
        vectors = cut(pooled, self.dimension)
        return normalize(vectors) if (self._normalize if normalized is None else normalized) else vectors

    def _flags(self, prompt: Prompt) -> NDArray[np.bool_]:
        """Which cells of a prompt are evaluated for the pooling: all of the chosen kind, or the one that it takes."""
        rows = np.concatenate([np.full(_n_cells(run), isinstance(run, RowRun)) for run in prompt.runs])
        chosen = {"all": np.ones_like(rows), "text": ~rows, "image": rows}[self._tokens]
        places = np.flatnonzero(chosen)
        if not len(places):
            raise InputError(
                f"tokens is {self._tokens!r}, but an item has none: give it a picture, or pool other tokens"
            )
        if self._pooling in ("last", "cls"):
            chosen = np.zeros_like(chosen)
            chosen[places[-1 if self._pooling == "last" else 0]] = True
        return chosen

    def _prompt(self, item: _Wanted, looks: tuple[ImageEmbedding, ...]) -> Prompt:
        text = item.text
        while True:
            prompt = self._render(item.instruction, (*looks, text) if text else looks)
            over = prompt.n_tokens + prompt.n_rows - self._engine.n_ctx
            if over <= 0:
                return prompt
            tokens = self._engine.text.tokenize(text)
            if not self._truncate or len(tokens) <= over:
                raise ContextError(
                    f"an item has {prompt.n_tokens} tokens and {prompt.n_rows} image rows, but the context holds "
                    f"{self._engine.n_ctx}: shorten it, make the embedder with truncate=True, or load the model with a "
                    "larger n_ctx"
                )
            logger.warning("a text of %d tokens was cut to %d to fit the context", len(tokens), len(tokens) - over)
            kept = b"".join(self._engine.text.piece(token, special=True) for token in tokens[:-over])
            text = kept.decode("utf-8", errors="ignore")

    def _render(self, instruction: str | None, parts: tuple[Part, ...]) -> Prompt:
        told = self._instruction if instruction is None else instruction
        if self._style == "plain":
            return self._engine.plain_prompt(parts if told is None else (f"{told}\n", *parts))
        told = _ended(told or DEFAULT_INSTRUCTION)
        return self._engine.prompt([Message("system", (told,)), Message("user", parts)])


def _ended(instruction: str) -> str:
    """The instruction with a full stop where it ends without punctuation, as Qwen3-VL-Embedding has it."""
    instruction = instruction.strip()
    return instruction if unicodedata.category(instruction[-1]).startswith("P") else instruction + "."


def _n_cells(run: object) -> int:
    return run.stop - run.start if isinstance(run, RowRun) else len(getattr(run, "tokens", ()))


def _read_item(number: int, item: str | Item) -> _Wanted:
    try:
        return _checked_item({"text": item} if isinstance(item, str) else item)
    except InputError as error:
        raise InputError(f"item {number} cannot be embedded: {error}") from error


def _checked_item(item: Item) -> _Wanted:
    if not isinstance(item, Mapping):
        raise InputError(f"it is a {type(item).__name__}: give a text or a mapping with text, image or images")
    if unknown := set(item) - set(Item.__annotations__):
        raise InputError(f"it has the key {min(map(str, unknown))!r}: use text, image, images, instruction")
    text, instruction = item.get("text"), item.get("instruction")
    pictures = [item["image"]] if item.get("image") is not None else []
    pictures += item.get("images") or []
    if text is None and not pictures:
        raise InputError("it has neither a text nor a picture: give one of them")
    return _Wanted(
        "" if text is None else _checked_text("text", text),
        tuple(map(_checked_picture, pictures)),
        None if instruction is None else _checked_text("instruction", instruction),
    )


def _checked_text(name: str, text: object) -> str:
    if not isinstance(text, str):
        raise InputError(f"{name} is a {type(text).__name__}: give a text")
    if not text.strip():
        raise InputError(f"{name} is empty: write something")
    return text


def _checked_picture(picture: Picture) -> Picture:
    if picture is None:
        raise InputError("a picture is None: give a path, bytes, an image, an array or a look")
    return picture


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name} is {value!r}: choose one of {', '.join(choices)}")
