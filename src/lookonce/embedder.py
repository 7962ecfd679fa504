"""Vectors for retrieval: texts, pictures and both together, pooled from the text model's hidden states."""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from os import PathLike
from types import TracebackType
from typing import Any, Final, Literal, overload

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self, Unpack

from lookonce.embed_prompt import ROWS_AT_ONCE, CallLooks, PromptMaker, PromptStyle
from lookonce.encoding import ArrayOptions, EncodeOptions, Encoding, check_flag
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
from lookonce.looker import LookOptions
from lookonce.model import Model
from lookonce.native.hidden import layer_tensor
from lookonce.pooling import Pooling, check_pooling, cut, normalize, pool
from lookonce.principal import Principal
from lookonce.prompt import Prompt, RowRun
from lookonce.states import StateRunner
from lookonce.terminal import bar

Vector = NDArray[np.float32]
PooledTokens = Literal["all", "text", "image"]

_CHANGE: Final = "leave it out, or write it otherwise"
_PROBE: Final = "a"  # a text that every sound model takes
_STATES_AT_ONCE: Final = 16_384  # hidden states in memory before they are pooled: 128 MB for a model of 2 B


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
        self._maker = PromptMaker(
            self._engine,
            prompt,
            self._instruction,
            truncate=check_flag("truncate", truncate),
            needs_picture=tokens == "image",
        )
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
        """Vectors of many items, (n, dimension), in their order. Items that come to the same are evaluated once.

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
        looks = CallLooks(self._engine, self._look_options)
        return [self._maker.make(item, looks) for item in read_items(items)]

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
        for places, origins, prompts in self._batches(wanted, batch_size):
            try:
                if prompts:
                    vectors[list(prompts)] = cut(self._evaluate(list(prompts.values())), dimension)
            except NotFiniteError:
                first: dict[int, int] = {}  # place of the first item of each prompt
                for place, origin in sorted(zip(places, origins, strict=True)):
                    if origin in prompts:
                        first.setdefault(origin, place)
                self._blame([(wanted[place], prompts[origin]) for origin, place in first.items()])
                raise
            vectors[places] = vectors[origins]
            advance(len(places))
        return normalize(vectors) if (self._normalize if normalized is None else normalized) else vectors

    def _batches(
        self, wanted: Sequence[WantedItem], batch_size: int
    ) -> Iterator[tuple[list[int], list[int], dict[int, Prompt]]]:
        """Places of what is done together, whose vector each gets, and by place the prompts that equal none before."""
        looks = CallLooks(self._engine, self._look_options)
        first: dict[bytes, int] = {}
        places: list[int] = []
        origins: list[int] = []
        prompts: dict[int, Prompt] = {}
        n_rows = n_states = 0
        for place in _order(wanted):
            prompt = self._maker.make(wanted[place], looks)
            origin = first.setdefault(prompt.digest(), place)
            places.append(place)
            origins.append(origin)
            if origin == place:
                prompts[place] = prompt
                n_rows += prompt.n_rows
                n_states += 1 if self._one_each else prompt.n_tokens + prompt.n_rows
            if len(places) == batch_size or n_rows >= ROWS_AT_ONCE or n_states >= _STATES_AT_ONCE:
                yield places, origins, prompts
                places, origins, prompts = [], [], {}
                n_rows = n_states = 0
        if places:
            yield places, origins, prompts

    def _evaluate(self, prompts: Sequence[Prompt]) -> Vector:
        """Vectors of prompts, neither cut nor normalised."""
        states = self._runner.run(prompts, [self._flags(prompt) for prompt in prompts])
        pooled = np.stack([pool(one, self._pooling) for one in states])
        if self._pca is not None:
            pooled = self._pca.apply(normalize(pooled) if self._normalize else pooled)
        return pooled

    def _blame(self, failed: Sequence[tuple[WantedItem, Prompt]]) -> None:
        """Of items that failed together, raise the error of the first that fails alone, if other texts do not fail."""
        probe = self._engine.plain_prompt(self._maker.render(None, (_PROBE,)))
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


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} is {value!r}: choose one of {', '.join(choices)}")
