"""The text model and its context: tokens and rows in, logits out.

`TextModel` owns the weights, `Context` the KV cache made for them; closing the model closes its contexts first. A
context is not safe to use from two threads at once (`lookonce.engine` holds the lock); a model's vocabulary is.
"""

import ctypes
import os
import threading
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Final, Literal

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from lookonce.errors import ContextError, InputError, ModelFileError, NativeError, with_log
from lookonce.native.capture import Capture
from lookonce.native.library import Device, Handle, listen

KvType = Literal["f16", "f32", "q8_0"]
Outputs = Literal["last", "all", "none"] | NDArray[np.bool_]
"""Which items of a batch keep their output: some of these, or those flagged in (n,)."""
KV_TYPES: Final[dict[KvType, int]] = {
    "f32": llama.GGML_TYPE_F32,
    "f16": llama.GGML_TYPE_F16,
    "q8_0": llama.GGML_TYPE_Q8_0,
}
BATCH_TOKENS: Final = 512  # tokens or rows in one native call; also how long Ctrl-C may have to wait

_FLASH_ATTENTION: Final = {
    None: llama.LLAMA_FLASH_ATTN_TYPE_AUTO,
    False: llama.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    True: llama.LLAMA_FLASH_ATTN_TYPE_ENABLED,
}


class TextModel:
    """The weights and vocabulary of one text GGUF, which `lookonce.gguf_check` has found sound.

    `gpu_layers` bounds how many layers go to `devices` (None: all of them). `repack` lets the native library copy
    weights into the order that this CPU likes best. Raises ModelFileError with its reason when it refuses the file.
    """

    def __init__(
        self, path: Path, *, devices: Sequence[Device] = (), gpu_layers: int | None = None, repack: bool = True
    ) -> None:
        params = llama.llama_model_default_params()
        handles = (ctypes.c_void_p * (len(devices) + 1))(*(device.handle for device in devices), None)
        params.devices = ctypes.cast(handles, ctypes.c_void_p)
        params.n_gpu_layers = 0 if not devices else -1 if gpu_layers is None else gpu_layers
        params.use_extra_bufts = repack
        with listen() as log:
            handle = llama.llama_model_load_from_file(os.fsencode(path), params)
            if handle:
                self.native: Final = Handle(handle, llama.llama_model_free, f"the text model {path.name}")
        if not handle:
            raise ModelFileError(with_log(f"{path} could not be loaded as a text model", log.tail()))
        self._vocab = llama.llama_model_get_vocab(handle)
        # Text is split and joined beside another thread's native work: without a lock, close() could come between.
        self._reading = threading.Lock()
        self.path = path

    @property
    def handle(self) -> llama.llama_model_p:
        """The native handle, for this package only; raises ClosedError after `close`."""
        return self.native.pointer

    @property
    def vocab(self) -> llama.llama_vocab_p:
        """The native vocabulary, for this package only; raises ClosedError after `close`."""
        _ = self.handle
        return self._vocab

    @cached_property
    def input_width(self) -> int:
        """Width of one row: n_embd, times one more for each DeepStack layer."""
        return int(llama.llama_model_n_embd_inp(self.handle))

    @cached_property
    def width(self) -> int:
        """Width of a hidden state: n_embd."""
        return int(llama.llama_model_n_embd(self.handle))

    @cached_property
    def n_layers(self) -> int:
        """Number of layers."""
        return int(llama.llama_model_n_layer(self.handle))

    @cached_property
    def context_length(self) -> int:
        """The longest context the model was trained for."""
        return int(llama.llama_model_n_ctx_train(self.handle))

    @cached_property
    def vocabulary_size(self) -> int:
        """Number of tokens, which is the width of the logits."""
        return int(llama.llama_vocab_n_tokens(self.vocab))

    @cached_property
    def pools(self) -> bool:
        """Whether the file asks for pooled outputs, as those of embedding models do."""
        return self._metadata(f"{self._metadata('general.architecture')}.pooling_type") is not None

    @cached_property
    def mrope(self) -> bool:
        """Whether a row's position is (t, y, x), not one number."""
        return int(llama.llama_model_rope_type(self.handle)) in (
            llama.LLAMA_ROPE_TYPE_MROPE,
            llama.LLAMA_ROPE_TYPE_IMROPE,
        )

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja source in the file's metadata."""
        template = llama.llama_model_chat_template(self.handle, None)
        return None if template is None else template.decode("utf-8", errors="replace")

    @cached_property
    def bos(self) -> str:
        """Text of the beginning-of-sequence token; empty where the vocabulary has none."""
        return self._special(llama.llama_vocab_bos(self.vocab))

    @cached_property
    def eos(self) -> str:
        """Text of the end-of-sequence token; empty where the vocabulary has none."""
        return self._special(llama.llama_vocab_eos(self.vocab))

    @cached_property
    def bos_token(self) -> int | None:
        """The token that the model wants before every prompt, if it wants one."""
        return int(llama.llama_vocab_bos(self.vocab)) if llama.llama_vocab_get_add_bos(self.vocab) else None

    def _special(self, token: int) -> str:
        return "" if token < 0 else self.piece(token, special=True).decode("utf-8", errors="replace")

    @cached_property
    def _normalizes(self) -> bool:
        # tokenizer.json of the Qwen families has an NFC normalizer, which llama.cpp leaves out.
        return (self._metadata("tokenizer.ggml.pre") or "").startswith("qwen")

    def _metadata(self, key: str) -> str | None:
        buffer = ctypes.create_string_buffer(256)
        length = llama.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        return None if length < 0 else buffer.value.decode("utf-8", errors="replace")

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text` as transformers splits a prompt: special tokens in it are read, none are added.

        Without `special` their names are text like any other.
        """
        if self._normalizes:
            text = unicodedata.normalize("NFC", text)
        data = text.encode("utf-8", errors="replace")
        room = len(data) + 1
        tokens = (llama.llama_token * room)()
        with self._reading:
            count = llama.llama_tokenize(self.vocab, data, len(data), tokens, room, False, special)
        if count < 0:
            raise NativeError(f"a text of {len(data)} bytes could not be split into tokens")
        return list(tokens[:count])

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes that a token stands for; control tokens are empty unless `special`."""
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            with self._reading:
                length = llama.llama_token_to_piece(self.vocab, token, buffer, room, 0, special)
            if length >= 0:
                return buffer.raw[:length]
            room = -length

    def ends_generation(self, token: int) -> bool:
        """Whether the model says with this token that it has finished."""
        with self._reading:
            return bool(llama.llama_vocab_is_eog(self.vocab, token))

    def close(self) -> None:
        """Free the weights, and before them every context and tower made for them; may be called twice."""
        with self._reading:
            self.native.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


MOST_THREADS: Final = 512  # GGML_MAX_N_THREADS in ggml.h; far beyond it the native thread pool crashes


@dataclass(frozen=True, slots=True)
class ContextOptions:
    """How a context is made.

    `n_outputs` bounds the logit rows of one call; `flash_attention` None lets llama.cpp choose.
    """

    n_ctx: int
    threads: int
    kv_type: KvType = "f16"
    flash_attention: bool | None = None
    n_sequences: int = 1
    n_outputs: int = 1

    @property
    def batch_size(self) -> int:
        """Tokens or rows of one native call."""
        return min(BATCH_TOKENS, self.n_ctx)

    def __post_init__(self) -> None:
        for name in ("n_ctx", "threads", "n_sequences", "n_outputs"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is {value!r}: give a whole number of at least 1")
        if self.threads > MOST_THREADS:
            raise InputError(f"threads is {self.threads}: give at most {MOST_THREADS}")
        if not isinstance(self.kv_type, str) or self.kv_type not in KV_TYPES:
            raise InputError(f"kv_type is {self.kv_type!r}: choose one of {', '.join(KV_TYPES)}")
        if self.kv_type == "q8_0" and self.flash_attention is False:
            raise InputError("kv_type 'q8_0' needs flash attention: leave flash_attention on, or choose f16")

    def check_length(self, model: TextModel) -> None:
        """Raise ContextError where the model was not trained for a context so long."""
        if self.n_ctx > model.context_length:
            raise ContextError(
                f"n_ctx is {self.n_ctx}, but {model.path.name} was trained for {model.context_length}: "
                "give at most that"
            )


class Context:
    """The KV cache of one text model: `n_sequences` sequences that share `n_ctx` cells.

    Raises NativeError when the memory for it cannot be had.
    """

    def __init__(self, model: TextModel, options: ContextOptions, capture: Capture | None = None) -> None:
        options.check_length(model)
        params = llama.llama_context_default_params()
        params.n_ctx = options.n_ctx
        params.n_batch = params.n_ubatch = options.batch_size
        params.n_seq_max = options.n_sequences
        # The compute buffer holds that many rows of logits, 0.6 MB each at a vocabulary of 151,936.
        params.n_outputs_max = max(options.n_outputs, options.n_sequences)
        params.n_threads = params.n_threads_batch = options.threads
        params.flash_attn_type = _FLASH_ATTENTION[options.flash_attention]
        params.type_k = params.type_v = KV_TYPES[options.kv_type]
        if model.pools:
            params.pooling_type = llama.LLAMA_POOLING_TYPE_NONE  # pooling is ours
        params.kv_unified = True
        params.no_perf = True
        if capture is not None:
            params.cb_eval = capture.callback
        self._capture = capture
        with listen() as log:
            handle = llama.llama_init_from_model(model.handle, params)
            if handle:
                name = f"the context of {model.path.name}"
                self._native = Handle(handle, llama.llama_free, name, needs=model.native)
        if not handle:
            raise NativeError(
                f"a context of {options.n_ctx} tokens could not be made for {model.path.name}", log.tail()
            )
        self._memory = llama.llama_get_memory(handle)
        self._model = model
        self.n_ctx = options.n_ctx
        self.batch_size = options.batch_size
        self._n_sequences = options.n_sequences
        self._n_outputs = int(params.n_outputs_max)
        self._one_sequence = (ctypes.c_int32 * self.batch_size)(*([1] * self.batch_size))

    @property
    def handle(self) -> llama.llama_context_p:
        """The native handle, for this package only; raises ClosedError after `close`."""
        return self._native.pointer

    def decode_tokens(
        self,
        tokens: Sequence[int],
        *,
        position: int,
        sequence: int = 0,
        outputs: Outputs = "last",
    ) -> None:
        """Evaluate at most `batch_size` tokens whose first stands at `position`.

        `outputs` says for which of them logits are kept. Raises NativeError; the sequence may then hold a part.
        """
        count = len(tokens)
        positions = np.arange(position, position + count)
        self._decode(positions, _same(sequence, count), _flags(outputs, count), token=np.asarray(tokens))

    def decode_many(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        sequences: NDArray[np.int32],
        outputs: Outputs,
    ) -> None:
        """Evaluate tokens of several sequences in one call; the arrays are (n,), n at most `batch_size`.

        Raises NativeError; the sequences may then hold a part.
        """
        self._decode(positions, sequences, _flags(outputs, len(tokens)), token=tokens)

    def decode_rows(
        self,
        rows: NDArray[np.float32],
        positions: NDArray[np.int32],
        *,
        sequence: int = 0,
        causal: bool = True,
        outputs: Outputs = "none",
    ) -> None:
        """Evaluate at most `batch_size` image rows.

        `rows` is (n, input width), `positions` (n, 3) absolute (t, y, x). Of a model without M-RoPE only t counts.
        Raises InputError on another shape, NativeError where evaluation fails.
        """
        count = len(rows)
        if rows.shape != (count, self._model.input_width) or positions.shape != (count, 3):
            width = self._model.input_width
            raise InputError(
                f"rows are {rows.shape} with positions {positions.shape}: expected (n, {width}) and (n, 3)"
            )
        # M-RoPE reads four planes t, y, x, 0, one after the other (llama.cpp issues 28902 and 28963).
        unused = np.zeros((1, count), dtype=np.int32)
        planes = np.concatenate([positions.T, unused]) if self._model.mrope else positions.T[:1]
        data = np.ascontiguousarray(rows, dtype=np.float32)
        self._decode(planes.reshape(-1), _same(sequence, count), _flags(outputs, count), embd=data, causal=causal)

    def _decode(
        self,
        positions: NDArray[np.integer],
        sequences: NDArray[np.integer],
        flags: NDArray[np.int8],
        *,
        token: NDArray[np.integer] | None = None,
        embd: NDArray[np.float32] | None = None,
        causal: bool = True,
    ) -> None:
        count = len(flags)
        if not 1 <= count <= self.batch_size:
            raise InputError(f"a batch of {count} was given: give 1 to {self.batch_size} at a time")
        numbers = _checked("sequences", sequences, count, self._n_sequences)
        planes = 4 if embd is not None and self._model.mrope else 1
        places = _checked("positions", positions, count * planes, _MOST_POSITIONS)
        ids = None if token is None else _checked("token ids", token, count, self._model.vocabulary_size)
        if (kept := int(np.count_nonzero(flags))) > self._n_outputs:
            raise InputError(f"outputs of {kept} tokens were asked for: this context keeps {self._n_outputs} at a time")
        # A token's sequences are an array of its own; all of these lie in `numbers`, which stays alive here.
        addresses = numbers.ctypes.data + np.arange(count, dtype=np.uintp) * numbers.itemsize
        pointers = addresses.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(ctypes.c_int32)))
        batch = llama.llama_batch(
            n_tokens=count,
            token=None if ids is None else ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            embd=None if embd is None else embd.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            pos=places.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            n_seq_id=self._one_sequence,
            seq_id=pointers,
            logits=flags.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        # Set before every call, so that one that broke off leaves nothing behind.
        llama.llama_set_causal_attn(self.handle, causal)
        with listen() as log:
            status = llama.llama_decode(self.handle, batch)
        if self._capture is not None:
            self._capture.raise_pending()
        if status == 1:
            raise ContextError(
                f"{count} more tokens do not fit the context of {self.n_ctx}: load the model with a larger n_ctx"
            )
        if status:
            raise NativeError(f"evaluating {count} tokens failed with status {status}", log.tail())

    def logits(self, index: int = -1) -> NDArray[np.float32]:
        """Copy one row of logits, (vocabulary,), of the last evaluated batch; -1 is the last kept row."""
        return np.array(self._row(index), dtype=np.float32)

    def check_logits(self, index: int = -1) -> None:
        """Raise what `logits` raises, without the copy."""
        self._row(index)

    def _row(self, index: int) -> NDArray[np.float32]:
        row = llama.llama_get_logits_ith(self.handle, index)
        if not row:
            raise NativeError(f"no logits were kept at index {index}")
        logits = np.ctypeslib.as_array(row, shape=(self._model.vocabulary_size,))
        if np.isnan(logits).any():
            raise NativeError(
                f"{self._model.path.name} gave logits that are not numbers: the file is damaged, fetch it again"
            )
        return logits

    def forget(self, sequence: int, start: int = 0) -> bool:
        """Drop what a sequence holds from position `start` on; False where the cache can only drop the whole."""
        self._check_sequences(sequence)
        return bool(llama.llama_memory_seq_rm(self._live_memory(), sequence, start, -1))

    def clear(self) -> None:
        """Empty every sequence and its cells: a value that is no number would reach others even when masked."""
        llama.llama_memory_clear(self._live_memory(), True)

    def copy(self, source: int, target: int, *, stop: int = -1) -> None:
        """Let sequence `target` hold what `source` holds before position `stop`, or all of it.

        The cells are shared until one of them goes on. A recurrent model's memory is copied whole in any case.
        """
        self._check_sequences(source, target)
        llama.llama_memory_seq_cp(self._live_memory(), source, target, -1, stop)

    def checked_sequence(self, number: int) -> int:
        """The number, if the context has a sequence of it. Raises InputError where not."""
        self._check_sequences(number)
        return number

    def _check_sequences(self, *numbers: int) -> None:
        _checked("sequences", np.asarray(numbers), len(numbers), self._n_sequences)

    def _live_memory(self) -> llama.llama_memory_t:
        _ = self.handle
        return self._memory

    def close(self) -> None:
        """Free the cache; may be called twice."""
        self._native.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


_MOST_POSITIONS: Final = 2**31 - 1


def _checked(name: str, values: NDArray[np.integer], count: int, limit: int) -> NDArray[np.int32]:
    """The values as native code reads them. A wrong one would abort the process there, so it raises InputError here."""
    if values.shape != (count,) or not np.issubdtype(values.dtype, np.integer):
        raise InputError(f"{name} are {values.dtype} of shape {values.shape}: expected whole numbers, ({count},)")
    if not 0 <= int(values.min()) <= int(values.max()) < limit:
        raise InputError(f"{name} go from {values.min()} to {values.max()}: expected 0 to {limit - 1}")
    return np.ascontiguousarray(values, dtype=np.int32)


def _same(number: int, count: int) -> NDArray[np.integer]:
    return np.full(count, number)


def _flags(outputs: Outputs, count: int) -> NDArray[np.int8]:
    if isinstance(outputs, np.ndarray):
        return outputs.astype(np.int8)
    flags = np.full(count, outputs == "all", dtype=np.int8)
    if count:
        flags[-1] = outputs != "none"
    return flags
