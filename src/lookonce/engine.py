"""One loaded model: its native handles, the one lock around them, and what is made of them.

The lock is held for native work only: a chat template or a picture's decoding runs without it.
"""

import json
import logging
import os
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

import psutil

from lookonce.embedding import ImageEmbedding
from lookonce.errors import ClosedError, DeviceError, InputError, NativeError
from lookonce.fingerprint import Fingerprint
from lookonce.fork_lock import ForkLock
from lookonce.images import PictureSource
from lookonce.kept_state import KeptState, KeptStates
from lookonce.looker import Looker, LookOptions, PendingLook, Projector
from lookonce.model_files import ModelFiles
from lookonce.native.cache import holds
from lookonce.native.library import Device, build, choose_devices
from lookonce.native.sampler import Sampler, grammar_of
from lookonce.native.text import Context, ContextOptions, KvType, TextModel
from lookonce.prefix_store import STATE_MODES, PrefixStore, StateMode
from lookonce.prompt import ChatTemplate, Message, Part, Prompt, Unit, assemble, count
from lookonce.sampling import Sampling
from lookonce.sequences import Sequences
from lookonce.store import Store
from lookonce.turn import Turn, refuse_overflow

logger = logging.getLogger(__name__)

DEFAULT_CONTEXT: Final = 8192
_LONGEST_CALL_S: Final = 60.0  # how long the end of the process waits for another thread's native call
_NATIVE_NAMES: Final = ("LLAMA_", "GGML_")
OVERLAPPING_TURNS: Final = 32  # streams that can be under way without taking each other's sequence


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a model is loaded; `lookonce.load` says what each option means."""

    device: str = "auto"
    n_gpu_layers: int | None = None
    n_ctx: int | None = None
    threads: int | None = None
    kv_type: KvType = "f16"
    flash_attention: bool | None = None
    state: StateMode = "on"

    def __post_init__(self) -> None:
        if not isinstance(self.device, str):
            raise DeviceError(f"device is {self.device!r}: give auto, cpu, cuda, cuda:0 or metal")
        layers = self.n_gpu_layers
        if layers is not None and (isinstance(layers, bool) or not isinstance(layers, int) or not 0 <= layers < 2**31):
            raise InputError(f"n_gpu_layers is {layers!r}: give a whole number from 0")
        if self.flash_attention is not None and not isinstance(self.flash_attention, bool):
            raise InputError(f"flash_attention is {self.flash_attention!r}: give True, False or None")
        if self.state not in STATE_MODES:
            raise InputError(f"state is {self.state!r}: choose one of {', '.join(STATE_MODES)}")
        self.context_options(DEFAULT_CONTEXT)

    def context_options(self, n_ctx: int, *, n_outputs: int = 1) -> ContextOptions:
        """The options of a context; `n_ctx` is what holds where the caller gave none."""
        return ContextOptions(
            n_ctx=n_ctx if self.n_ctx is None else self.n_ctx,
            threads=physical_cores() if self.threads is None else self.threads,
            kv_type=self.kv_type,
            flash_attention=self.flash_attention,
            n_sequences=OVERLAPPING_TURNS + 1,  # states that are read out pass through the last
            n_outputs=n_outputs,
        )

    def facts(self, context: ContextOptions, devices: Sequence[Device]) -> dict[str, str]:
        """All that decides a bit of a state beside the model's content and the prompt.

        Whether flash attention is on follows from these where llama.cpp chooses, as do the positions' scaling, which
        is the model's own, and the one buffer of cells for all sequences, which is the library's. The number of
        threads cuts some sums.
        """
        return {
            **build(),
            # What the libraries read, such as LLAMA_ATTN_ROT_DISABLE, which changes what a quantized cache holds.
            "environment": json.dumps(sorted(one for one in os.environ.items() if one[0].startswith(_NATIVE_NAMES))),
            "kv_type": context.kv_type,
            "flash_attention": str(context.flash_attention),
            "batch_size": str(context.batch_size),
            "threads": str(context.threads),
            "devices": json.dumps([(device.name, device.description) for device in devices]),
            "gpu_layers": str(self.n_gpu_layers) if devices else "0",
        }


def physical_cores() -> int:
    """The physical cores that this process may use; hyper-threads slow matrix work down."""
    physical = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    try:
        allowed = len(psutil.Process().cpu_affinity())
    except AttributeError:  # macOS has no affinity
        allowed = physical
    return max(1, min(physical, allowed))


class Engine:
    """Owns a text model, its context and its looker. Safe to use from several threads; `close` frees everything."""

    def __init__(self, files: ModelFiles, options: LoadOptions, store: Store | None, *, owns_store: bool) -> None:
        self._owned_store = store if owns_store else None
        self.lock: Final = ForkLock()
        self._context: Context | None = None
        self._sequences: Sequences | None = None
        self._template: ChatTemplate | None = None
        self._closed = False
        self._fingerprint = Fingerprint(files.text, store)  # of the file whose header was checked
        devices = choose_devices(options.device)
        started = time.perf_counter()
        self.name = files.text.name
        self.card: Final = files.card
        self._fingerprint.check_unchanged()
        self.text: Final = TextModel(files.text.path, devices=devices, gpu_layers=options.n_gpu_layers)
        logger.info("loaded %s in %.2f s", files.text.path, time.perf_counter() - started)
        n_ctx = DEFAULT_CONTEXT if files.card is None else files.card.n_ctx or DEFAULT_CONTEXT
        self.options: Final = options.context_options(min(n_ctx, self.text.context_length))
        self.options.check_length(self.text)
        self.facts: Final = options.facts(self.options, devices)
        self._kept = None if options.state == "off" else KeptStates(self.n_ctx)
        self._states: PrefixStore | None = None
        if store is not None and options.state != "off":
            reads_only = options.state == "read"
            self._states = PrefixStore(store, self._fingerprint, self.facts, self.batch_size, reads_only=reads_only)
        self._end = weakref.finalize(self, _free_all, self.lock, self.text, self._states, self._owned_store)
        projector = Projector(files.projector, files.card, store) if files.projector else None
        chosen = projector
        if files.chosen is not files.projector:
            chosen = Projector(files.chosen, files.card, store) if files.chosen else None
        self.looker: Final = Looker(
            self.text,
            files.text,
            projector,
            chosen=chosen,
            missing=files.missing,
            store=store,
            lock=self.lock,
            threads=self.options.threads,
            devices=() if options.n_gpu_layers == 0 else devices,
        )

    def look(self, source: PictureSource | ImageEmbedding, options: LookOptions) -> ImageEmbedding:
        """Look at one picture."""
        return self.finish(self.prepare([source], options))[0]

    def prepare(
        self, sources: Sequence[PictureSource | ImageEmbedding], options: LookOptions
    ) -> list[ImageEmbedding | PendingLook]:
        """Open, check and count pictures: their looks where they are kept, what is left to do where not."""
        self.check_open()
        return [self.looker.prepare(source, options) for source in sources]

    def finish(self, prepared: Sequence[ImageEmbedding | PendingLook]) -> list[ImageEmbedding]:
        """Run the tower for what is left to do, once for each picture."""
        made: dict[str, ImageEmbedding] = {}
        for one in prepared:
            if isinstance(one, PendingLook) and one.key not in made:
                made[one.key] = self.looker.finish(one)
        return [made[one.key] if isinstance(one, PendingLook) else one for one in prepared]

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """Render a conversation through the model's chat template. Raises PromptError where it refuses."""
        return self.plain_prompt(self.template.render(messages))

    def plain_prompt(self, parts: Sequence[Part]) -> Prompt:
        """Texts and pictures as they are, without a template."""
        self.check_open()
        return assemble(parts, self.text.tokenize, bos=self.text.bos_token, batch_size=self.batch_size)

    def refuse(self, messages: Sequence[Message]) -> None:
        """Raise ContextError or PromptError where a conversation cannot be answered, before its pictures cost work."""
        refuse_overflow(*count(self.template.render(messages), self.text.tokenize), self.n_ctx)

    @property
    def template(self) -> ChatTemplate:
        """The text model's chat template. Raises PromptError where it has none that can be used."""
        with self.lock:
            self.check_open()
            if self._template is None:
                self._template = ChatTemplate(self.text.chat_template, bos=self.text.bos, eos=self.text.eos)
            return self._template

    @property
    def states(self) -> PrefixStore | None:
        """Where states are kept; None where they are not."""
        return self._states

    @property
    def n_ctx(self) -> int:
        """Cells of the context."""
        return self.options.n_ctx

    @property
    def batch_size(self) -> int:
        """Tokens or rows of one native call."""
        return self.options.batch_size

    def sampler(self, sampling: Sampling, prompt: Prompt) -> Sampler:
        """A sampler for one reply. Raises PromptError for a grammar that cannot be used."""
        grammar = grammar_of(sampling)
        tokens = [unit for unit in prompt.units() if isinstance(unit, int)]
        with self.lock:
            self.check_open()
            return Sampler(self.text, sampling, grammar, tokens)

    def first_token(self, turn: Turn, sampler: Sampler) -> int:
        """Evaluate a turn's prompt and draw what follows."""
        self.fetch(turn.prompt)
        with self.lock, self._sequences_reset_on_failure() as sequences:
            sequences.begin(turn)
            return sampler.sample(self._open_context())

    def next_token(self, turn: Turn, sampler: Sampler, token: int) -> int:
        """Evaluate the token drawn last and draw what follows."""
        with self.lock, self._sequences_reset_on_failure() as sequences:
            sequences.extend(turn, token)
            return sampler.sample(self._open_context())

    def fetch(self, prompt: Prompt) -> None:
        """Get the state of a prompt's beginning from the store, where that spares work."""
        if self._states is None or self._kept is None or not prompt.picture_ends:
            return
        with self.lock:
            reusable = self._open_sequences().reusable_units(prompt)
        state = self._states.fetch(prompt, beyond=reusable)
        if state is not None:
            with self.lock:
                self._kept.add(state)

    @contextmanager
    def together(self) -> Iterator[tuple[Sequences, Context]]:
        """The sequences and their context, for native work on several turns at once; no one else's comes between."""
        with self.lock, self._sequences_reset_on_failure() as sequences:
            yield sequences, self._open_context()

    def settle(self, turn: Turn | None = None) -> None:
        """Once a turn's answer is out: keep in the store what was evaluated for it, or for all, and is not there."""
        if self._states is None or self._states.reads_only:
            return
        with self.lock:
            owed = [] if self._closed or self._sequences is None else self._sequences.take_owed(turn)
        for state in owed:
            self._states.keep(state)

    @property
    def fingerprint(self) -> str:
        """That of the text model. Raises ModelFileError where its file has changed."""
        return self._fingerprint.value()

    def read_state(self, units: Sequence[Unit]) -> KeptState | None:
        """The state of as much of a conversation as is still held."""
        with self.lock:
            self.check_open()
            return None if self._sequences is None else self._sequences.read(units)

    def adopt(self, state: KeptState) -> bool:
        """Keep a state that was read out of a context like this one; False where it does not fit this model."""
        if self._kept is None or not holds(state.state, state.held.positions, mrope=self.text.mrope):
            return False
        with self.lock:
            self.check_open()
            self._kept.add(state)
        return True

    @contextmanager
    def _sequences_reset_on_failure(self) -> Iterator[Sequences]:
        sequences = self._open_sequences()
        try:
            yield sequences
        except NativeError:  # logits that are no numbers, say: nothing that is kept can be trusted
            sequences.reset()
            raise

    def _open_context(self) -> Context:
        self.check_open()
        if self._context is None:
            self._context = Context(self.text, self.options)
        return self._context

    def _open_sequences(self) -> Sequences:
        context = self._open_context()
        if self._sequences is None:
            owes = self._states is not None and not self._states.reads_only
            self._sequences = Sequences(context, OVERLAPPING_TURNS, self._kept, owes=owes)
        return self._sequences

    @property
    def device_names(self) -> tuple[str, ...]:
        """The names of the device that the model is on: `cpu`, or those of a GPU, `cuda` and `cuda:0` say."""
        names = [name for name, _ in json.loads(self.facts["devices"])]
        return (*(name.partition(":")[0] for name in names), *names) or ("cpu",)

    def check_open(self) -> None:
        """Raise ClosedError after `close`."""
        if self._closed:
            raise ClosedError(f"the model {self.name!r} is closed: load it again")

    def close(self) -> None:
        """Free context, tower and text model, in this order, and write what is to be kept; may be called twice."""
        with self.lock:
            writes = not self._closed and self._states is not None and not self._states.reads_only
            owed: list[KeptState] = []
            if writes and self._sequences is not None:
                with suppress(ClosedError):  # in a process that was forked off the one that loaded the model
                    owed = self._sequences.take_owed()
            self._closed = True
            self.looker.close()
            if self._context is not None:
                self._context.close()
            self.text.close()
        for state in owed:
            if self._states is not None:
                self._states.keep(state)
        self._end()


def _free_all(lock: ForkLock, text: TextModel, states: PrefixStore | None, store: Store | None) -> None:
    """Free what was not closed, when the engine is forgotten or the process ends, where a thread may be at work."""
    if lock.acquire(timeout=_LONGEST_CALL_S):
        try:
            text.close()
        finally:
            lock.release()
    else:
        text.native.abandon()
    if states is not None:
        states.close()
    if store is not None:
        store.close()
