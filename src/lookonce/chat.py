"""Conversations about pictures: turns in, replies out, whole or piece by piece."""

import logging
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike, fspath
from types import MappingProxyType, TracebackType
from typing import Literal, Protocol, overload

import numpy as np
from PIL import Image
from typing_extensions import Self, Unpack

from lookonce.embedding import ImageEmbedding
from lookonce.engine import Engine
from lookonce.errors import ClosedError, InputError, MismatchError, PromptError
from lookonce.images import PictureSource
from lookonce.looker import LookOptions, PendingLook
from lookonce.prompt import Message, Unit, name_looks, place_looks
from lookonce.reply import Answer, Asked, Reply
from lookonce.sampling import Sampling, SamplingOptions, refuse_unknown
from lookonce.saved_chat import SavedChat
from lookonce.turn import Turn, refuse_overflow

logger = logging.getLogger(__name__)

Images = Sequence[PictureSource | ImageEmbedding]


class ReplyStream(Iterator[str]):
    """A reply piece by piece. Closing it, or an exception in the loop over it, leaves the model as usable as before.

    A stream that is forgotten is closed.
    """

    _settled = False

    def __init__(self, engine: Engine, sampling: Sampling, asked: Asked) -> None:
        self._engine = engine
        answer = Answer(engine, sampling, asked)
        _ = answer.sampler  # a grammar that cannot be used is refused now
        self._answer = answer

    def __next__(self) -> str:
        answer = self._answer
        while answer.open:
            try:
                piece = answer.take(self._draw())
            except BaseException as error:
                if isinstance(error, ClosedError) and self._is_closed():  # by another thread, meanwhile
                    break
                answer.drop()
                raise
            if piece:
                return piece
        self._settle()
        raise StopIteration

    def _is_closed(self) -> bool:
        return not self._answer.open

    def _draw(self) -> int:
        answer = self._answer
        if answer.token is None:
            return self._engine.first_token(answer.turn, answer.sampler)
        return self._engine.next_token(answer.turn, answer.sampler, answer.token)

    def _settle(self) -> None:
        # Not in drop(), which the garbage collector may call while this thread holds the engine's lock.
        if not self._settled:
            self._settled = True
            self._engine.settle(self._answer.turn)

    def drop(self) -> None:
        """Stop generating as if the question had not been asked: the turn does not count. May be called twice."""
        self._answer.drop()

    @property
    def reply(self) -> Reply:
        """The reply so far; whole once the loop has ended."""
        return self._answer.reply

    def close(self) -> None:
        """Stop generating; the turn counts as far as it came, if it began. May be called twice."""
        self._answer.close()
        self._settle()

    def __del__(self) -> None:
        if hasattr(self, "_answer"):  # else it was refused when it was made
            self._answer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


class HasEngine(Protocol):
    """A loaded model."""

    @property
    def engine(self) -> Engine:
        """What works for it."""


class Chat:
    """A conversation about pictures. Its turns share the model's context, so only what is new is evaluated.

    Not safe to use from several threads at once; several chats of one model are.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        images: Images = (),
        system: str | None = None,
        look: LookOptions | None = None,
    ) -> None:
        self._messages = opening(engine, system)
        self._engine = engine
        self._look = look or LookOptions()
        self._waiting: tuple[PictureSource | ImageEmbedding, ...] = checked_images(images)
        self._known: dict[str, ImageEmbedding] = {}
        self._under_way: weakref.ref[ReplyStream] | None = None
        self._held: tuple[Unit, ...] = ()  # what was evaluated for the last turn

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation so far."""
        return tuple(self._messages)

    @property
    def images(self) -> Mapping[str, ImageEmbedding]:
        """The conversation's pictures by alias."""
        return MappingProxyType(self._known)

    @overload
    def ask(
        self,
        prompt: str,
        images: Images = (),
        *,
        stream: Literal[False] = False,
        **options: Unpack[SamplingOptions],
    ) -> Reply: ...

    @overload
    def ask(
        self, prompt: str, images: Images = (), *, stream: Literal[True], **options: Unpack[SamplingOptions]
    ) -> ReplyStream: ...

    def ask(
        self, prompt: str, images: Images = (), *, stream: bool = False, **options: Unpack[SamplingOptions]
    ) -> Reply | ReplyStream:
        """Say something, with pictures or without, and get the model's reply.

        A picture stands where its alias stands in the prompt: its own, or `<image_N>`, N being its number in the
        conversation. The others come before the text. `options` are those of `Sampling`. With `stream` the reply
        comes as it is generated; the turn counts once the stream has ended or was closed, and the next question closes
        one that is still under way.

        Raises PromptError for a prompt, alias or option that cannot be used, ContextError where it does not fit,
        PictureError and ModelFileError for what cannot be looked at; the conversation is then as it was.
        """
        started = time.perf_counter()
        refuse_unknown(options, "images", "stream")
        sampling = Sampling(**options)
        self._close_stream()
        new, message = self._place(prompt, (*self._waiting, *checked_images(images)))
        looked = time.perf_counter()
        messages = [*self._messages, message]
        whole = self._engine.prompt(messages)
        refuse_overflow(whole.n_tokens, whole.n_rows, self._engine.n_ctx)
        turn = Turn(whole, weakref.ref(self))

        def answered(text: str) -> None:
            self._messages = [*messages, Message("assistant", (text,))]
            self._known |= new
            self._waiting = ()
            self._held = turn.units

        asked = Asked(started, looked, _looks_in(messages), turn, answered)
        stream_ = ReplyStream(self._engine, sampling, asked)
        if stream:
            self._under_way = weakref.ref(stream_)
            return stream_
        try:
            for _ in stream_:
                pass
        finally:
            stream_.drop()  # nobody has seen a part of it
        return stream_.reply

    def fork(self) -> Self:
        """Another conversation that begins with this one; neither notices what the other goes on to say.

        What both share is evaluated once. A reply that is under way is closed first.
        """
        self._close_stream()
        other = type(self)(self._engine, look=self._look)
        other._messages = list(self._messages)
        other._known = dict(self._known)
        other._waiting = self._waiting
        other._held = self._held
        return other

    def save(self, path: str | PathLike[str]) -> None:
        """Write the conversation to a `.safetensors` file, from which `load` goes on where it is now.

        The file holds what was said, the looks, and the state of the evaluation: 29 MB for each 256 tokens or image
        rows of a 2B model. Pictures that no question has shown yet are looked at first, and a reply that is under way
        is closed. Raises SavedLookError where the file cannot be written.
        """
        self._close_stream()
        prepared = self._engine.prepare(self._waiting, self._look)
        self._waiting = waiting = tuple(self._engine.finish(prepared))
        SavedChat(
            model_name=self._engine.name,
            fingerprint=self._engine.fingerprint,
            messages=self.messages,
            known=self.images,
            waiting=waiting,
            look_options=self._look,
            facts=self._engine.facts,
            state=self._engine.read_state(self._held) if self._held else None,
        ).save(path)

    @classmethod
    def load(cls, model: HasEngine, path: str | PathLike[str]) -> Self:
        """Read a conversation that `save` wrote, and go on where it was, with the same logits.

        Where the context is made otherwise than the one that it was saved from, by its options or another build of
        the native library, the text is the same and is evaluated again by the next question. Raises SavedLookError
        for a damaged file, MismatchError for one of another text model.
        """
        if not hasattr(model, "engine"):
            raise InputError(f"the model is a {type(model).__name__}: give what lookonce.load returned, then the path")
        saved = SavedChat.load(path)
        engine = model.engine
        if saved.fingerprint != engine.fingerprint:
            raise MismatchError(
                f"{fspath(path)} was saved with the text model {saved.model_name!r} ({saved.fingerprint[:12]}), but "
                f"this is {engine.name!r} ({engine.fingerprint[:12]}): load it with the one it was saved with"
            )
        chat = cls(engine, look=saved.look_options)
        chat._messages = list(saved.messages)
        chat._known = {alias: engine.looker.checked(look) for alias, look in saved.known.items()}
        chat._waiting = tuple(map(engine.looker.checked, saved.waiting))
        if saved.state is not None and saved.facts == engine.facts and engine.adopt(saved.state):
            chat._held = tuple(saved.state.held.units)
        elif saved.state is not None:
            logger.info("%s: its state is of another context, so the conversation is evaluated again", fspath(path))
        return chat

    def _close_stream(self) -> None:
        if self._under_way is not None and (before := self._under_way()) is not None:
            before.close()

    def _place(
        self, prompt: str, sources: tuple[PictureSource | ImageEmbedding, ...]
    ) -> tuple[dict[str, ImageEmbedding], Message]:
        if not isinstance(prompt, str):
            raise PromptError(f"the prompt is a {type(prompt).__name__}: give a text")
        prepared = self._engine.prepare(sources, self._look)
        counted = place_looks(prompt, name_looks(prepared, self._known), self._known)
        if any(isinstance(one, PendingLook) for one in prepared):
            self._engine.refuse([*self._messages, Message("user", counted)])
        new = name_looks(self._engine.finish(prepared), self._known)
        return new, Message("user", place_looks(prompt, new, self._known))


def _looks_in(messages: Sequence[Message]) -> tuple[ImageEmbedding, ...]:
    parts = (part for message in messages for part in message.parts)
    return tuple(part for part in parts if isinstance(part, ImageEmbedding))


def opening(engine: Engine, system: str | None) -> list[Message]:
    """The messages before the first question. Raises PromptError for a system prompt that cannot be used."""
    if system is not None and not isinstance(system, str):
        raise PromptError(f"system is a {type(system).__name__}: give a text")
    messages = [] if system is None else [Message("system", (system,))]
    for message in messages:
        engine.template.refuse_markup(message)
    return messages


def checked_images(images: Images) -> tuple[PictureSource | ImageEmbedding, ...]:
    """The pictures as a tuple. Raises PromptError for anything else than a list of them."""
    if isinstance(images, str | bytes | PathLike | ImageEmbedding | Image.Image | np.ndarray):
        raise PromptError(f"images is one {type(images).__name__}: give a list of pictures, even for one")
    if not isinstance(images, Iterable):
        raise PromptError(f"images is {images!r}: give a list of pictures")
    return tuple(images)
