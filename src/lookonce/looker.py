"""From a picture to its look: the store first, the vision tower only where the store has nothing.

Owns the projector's fingerprint and the lazily loaded tower. Knows nothing of prompts.
"""

import hashlib
import json
import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Final, Literal

import numpy as np
import PIL
from numpy.typing import NDArray

from lookonce import gguf_check, images
from lookonce.cards import ModelCard
from lookonce.embedding import FORMAT_VERSION, ImageEmbedding, RowSegment, to_stored_type
from lookonce.errors import InputError, MismatchError, ModelFileError, NativeError, PictureError, SavedLookError
from lookonce.fingerprint import Fingerprint
from lookonce.fork_lock import ForkLock
from lookonce.gguf_file import GgufFile, plain_name
from lookonce.images import Picture, PictureSource, PixelRule
from lookonce.native.library import Device, versions
from lookonce.native.text import TextModel
from lookonce.native.vision import VisionTower
from lookonce.store import Store
from lookonce.version import VERSION

logger = logging.getLogger(__name__)

RowType = Literal["f16", "f32"]
LOOK: Final = "look"  # the kind of store entry
SAVED_SUFFIXES: Final = frozenset({".safetensors", ".pt"})

_RULES: Final = {"qwen3vl": images.QWEN3_VL, "qwen2.5vl": images.QWEN2_VL, "qwen2vl": images.QWEN2_VL}


@dataclass(frozen=True, slots=True)
class LookOptions:
    """How a picture is looked at: limits that replace the family's own, and the type in which rows are stored."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    dtype: RowType = "f16"

    def __post_init__(self) -> None:
        if self.dtype not in ("f16", "f32"):
            raise InputError(f"dtype is {self.dtype!r}: choose f16 or f32")


@dataclass(frozen=True, slots=True)
class PendingLook:
    """A picture that the store does not hold: its size is known, the tower has not run yet."""

    picture: Picture
    key: str
    note: str | None
    n_rows: int
    dtype: RowType
    alias: None = None


class Projector:
    """One projector file: its header, its content's fingerprint, and how its family and its card size pictures."""

    def __init__(self, gguf: GgufFile, card: ModelCard | None, store: Store | None) -> None:
        self.gguf = gguf
        self._card = card
        self.path = gguf.path
        self._file = Fingerprint(gguf, store)  # of the file whose header was checked
        self._fingerprint: str | None = None

    @property
    def rule(self) -> PixelRule | None:
        """How the reference sizes pictures, within the card's limits; None where only libmtmd knows."""
        rule = _RULES.get(gguf_check.family(self.gguf))
        if rule is None:
            return None
        patch, merge = (self.gguf.metadata.get(f"clip.vision.{key}") for key in ("patch_size", "spatial_merge_size"))
        factor = patch * merge if isinstance(patch, int) and isinstance(merge, int) else rule.factor
        rule = replace(rule, factor=factor)
        return rule if self._card is None else rule.limited(self._card.min_pixels, self._card.max_pixels)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the file's content."""
        if self._fingerprint is None:
            self._fingerprint = self._file.value()
        return self._fingerprint

    def check_unchanged(self) -> None:
        """Raise ModelFileError where the file is no longer the one whose header was checked."""
        self._file.check_unchanged()


class Looker:
    """Looks at pictures for one text model.

    `lock` is the model's, held while the tower works. Without `projector` only saved looks can be used, and `missing`
    says why. With `chosen` only its own saved looks can.
    """

    def __init__(
        self,
        text: TextModel,
        text_gguf: GgufFile,
        projector: Projector | None,
        *,
        chosen: Projector | None,
        missing: str,
        store: Store | None,
        lock: ForkLock,
        threads: int,
        devices: tuple[Device, ...],
    ) -> None:
        self._text = text
        self._model_name = text_gguf.name
        self._projector = projector
        self._chosen = chosen
        self._missing = missing
        self._store = store
        self._lock = lock
        self._looking = ForkLock()  # taken before the model's lock
        self._threads = threads
        self._devices = devices
        self._tower: VisionTower | None = None

    @property
    def tower_depth(self) -> int:
        """Number of the vision tower's layers. Raises ModelFileError without a projector."""
        depth = self._require_projector().gguf.metadata.get("clip.vision.block_count")
        return depth if isinstance(depth, int) else 0

    @property
    def tower_loaded(self) -> bool:
        """Whether the vision tower takes memory."""
        return self._tower is not None

    def prepare(self, source: PictureSource | ImageEmbedding, options: LookOptions) -> ImageEmbedding | PendingLook:
        """The look of `source` where it is saved or in the store, else the picture made ready for the tower.

        Raises InputError's kinds for what cannot be looked at.
        """
        if isinstance(source, ImageEmbedding):
            return self.checked(source)
        if isinstance(source, str | PathLike) and Path(source).suffix.lower() in SAVED_SUFFIXES:
            look = self.checked(ImageEmbedding.load(source))
            if (options.min_pixels, options.max_pixels) != (None, None):
                logger.warning("%s is a saved look: the limits on pixels do not change it", source)
            return look
        projector = self._require_projector()
        rule = self._rule(projector, options)
        read = images.read_source(source)
        digest = images.source_digest(read, rule)
        note = None if digest is None else _digest(digest, options.dtype, *self._surroundings(projector))
        if note and (found := self._recall(note)):
            return found
        pending = self._pend(read, _name(source), rule, options.dtype, note)
        if found := self._stored(pending.key):
            self._remember(note, pending.key)
            return found
        return pending

    def prepare_anew(self, source: PictureSource, options: LookOptions) -> PendingLook:
        """A picture made ready for the tower, whatever the store holds."""
        rule = self._rule(self._require_projector(), options)
        return self._pend(images.read_source(source), _name(source), rule, options.dtype, None)

    def _pend(
        self, read: images.SourceRead, name: str | None, rule: PixelRule | None, dtype: RowType, note: str | None
    ) -> PendingLook:
        picture = images.open_picture(read, name)
        if rule is not None:
            picture = _fitted(picture, rule, name)
        width, height = picture.size
        n_rows = 0 if rule is None else (height // rule.factor) * (width // rule.factor)
        return PendingLook(picture, self._key(picture, dtype, self._require_projector()), note, n_rows, dtype)

    def check_options(self, options: LookOptions) -> None:
        """Raise InputError for limits that the projector's family cannot meet; any will do where there is none."""
        if self._projector is not None:
            self._rule(self._projector, options)

    def _rule(self, projector: Projector, options: LookOptions) -> PixelRule | None:
        rule = projector.rule
        if rule is not None:
            least, most = options.min_pixels, options.max_pixels
            if least is None and most is not None and most < rule.min_pixels:
                least = most  # a limit that the caller did not give makes room for one given
            elif most is None and least is not None and least > rule.max_pixels:
                most = least
            return rule.limited(least, most)
        if (options.min_pixels, options.max_pixels) != (None, None):
            raise InputError(
                f"{projector.path.name} sizes pictures itself: min_pixels and max_pixels are for the Qwen-VL families"
            )
        return None

    def finish(self, pending: PendingLook) -> ImageEmbedding:
        """Run the tower on a prepared picture and keep what it gives. Raises NativeError where it fails.

        Of several threads that bring the same new picture one runs it, and the store has it for the others.
        """
        with self._looking:
            return self._stored(pending.key) or self.finish_with(pending, ())[0]

    def finish_with(
        self, pending: PendingLook, tensors: Collection[str]
    ) -> tuple[ImageEmbedding, Mapping[str, NDArray[np.float32]]]:
        """As `finish`, with copies of tensors of the tower's graph, F32 (tokens, width)."""
        projector = self._require_projector()
        picture = pending.picture
        with self._lock:
            tower = self._open_tower(projector)
            encoded = tower.encode(picture.pixels, tensors)
        if pending.n_rows not in (0, len(encoded.rows)):
            raise NativeError(
                f"the tower gave {len(encoded.rows)} rows for a picture of {picture.size}, expected {pending.n_rows}: "
                "it resized the picture itself, which this version of llama-cpp-python should not do"
            )
        look = ImageEmbedding(
            rows=to_stored_type(encoded.rows, pending.dtype),
            positions=encoded.positions,
            segments=encoded.segments,
            key=pending.key,
            projector=projector.fingerprint,
            projector_name=projector.path.name,
            model_name=self._model_name,
            grid=_grid(encoded.positions, encoded.segments, mrope=tower.mrope),
            mrope=tower.mrope,
            picture_size=picture.original_size,
            encoded_size=picture.size,
            preprocessing=picture.preprocessing,
            libraries=_libraries(),
        )
        if self._store and self._store.put(pending.key, LOOK, look.to_bytes(), label=projector.path.name):
            self._remember(pending.note, pending.key)
        return look, encoded.tensors

    def keeps(self, look: ImageEmbedding) -> bool:
        """Whether a look can be had again without the tower: from a file of its own, or from the store."""
        return look.source != "encoded" or self._stored(look.key) is not None

    def checked(self, look: ImageEmbedding) -> ImageEmbedding:
        """The look itself, if this model can use it. Raises MismatchError with both names where not."""
        if look.width != self._text.input_width:
            raise MismatchError(
                f"the look was made for {look.model_name!r} with rows of {look.width}, but {self._model_name!r} takes "
                f"{self._text.input_width}: look at the picture with this model"
            )
        if plain_name(look.model_name) != plain_name(self._model_name) or look.mrope != self._text.mrope:
            raise MismatchError(
                f"the look was made for the text model {look.model_name!r}, but this is {self._model_name!r}: "
                "look at the picture with this model"
            )
        # Any projector of the model gives rows that it can read; one that was named is taken at its word.
        if self._chosen is not None and look.projector != self._chosen.fingerprint:
            raise MismatchError(
                f"the look was made with the projector {look.projector_name} ({look.projector[:12]}), but the model "
                f"has {self._chosen.path.name} ({self._chosen.fingerprint[:12]}): give the one it was made "
                "with, or look again"
            )
        return look

    def close(self) -> None:
        """Free the tower; may be called twice. The caller holds the lock."""
        if self._tower is not None:
            self._tower.close()
            self._tower = None

    def _require_projector(self) -> Projector:
        if self._projector is None:
            raise ModelFileError(self._missing)
        return self._projector

    def _open_tower(self, projector: Projector) -> VisionTower:
        if self._tower is None:
            started = time.perf_counter()
            projector.check_unchanged()
            tower = VisionTower(
                projector.path,
                self._text,
                threads=self._threads,
                devices=self._devices,
                exact_size=projector.rule is not None,
            )
            projector.check_unchanged()
            self._tower = tower
            logger.info("loaded the vision tower %s in %.2f s", projector.path, time.perf_counter() - started)
        return self._tower

    def _surroundings(self, projector: Projector) -> tuple[str, ...]:
        """What decides the rows beside the pixels."""
        return (
            projector.fingerprint,
            self._model_name,
            json.dumps(versions(), sort_keys=True),
            str(FORMAT_VERSION),
        )

    def _key(self, picture: Picture, dtype: RowType, projector: Projector) -> str:
        # The size before resizing is not seen by the tower, but the look tells it.
        size = json.dumps(picture.original_size)
        surroundings = self._surroundings(projector)
        return _digest("look", picture.content_hash(), size, picture.preprocessing, dtype, *surroundings)

    def _stored(self, key: str) -> ImageEmbedding | None:
        payload = self._store.get(key, LOOK) if self._store else None
        if payload is None:
            return None
        try:
            look = ImageEmbedding.from_bytes(payload, name=f"store entry {key[:12]}", source="store")
            if look.key != key:
                raise SavedLookError(f"store entry {key[:12]} holds the look {look.key[:12]}")
            return self.checked(look)
        except InputError as error:
            logger.warning("%s: looking at the picture again", error)
            return None

    def _recall(self, note: str) -> ImageEmbedding | None:
        key = self._store.recall("picture", note) if self._store else None
        return None if key is None else self._stored(key)

    def _remember(self, note: str | None, key: str) -> None:
        if self._store and note:
            self._store.remember("picture", note, key)


def _fitted(picture: Picture, rule: PixelRule, name: str | None) -> Picture:
    try:
        return images.fit(picture, rule)
    except PictureError as error:  # which knows the size alone
        raise PictureError(str(error) if name is None else f"{name}: {error}") from error


def _grid(positions: NDArray[np.int32], segments: tuple[object, ...], *, mrope: bool) -> tuple[int, int]:
    """(rows, columns) of merged tokens; one row where the architecture has no grid, or several slices."""
    slices = sum(isinstance(segment, RowSegment) for segment in segments)
    if not mrope or slices != 1:
        return (1, len(positions))
    _, rows, columns = positions.max(axis=0) + 1
    return (int(rows), int(columns))


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _libraries() -> dict[str, str]:
    return {"lookonce": VERSION, "pillow": PIL.__version__, **versions()}


def _name(source: PictureSource) -> str | None:
    return str(source) if isinstance(source, str | PathLike) else None
