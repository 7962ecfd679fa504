"""Loading a model, and the one object that answers for it."""

import os
from collections.abc import Sequence
from os import PathLike, fspath
from types import TracebackType
from typing import Final, Literal, overload

from typing_extensions import Self, Unpack

from lookonce.ask_many import ReplyStreams, begin_many
from lookonce.cards import ModelCard
from lookonce.chat import Chat, Images, ReplyStream, checked_images
from lookonce.embedding import ImageEmbedding
from lookonce.engine import Engine, LoadOptions
from lookonce.errors import InputError, PromptError
from lookonce.images import PictureSource
from lookonce.looker import LookOptions, RowType
from lookonce.model_files import ModelFiles, find_files
from lookonce.native.text import KvType
from lookonce.prefix_store import StateMode
from lookonce.reply import Reply
from lookonce.retype import wanted_type
from lookonce.sampling import Sampling, SamplingOptions, refuse_unknown
from lookonce.store import Store
from lookonce.trial import try_model

_BESIDE_SAMPLING: Final = ("images", "system", "min_pixels", "max_pixels", "stream")  # what `ask` takes with them


class Model:
    """A loaded vision-language model. Make it with `lookonce.load`.

    Safe to use from several threads: they take turns at native work. Close it, or use it in a `with` block, to give
    its memory back.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine: Final = engine
        """What the library's other parts work with; not part of the promise."""

    @property
    def name(self) -> str:
        """The text model's own name."""
        return self.engine.name

    @property
    def card(self) -> ModelCard | None:
        """The model's card, whose options hold where the caller gives none; None for a model without one."""
        return self.engine.card

    @property
    def n_ctx(self) -> int:
        """Tokens and image rows that the context holds."""
        return self.engine.n_ctx

    @property
    def tower_loaded(self) -> bool:
        """Whether the vision tower has been loaded; it is, on the first picture that the store does not hold."""
        return self.engine.looker.tower_loaded

    def look(
        self,
        picture: PictureSource | ImageEmbedding,
        *,
        alias: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        dtype: RowType = "f16",
    ) -> ImageEmbedding:
        """Look at a picture: from the store where it was seen before, else through the vision tower.

        picture: a path, a file's bytes, a PIL image, a uint8 array (H, W, 3), a saved look's path, or a look.
        alias: the text that stands for the picture in prompts, e.g. `<cat>`.
        min_pixels, max_pixels: replace the card's limits or the family's own; the picture is resized to fit them.
        dtype: the type in which rows are kept, `f16` or `f32`.

        Raises PictureError, ModelFileError without a projector, MismatchError for a look of another model.
        """
        look = self.engine.look(picture, LookOptions(min_pixels, max_pixels, dtype))
        return look if alias is None else look.with_alias(alias)

    @overload
    def ask(
        self,
        prompt: str,
        images: Images = (),
        *,
        system: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        stream: Literal[False] = False,
        **options: Unpack[SamplingOptions],
    ) -> Reply: ...

    @overload
    def ask(
        self,
        prompt: str,
        images: Images = (),
        *,
        system: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        stream: Literal[True],
        **options: Unpack[SamplingOptions],
    ) -> ReplyStream: ...

    def ask(
        self,
        prompt: str,
        images: Images = (),
        *,
        system: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        stream: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> Reply | ReplyStream:
        """Ask one question about pictures, or about none: a conversation of one turn.

        images: as `look` takes them. A picture stands where its alias stands in the prompt: its own, or `<image_1>`,
            `<image_2>` by its place in the list. The others come before the text, in order.
        system: what the model is told beforehand.
        stream: give the reply piece by piece, as it is generated.
        options: those of `lookonce.Sampling`: max_tokens, temperature, top_p, top_k, min_p, repeat_penalty, seed,
            stop, json_schema, grammar.

        Raises what `Chat.ask` raises.
        """
        refuse_unknown(options, *_BESIDE_SAMPLING)
        chat = self.chat(images, system=system, min_pixels=min_pixels, max_pixels=max_pixels)
        return chat.ask(prompt, stream=True, **options) if stream else chat.ask(prompt, **options)

    def chat(
        self,
        images: Images = (),
        *,
        system: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Chat:
        """Begin a conversation; `images` belong to its first turn, and later turns may bring more."""
        return Chat(self.engine, images=images, system=system, look=LookOptions(min_pixels, max_pixels))

    @overload
    def ask_many(
        self,
        prompts: Sequence[str],
        images: Images = (),
        *,
        system: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        stream: Literal[False] = False,
        **options: Unpack[SamplingOptions],
    ) -> list[Reply]: ...

    @overload
    def ask_many(
        self,
        prompts: Sequence[str],
        images: Images = (),
        *,
        system: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        stream: Literal[True],
        **options: Unpack[SamplingOptions],
    ) -> ReplyStreams: ...

    def ask_many(
        self,
        prompts: Sequence[str],
        images: Images = (),
        *,
        system: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        stream: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> list[Reply] | ReplyStreams:
        """Ask many questions about the same pictures, or about none; give the replies in the order of the questions.

        Each question is one of its own, as `ask` asks it, with the same options; what they begin with is evaluated
        once, and up to 32 answers go on together, the next question taking the place of one that has finished. Sums
        are rounded otherwise than one after the other, so that near the edge a word may differ.

        stream: give pairs of a question's number, from 0, and a piece of its reply, as they are generated;
            `ReplyStreams.replies` has the replies.

        Raises what `ask` raises, with the question and its place in `prompts`, before any is answered.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise PromptError(f"prompts is a {type(prompts).__name__}: give a list of questions")
        refuse_unknown(options, *_BESIDE_SAMPLING)
        look = LookOptions(min_pixels, max_pixels)
        streams = begin_many(
            self.engine, prompts, checked_images(images), system=system, options=look, sampling=Sampling(**options)
        )
        if stream:
            return streams
        with streams:
            for _ in streams:
                pass
        return streams.replies

    def close(self) -> None:
        """Free everything the model holds; may be called twice."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<lookonce.Model {self.name!r}, context of {self.n_ctx}>"


def load(
    model: str | PathLike[str],
    *,
    mmproj: str | PathLike[str] | None = None,
    mmproj_type: str | None = None,
    device: str = "auto",
    n_gpu_layers: int | None = None,
    n_ctx: int | None = None,
    threads: int | None = None,
    kv_type: KvType = "f16",
    flash_attention: bool | None = None,
    store: Store | str | PathLike[str] | bool = True,
    state: StateMode = "on",
    download: bool = False,
    trial: bool | None = None,
) -> Model:
    """Load a text model, and find its projector; the projector itself is loaded when a picture first needs it.

    model: a card's name (`lookonce models list` shows them), one with a quantization as in
        `qwen3-vl-2b-instruct:Q8_0`, a text model's .gguf file, or a folder that holds one. To give a folder that has a
        card's name write `./` before it.
    mmproj: its projector file. Without it the card's is taken, or the one in the folder whose metadata fit.
    mmproj_type: `BF16`, `F16` or `Q8_0` for the projector of this type, which `lookonce models retype` makes of
        another; `auto` for the one that it made, if there is one. None is what LOOKONCE_MMPROJ_TYPE says, else the
        card's; where these say nothing, retyped files are passed over. A type that is not there is refused now where
        it is given, and else by the first picture.
    device: `auto`, `cpu`, `cuda`, `cuda:0`, `metal`. `auto` takes the GPUs that the native build can use.
    n_gpu_layers: how many layers go to the GPU; None is all. 0 keeps the vision tower on the CPU too.
    n_ctx: tokens and image rows that the context holds; None is the card's, else 8,192, or what the model was trained
        for if less.
    threads: None is the number of physical cores.
    kv_type: how keys and values are kept: `f16`, `f32` or `q8_0`.
    flash_attention: None lets llama.cpp choose.
    store: where looks and states are kept: True is the user's own store, False none, or a folder, or a `Store`, which
        stays the caller's to close.
    state: what becomes of the evaluated beginnings of prompts, up to their last picture: `on` keeps them in the store,
        29 MB for each 256 image tokens of a 2B model, and finds them there; `read` only finds them; with `off` none
        outlives its turn.
    download: fetch a card's files where they are not on this disk.
    trial: load files that no card vouches for in a child process first, once for each content and version of the native
        library, so that one which llama.cpp dies of costs an error and not this process. None is True, or what
        LOOKONCE_TRIAL says (0 or 1). False saves that second for files you made, and is for where no process may start.

    Raises ModelFileError for a missing, damaged or mismatched file and one that llama.cpp refuses, DeviceError for a
    device that the build lacks, InputError for another option.
    """
    options = LoadOptions(device, n_gpu_layers, n_ctx, threads, kv_type, flash_attention, state)
    wanted_type(mmproj_type)  # refused before anything is fetched
    tried = _wants_trial(trial)
    own = None if isinstance(store, Store) else _open_store(store)
    used = store if isinstance(store, Store) else own
    try:
        files = find_files(model, mmproj, mmproj_type=mmproj_type, store=used, fetch=_fetch if download else None)
        return _load(files, options, used, owns_store=own is not None, trial=tried)
    except BaseException:
        if own is not None:
            own.close()
        raise


def _load(files: ModelFiles, options: LoadOptions, store: Store | None, *, owns_store: bool, trial: bool) -> Model:
    if trial:
        try_model(files, store)
    return Model(Engine(files, options, store, owns_store=owns_store))


def _wants_trial(trial: bool | None) -> bool:
    if trial is not None:
        return trial
    said = os.environ.get("LOOKONCE_TRIAL") or "1"
    if said not in ("0", "1"):
        raise InputError(f"LOOKONCE_TRIAL is {said!r}: set it to 0 or 1, or unset it")
    return said == "1"


def _fetch(card: ModelCard, quantization: str | None) -> object:
    from lookonce.download import pull

    return pull(card, quant=quantization)


def _open_store(store: str | PathLike[str] | bool) -> Store | None:
    if isinstance(store, bool):
        return Store() if store else None
    if not isinstance(store, str | PathLike) or not fspath(store):
        raise InputError(f"store is {store!r}: give a folder, a Store, True or False")
    return Store(store)
