"""The vision tower and projector: pixels in, rows and their positions out."""

import ctypes
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import llama_cpp.mtmd_cpp as mtmd
import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from lookonce.embedding import RowSegment, Segment, TextSegment
from lookonce.errors import InputError, ModelFileError, NativeError, with_log
from lookonce.native.capture import Capture
from lookonce.native.library import Device, Handle, listen
from lookonce.native.text import TextModel

# Beyond any size that Python's resizing chooses, so libmtmd leaves an exact size alone.
_SMALLEST_TOKENS, _LARGEST_TOKENS = 1, 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class EncodedPicture:
    """What the projector gave: F32 rows (n, width), int32 positions (n, 3) as (t, y, x), and the segments in order.

    `tensors` are the graph's that were asked for, F32 (tokens, width), those of several slices one after the other.
    """

    rows: NDArray[np.float32]
    positions: NDArray[np.int32]
    segments: tuple[Segment, ...]
    tensors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


class VisionTower:
    """One mmproj file: vision tower and projector, bound to the text model whose rows it makes.

    `exact_size` keeps libmtmd from resizing: the caller has already given every picture its final size. Raises
    ModelFileError with the native reason for a file that cannot be loaded, or has no vision tower.
    """

    def __init__(
        self,
        path: Path,
        model: TextModel,
        *,
        threads: int,
        devices: tuple[Device, ...] = (),
        exact_size: bool = True,
        flash_attention: bool | None = None,
    ) -> None:
        params = mtmd.mtmd_context_params_default()
        params.use_gpu = bool(devices)
        if devices:
            params.device = devices[0].handle
        params.n_threads = threads
        params.print_timings = False
        params.warmup = False
        if flash_attention is not None:
            params.flash_attn_type = int(flash_attention)
        if exact_size:
            params.image_min_tokens, params.image_max_tokens = _SMALLEST_TOKENS, _LARGEST_TOKENS
        self._capture = Capture(())  # as long as it wants nothing it costs some milliseconds a picture
        params.cb_eval = self._capture.callback
        with listen() as log:
            handle = mtmd.mtmd_init_from_file(os.fsencode(path), model.handle, params)
            if handle:
                self._native = Handle(handle, mtmd.mtmd_free, f"the vision tower {path.name}", needs=model.native)
        if not handle:
            reason = f"{path} could not be loaded as a projector for {model.path.name}"
            raise ModelFileError(with_log(reason, log.tail()))
        self._model = model
        self.path = path
        if not mtmd.mtmd_support_vision(handle):
            self.close()
            raise ModelFileError(f"{path} has no vision tower: give the mmproj file of a vision-language model")
        self.mrope = bool(mtmd.mtmd_decode_use_mrope(handle))

    @property
    def handle(self) -> mtmd.mtmd_context_p:
        """The native handle, for this package only; raises ClosedError after `close`."""
        return self._native.pointer

    def encode(self, pixels: NDArray[np.uint8], tensors: Collection[str] = ()) -> EncodedPicture:
        """Encode one RGB picture, uint8 (H, W, 3), and copy the named tensors of the graph on the way.

        Raises NativeError where the native library fails at it.
        """
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
            raise InputError(f"pixels are {pixels.dtype} of shape {pixels.shape}: expected uint8 (height, width, 3)")
        height, width, _ = pixels.shape
        data = np.ascontiguousarray(pixels)
        bitmap = mtmd.mtmd_bitmap_init(width, height, data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
        chunks = mtmd.mtmd_input_chunks_init()
        try:
            with listen() as log:
                marker = mtmd.mtmd_get_marker(self.handle)
                text = mtmd.mtmd_input_text(marker, len(marker), False, True)
                status = mtmd.mtmd_tokenize(self.handle, chunks, ctypes.byref(text), (ctypes.c_void_p * 1)(bitmap), 1)
                if status:
                    raise NativeError(f"a picture of {width}x{height} could not be prepared", log.tail())
            self._capture.clear()
            with self._capture.watch(tensors):
                return self._encode_chunks(chunks)
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
            mtmd.mtmd_bitmap_free(bitmap)

    def _encode_chunks(self, chunks: mtmd.mtmd_input_chunks_p) -> EncodedPicture:
        segments: list[Segment] = []
        rows: list[NDArray[np.float32]] = []
        positions: list[NDArray[np.int32]] = []
        for index in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk = mtmd.mtmd_input_chunks_get(chunks, index)
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                segments.append(_text_segment(chunk))
                continue
            rows.append(self._encode_rows(chunk))
            positions.append(_relative_positions(chunk))
            segments.append(
                RowSegment(
                    n_rows=len(rows[-1]),
                    n_positions=int(mtmd.mtmd_input_chunk_get_n_pos(chunk)),
                    causal=not mtmd.mtmd_decode_use_non_causal(self.handle, chunk),
                )
            )
        found = {name: np.concatenate(values) for name, values in self._capture.values.items()}
        return EncodedPicture(np.concatenate(rows), np.concatenate(positions), tuple(segments), found)

    def _encode_rows(self, chunk: mtmd.mtmd_input_chunk_p) -> NDArray[np.float32]:
        with listen() as log:
            status = mtmd.mtmd_encode_chunk(self.handle, chunk)
        self._capture.raise_pending()
        output = mtmd.mtmd_get_output_embd(self.handle)
        if status or not output:
            raise NativeError(f"the vision tower {self.path.name} failed with status {status}", log.tail())
        count = int(mtmd.mtmd_input_chunk_get_n_tokens(chunk))
        return np.array(np.ctypeslib.as_array(output, shape=(count, self._model.input_width)), dtype=np.float32)

    def close(self) -> None:
        """Free the tower; may be called twice."""
        self._native.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def _text_segment(chunk: mtmd.mtmd_input_chunk_p) -> TextSegment:
    count = ctypes.c_size_t()
    tokens = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
    return TextSegment(tuple(int(token) for token in tokens[: count.value]))


def _relative_positions(chunk: mtmd.mtmd_input_chunk_p) -> NDArray[np.int32]:
    tokens = mtmd.mtmd_input_chunk_get_tokens_image(chunk)
    count = int(mtmd.mtmd_input_chunk_get_n_tokens(chunk))
    found = [mtmd.mtmd_image_tokens_get_decoder_pos(tokens, 0, index) for index in range(count)]
    return np.array([(one.t, one.y, one.x) for one in found], dtype=np.int32)
