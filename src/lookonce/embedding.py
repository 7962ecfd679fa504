"""`ImageEmbedding`, the look that one picture leaves, and the file it is saved in.

Knows nothing about native code, pictures or the store: a look comes in as arrays and goes out as bytes.

The file is one safetensors file (https://huggingface.co/docs/safetensors: a little-endian 64-bit header
length, a JSON header, the tensors' bytes) with the tensors `rows` and `positions`. Its metadata holds one
text per field of `ImageEmbedding`, structured fields as JSON, and a SHA-256 over all of them and over the
tensors, so that a changed byte is noticed before anything is used. Fields that this version does not know are
left unread.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lookonce.durable import write_durably
from lookonce.errors import InputError, NotFiniteError, PromptError, SavedLookError
from lookonce.saved_file import read_saved
from lookonce.tensor_file import DTYPE_NAMES, array_bytes, compact_json, pack, unpack

__all__ = ["FORMAT_VERSION", "ImageEmbedding", "RowSegment", "Segment", "TextSegment", "to_stored_type"]

FORMAT_VERSION = 1

_MAX_POSITIONS = 1 << 24
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_PLAIN_FIELDS = ("key", "projector", "projector_name", "model_name", "preprocessing", "text")
_JSON_FIELDS = ("segments", "grid", "mrope", "picture_size", "encoded_size", "libraries")
_FIELDS = ("format_version", *_PLAIN_FIELDS, *_JSON_FIELDS)
_TENSORS = ("rows", "positions")


@dataclass(frozen=True, slots=True)
class TextSegment:
    """Token ids that stand before, between or after the rows."""

    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RowSegment:
    """Rows that are decoded together; `n_positions` is how far they move the position."""

    n_rows: int
    n_positions: int
    causal: bool


Segment = TextSegment | RowSegment


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ImageEmbedding:
    """A look: what the projector gives for one picture, and all that replaying it needs.

    Immutable, and checked when it is made: wrong parts raise `SavedLookError`. The arrays are kept as
    read-only views, not copies, so whoever makes a look hands them over. `alias` and `source` are not saved.
    """

    rows: NDArray[np.float16 | np.float32]
    """(n_rows, width), finite."""
    positions: NDArray[np.int32]
    """(n_rows, 3): t, y, x, relative to the position at which the row's segment starts."""
    segments: tuple[Segment, ...]
    """In order, as the native library splits the picture."""
    key: str
    projector: str
    """The fingerprint of the projector file, 64 hexadecimal digits."""
    projector_name: str
    """The projector's file name, for messages only."""
    model_name: str
    """The text model's `general.name`."""
    grid: tuple[int, int]
    """Merged tokens: rows of the picture, columns."""
    mrope: bool
    picture_size: tuple[int, int]
    """Width and height before resizing."""
    encoded_size: tuple[int, int]
    """Width and height as encoded."""
    preprocessing: str
    libraries: Mapping[str, str]
    """Version by library's name."""
    alias: str | None = None
    """The text that stands for the look in a prompt."""
    source: Literal["encoded", "store", "file"] = "encoded"
    text: str = ""
    """A text saved beside the look."""

    def __post_init__(self) -> None:
        _check_alias(self.alias)
        _check_arrays(self.rows, self.positions)
        _check_segments(self.segments, self.positions)
        _check_facts(self)
        object.__setattr__(self, "rows", _read_only(self.rows))
        object.__setattr__(self, "positions", _read_only(self.positions))
        object.__setattr__(self, "libraries", MappingProxyType(dict(sorted(self.libraries.items()))))

    def __repr__(self) -> str:
        rows, columns = self.grid
        return f"<look of {self.n_rows} rows ({rows} x {columns}) for {self.model_name!r}, {self.source}>"

    @property
    def n_rows(self) -> int:
        """The number of image tokens."""
        return int(self.rows.shape[0])

    @property
    def width(self) -> int:
        """The floats in a row; the text model's `n_embd_inp`."""
        return int(self.rows.shape[1])

    @property
    def n_positions(self) -> int:
        """How far the whole look, its text tokens included, moves the position."""
        return sum(len(s.tokens) if isinstance(s, TextSegment) else s.n_positions for s in self.segments)

    @property
    def tokens_before(self) -> tuple[int, ...]:
        """The token ids before the first row."""
        return _leading_tokens(self.segments)

    @property
    def tokens_after(self) -> tuple[int, ...]:
        """The token ids after the last row."""
        return _leading_tokens(self.segments[::-1], backwards=True)

    def with_alias(self, alias: str | None) -> ImageEmbedding:
        """Give the same look (the arrays are shared) under another alias."""
        _check_alias(alias)
        renamed = copy.copy(self)
        object.__setattr__(renamed, "alias", alias)
        return renamed

    def to_bytes(self) -> bytes:
        """Give the look as a safetensors file; equal looks give equal bytes."""
        return pack(_metadata(self), {"rows": self.rows, "positions": self.positions})

    @classmethod
    def from_bytes(
        cls,
        data: bytes | memoryview,
        *,
        name: str = "the saved look",
        source: Literal["store", "file"] = "file",
    ) -> ImageEmbedding:
        """Read what `to_bytes` gave; the arrays share the memory of `data`.

        `name` stands in the messages. Anything wrong raises `SavedLookError` before the look exists. Of a payload from
        the store the checksum is not taken again: the store has just verified the very bytes.
        """
        metadata, arrays = unpack(data, _TENSORS, name=name)
        return _assemble(metadata, arrays["rows"], arrays["positions"], name=name, source=source)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the look to a `.safetensors` file, or to a `.pt` file where torch is installed.

        The file appears complete or not at all. Raises `SavedLookError` where it cannot be written.
        """
        path = Path(path)
        data = _to_torch(self, path) if _is_torch(path) else self.to_bytes()
        try:
            write_durably(path, data)
        except OSError as error:
            raise SavedLookError(f"{path} cannot be written: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ImageEmbedding:
        """Read a saved look, checked to the last byte."""
        path = Path(path)
        if _is_torch(path):
            return _from_torch(read_saved(path, None, "saved look", safetensors=False), path)
        return cls.from_bytes(read_saved(path, _TENSORS, "saved look"), name=path.name)


def to_stored_type(rows: NDArray[np.float32], dtype: Literal["f16", "f32"] = "f16") -> NDArray[Any]:
    """Round fresh rows to the type they are stored in: F16, or F32 on request or where F16 would overflow.

    Raises `NotFiniteError` for values that are not finite, as a damaged projector file gives.
    """
    if dtype not in ("f16", "f32"):
        raise InputError(f"dtype {dtype!r} is not a type that rows are stored in: use 'f16' or 'f32'")
    full = np.ascontiguousarray(rows, dtype=np.float32)
    if not _all_finite(full):
        raise NotFiniteError(
            "the projector gave values that are not finite: its file may be damaged, check it with `lookonce models "
            "verify`"
        )
    if dtype == "f32":
        return full
    with np.errstate(over="ignore"):
        half = full.astype(np.float16)
    return half if _all_finite(half) else full


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    view: NDArray[Any] = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view


def _all_finite(rows: NDArray[Any]) -> bool:
    """Tell whether no exponent is all ones, at a fraction of `np.isfinite`'s cost for F16."""
    if rows.dtype == np.float16:
        return bool(np.all((rows.view(np.uint16) & 0x7C00) != 0x7C00))
    return bool(np.isfinite(rows).all())


def _leading_tokens(segments: tuple[Segment, ...], *, backwards: bool = False) -> tuple[int, ...]:
    found: list[tuple[int, ...]] = []
    for segment in segments:
        if isinstance(segment, RowSegment):
            break
        found.append(segment.tokens)
    return tuple(token for tokens in (found[::-1] if backwards else found) for token in tokens)


def _check_alias(alias: str | None) -> None:
    if alias is not None and (not isinstance(alias, str) or not alias.strip()):
        raise PromptError(f"alias {alias!r} cannot stand in a prompt: give a text such as '<image_1>'")


def _check_arrays(rows: NDArray[Any], positions: NDArray[Any]) -> None:
    if rows.ndim != 2 or 0 in rows.shape or rows.dtype not in (np.float16, np.float32):
        raise SavedLookError(f"rows are {rows.dtype} of shape {rows.shape}, expected F16 or F32 (n_rows, width)")
    if positions.shape != (rows.shape[0], 3) or positions.dtype != np.int32:
        raise SavedLookError(
            f"positions are {positions.dtype} of shape {positions.shape}, expected int32 ({rows.shape[0]}, 3)"
        )
    if not _all_finite(rows):
        raise SavedLookError("rows hold values that are not finite")


def _is_count(value: object, *, least: int, most: int = _MAX_POSITIONS) -> bool:
    return type(value) is int and least <= value <= most


def _check_segments(segments: tuple[Segment, ...], positions: NDArray[np.int32]) -> None:
    start = 0
    for segment in segments:
        if isinstance(segment, TextSegment):
            if not all(_is_count(token, least=0, most=2**31 - 1) for token in segment.tokens):
                raise SavedLookError("segments hold a token id that is not a whole number from 0 on")
            continue
        counts = _is_count(segment.n_rows, least=1) and _is_count(segment.n_positions, least=1)
        if not counts or type(segment.causal) is not bool:
            raise SavedLookError(f"{segment} is not a segment: counts start at 1")
        part = positions[start : start + segment.n_rows]
        if part.size and not 0 <= int(part.min()) <= int(part.max()) < segment.n_positions:
            raise SavedLookError(
                f"positions run from {part.min()} to {part.max()}, expected 0 to {segment.n_positions - 1}"
            )
        start += segment.n_rows
    if start != len(positions):
        raise SavedLookError(f"segments name {start} rows, and there are {len(positions)}")


def _check_facts(look: ImageEmbedding) -> None:
    for name in ("key", "projector"):
        if not isinstance(getattr(look, name), str) or not _FINGERPRINT.fullmatch(getattr(look, name)):
            raise SavedLookError(f"{name} {getattr(look, name)!r} is not 64 hexadecimal digits")
    for name in ("grid", "picture_size", "encoded_size"):
        pair = getattr(look, name)
        if not isinstance(pair, tuple) or len(pair) != 2 or not all(_is_count(n, least=1) for n in pair):
            raise SavedLookError(f"{name} {pair!r} is not two numbers from 1 on")
    if type(look.mrope) is not bool:
        raise SavedLookError(f"mrope {look.mrope!r} is neither true nor false")
    texts = [getattr(look, name) for name in _PLAIN_FIELDS]
    for text in (*texts, *look.libraries.keys(), *look.libraries.values()):
        try:
            str.encode(text)
        except (TypeError, UnicodeEncodeError) as error:
            raise SavedLookError(f"{text!r} is not a text that UTF-8 can hold") from error


def _metadata(look: ImageEmbedding) -> dict[str, str]:
    segments = [
        {"tokens": s.tokens}
        if isinstance(s, TextSegment)
        else {"rows": s.n_rows, "positions": s.n_positions, "causal": s.causal}
        for s in look.segments
    ]
    metadata = {"format_version": str(FORMAT_VERSION), "segments": compact_json(segments)}
    metadata |= {name: getattr(look, name) for name in _PLAIN_FIELDS}
    metadata |= {name: compact_json(getattr(look, name)) for name in ("grid", "mrope", "picture_size", "encoded_size")}
    metadata["libraries"] = compact_json(dict(look.libraries))
    metadata["sha256"] = _checksum(metadata, look.rows, look.positions)
    return metadata


def _checksum(metadata: Mapping[str, str], rows: NDArray[Any], positions: NDArray[Any]) -> str:
    # JSON can spell half a surrogate pair, which the look's own checks then refuse.
    facts = compact_json([[name, metadata[name]] for name in _FIELDS])
    digest = hashlib.sha256(facts.encode(errors="surrogatepass"))
    for name, array in (("rows", rows), ("positions", positions)):
        digest.update(compact_json([name, DTYPE_NAMES[array.dtype], array.shape]).encode())
        digest.update(array_bytes(array))
    return digest.hexdigest()


def _assemble(
    metadata: Mapping[str, str],
    rows: NDArray[Any],
    positions: NDArray[Any],
    *,
    name: str,
    source: Literal["store", "file"],
) -> ImageEmbedding:
    """Check version and checksum, then make the look; its own checks do the rest."""
    version = metadata.get("format_version", "")
    if version.isdecimal() and int(version[:9]) > FORMAT_VERSION:
        raise SavedLookError(
            f"{name} has format version {version}, and this lookonce reads {FORMAT_VERSION}: update lookonce"
        )
    missing = [field for field in (*_FIELDS, "sha256") if field not in metadata]
    if missing:
        raise SavedLookError(f"{name} is damaged: its header lacks {', '.join(missing)}")
    # Swaps nothing on the little-endian machines nearly everyone has, so the memory stays shared.
    rows, positions = (a.astype(a.dtype.newbyteorder("="), copy=False) for a in (rows, positions))
    if {rows.dtype, positions.dtype} - DTYPE_NAMES.keys() or (
        source == "file" and _checksum(metadata, rows, positions) != metadata["sha256"]
    ):
        raise SavedLookError(f"{name} is damaged: its SHA-256 differs from the one saved in it")
    try:
        facts = {field: json.loads(metadata[field]) for field in _JSON_FIELDS}
        return ImageEmbedding(
            rows=rows,
            positions=positions,
            segments=tuple(map(_read_segment, facts["segments"])),
            grid=_read_pair(facts["grid"]),
            mrope=facts["mrope"],
            picture_size=_read_pair(facts["picture_size"]),
            encoded_size=_read_pair(facts["encoded_size"]),
            libraries=dict(facts["libraries"]),
            source=source,
            **{field: metadata[field] for field in _PLAIN_FIELDS},
        )
    except SavedLookError as error:
        raise SavedLookError(f"{name} is damaged: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SavedLookError(f"{name} is damaged: its metadata cannot be read") from error


def _read_segment(entry: Mapping[str, Any]) -> Segment:
    if entry.keys() == {"tokens"}:
        return TextSegment(tuple(entry["tokens"]))
    return RowSegment(entry["rows"], entry["positions"], entry["causal"])


def _read_pair(value: Sequence[int]) -> tuple[int, int]:
    height, width = value
    return height, width


def _is_torch(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", ".pt"):
        raise SavedLookError(f"{path} is not a saved look's name: end it in .safetensors, or .pt with torch")
    return suffix == ".pt"


def _import_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise SavedLookError(f"{path} needs torch: install it, or use a .safetensors file") from error
    return torch


def _to_torch(look: ImageEmbedding, path: Path) -> bytes:
    torch = _import_torch(path)
    buffer = io.BytesIO()
    tensors = {"rows": torch.tensor(look.rows.copy()), "positions": torch.tensor(look.positions.copy())}
    torch.save({**tensors, "metadata": compact_json(_metadata(look))}, buffer)
    return buffer.getvalue()


def _from_torch(data: bytes, path: Path) -> ImageEmbedding:
    torch = _import_torch(path)
    try:
        saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        rows, positions = (saved[tensor].contiguous().numpy() for tensor in ("rows", "positions"))
        metadata = {field: str(value) for field, value in json.loads(saved["metadata"]).items()}
    # torch.load names no exceptions: a damaged file shows as any of a dozen kinds.
    except Exception as error:
        raise SavedLookError(f"{path.name} is not a saved look, or is damaged") from error
    return _assemble(metadata, rows, positions, name=path.name, source="file")
