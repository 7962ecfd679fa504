"""The states of prompt prefixes in the store: found by what was evaluated and how, kept beside the answer.

A prefix ends with the last row of a picture. Its key covers the text model's content, everything about the context
that decides a bit of the state, and the prefix itself: token ids, look keys, and the looks' rows, since a look can be
made by hand under another's key. An entry is a safetensors file with the tensor `state`, the bytes that
`lookonce.native.cache` read out; the store has verified its checksum before any of them is used.
"""

import hashlib
import json
import logging
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final, Literal

import numpy as np
from blake3 import blake3

from lookonce.embedding import ImageEmbedding
from lookonce.errors import LookonceError, SavedLookError
from lookonce.fingerprint import Fingerprint
from lookonce.held import Held, calls
from lookonce.kept_state import KeptState
from lookonce.looker import LOOK
from lookonce.prompt import Prompt, Run, TokenRun
from lookonce.store import Store
from lookonce.tensor_file import array_bytes, compact_json, head, unpack

logger = logging.getLogger(__name__)

STATE: Final = "state"  # the kind of store entry
FORMAT_VERSION: Final = 1

StateMode = Literal["off", "read", "on"]
STATE_MODES: Final[tuple[StateMode, ...]] = ("off", "read", "on")


class PrefixStore:
    """Keeps states for one context, `facts` being all about it that changes a bit of them.

    `fetch` may be called from any thread. What `keep` is given is written by a thread of its own, which ends with
    `close`, or with the process once everything is written.
    """

    def __init__(
        self, store: Store, text: Fingerprint, facts: Mapping[str, str], batch_size: int, *, reads_only: bool
    ) -> None:
        self._store = store
        self._text = text
        self._facts = dict(facts)
        self._batch_size = batch_size
        self.reads_only: Final = reads_only
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="lookonce-states")
        self._pending: Future[None] | None = None
        self._thread: int | None = None

    def fetch(self, prompt: Prompt, beyond: int) -> KeptState | None:
        """The state of the longest prefix that is kept, if it is longer than `beyond` units."""
        try:
            fingerprint = self._text.known()
            if fingerprint is None and self._store.holds(STATE):  # its note is lost, or could not be written
                fingerprint = self._text.read()
        except LookonceError as error:
            logger.debug("no kept state is looked for: %s", error)
            return None
        if fingerprint is None:  # no state was ever kept, so the answer need not wait for the file's reading
            return None
        n_units = sum(len(run.tokens) if isinstance(run, TokenRun) else 1 for run in prompt.runs)
        ends = [end for end in prompt.picture_ends if beyond < end < n_units]
        for runs, key in reversed([*self._keyed(fingerprint, prompt, frozenset(ends))]):
            payload = self._store.get(key, STATE)
            if payload is None:
                continue
            try:
                return _unpack(payload, key, Held.of([*calls(runs, self._batch_size)]))
            except SavedLookError as error:
                logger.warning("%s: the prompt is evaluated again", error)
        return None

    def keep(self, state: KeptState) -> None:
        """Write a state to the store, later. Waits only where another one is still to be written."""
        if self.reads_only:
            return
        size_bytes = state.state.nbytes + sum(look.rows.nbytes for look in _looks(state.held))
        if size_bytes > self._store.limit_bytes:  # it would only push out its looks, which are dearer to make
            logger.debug(
                "a state is not kept: with its looks it has %d bytes, the store's limit is %d",
                *(size_bytes, self._store.limit_bytes),
            )
            return
        if self._pending is not None:
            wait([self._pending])
        try:
            self._pending = self._writer.submit(self._write, state)
        except RuntimeError:  # the process is ending
            self._write(state)

    def close(self) -> None:
        """Wait until everything is written; may be called twice."""
        self._writer.shutdown(wait=threading.get_ident() != self._thread)

    def _write(self, state: KeptState) -> None:
        self._thread = threading.get_ident()
        try:
            prompt = Prompt(tuple(_runs(state.held)))
            ends = frozenset([len(state.held.units)])
            (_, key), *_ = self._keyed(self._text.value(), prompt, ends)
            self._store.put(key, STATE, (_pack_head(key, state), array_bytes(state.state)), label=self._text.path.name)
            for look in _looks(state.held):  # which are dearer to make, so that the state goes first
                self._store.touch(look.key, LOOK)
        except (LookonceError, OSError, MemoryError) as error:
            logger.warning("a state was not kept: %s", error)

    def _keyed(self, fingerprint: str, prompt: Prompt, ends: frozenset[int]) -> Iterator[tuple[tuple[Run, ...], str]]:
        """The prefixes that end at `ends`, shortest first, each with its key."""
        digest = hashlib.sha256(_text([STATE, FORMAT_VERSION, fingerprint, sorted(self._facts.items())]))
        contents: dict[int, str] = {}
        offset = 0
        for number, run in enumerate(prompt.runs, start=1):
            if isinstance(run, TokenRun):
                digest.update(_text(["tokens", run.tokens]))
                offset += len(run.tokens)
                continue
            look = run.look
            content = contents.setdefault(id(look), "") or _content(look)
            contents[id(look)] = content
            digest.update(_text(["rows", look.key, content, run.start, run.stop, run.advance, run.causal]))
            offset += 1
            if offset in ends:
                yield prompt.runs[:number], digest.hexdigest()


def _text(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _content(look: ImageEmbedding) -> str:
    digest = blake3(_text([str(look.rows.dtype), look.rows.shape]))
    digest.update(array_bytes(look.rows))
    digest.update(array_bytes(look.positions))
    return str(digest.hexdigest())


def _looks(held: Held) -> list[ImageEmbedding]:
    return list({unit.look.key: unit.look for unit in held.units if not isinstance(unit, int)}.values())


def _runs(held: Held) -> Iterator[Run]:
    """The runs of which a prefix consists, tokens joined as a prompt joins them."""
    tokens: list[int] = []
    for unit in held.units:
        if isinstance(unit, int):
            tokens.append(unit)
            continue
        if tokens:
            yield TokenRun(tuple(tokens))
            tokens = []
        yield unit


def _facts_of(held: Held, last: int) -> dict[str, str]:
    return {"n_units": str(len(held.units)), "n_cells": str(held.n_cells), "span": compact_json([held.position, last])}


def _pack_head(key: str, state: KeptState) -> bytes:
    metadata = {"format_version": str(FORMAT_VERSION), "key": key, **_facts_of(state.held, state.last)}
    return head(metadata, {STATE: state.state.reshape(1, -1)})


def _unpack(payload: memoryview, key: str, held: Held) -> KeptState:
    name = f"state {key[:12]}"
    metadata, arrays = unpack(payload, [STATE], name=name)
    try:
        last = json.loads(metadata["span"])[1]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise SavedLookError(f"{name} has no span") from error
    expected = {"format_version": str(FORMAT_VERSION), "key": key, **_facts_of(held, last)}
    state = arrays[STATE]
    if metadata != expected or state.dtype != np.uint8 or len(state) != 1 or not 0 <= last < held.position:
        raise SavedLookError(f"{name} is not the state that its key says")
    return KeptState(held, state[0], last, origin="store")
