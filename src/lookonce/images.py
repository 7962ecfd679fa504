"""Pictures: opened, checked, put upright, and sized as the models' reference processors size them.

Owns every decision between a path, bytes, a PIL image or an array and the exact RGB pixels that a vision
tower sees. Knows nothing of models, stores or native code.

>>> import numpy as np
>>> picture = open_picture(np.zeros((300, 400, 3), np.uint8))
>>> fit(picture, QWEN3_VL).size
(384, 288)
"""

import hashlib
import io
import logging
import math
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError, features

from lookonce.errors import PictureError

__all__ = [
    "DECODE_VERSION",
    "FORMATS",
    "MAX_FILE_BYTES",
    "MAX_PICTURE_PIXELS",
    "QWEN2_VL",
    "QWEN3_VL",
    "Picture",
    "PictureSource",
    "PixelRule",
    "SourceRead",
    "fit",
    "open_picture",
    "read_source",
    "smart_size",
    "source_digest",
]

logger = logging.getLogger(__name__)

PictureSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[Any]
"""Whatever the library takes as a picture."""

SourceRead: TypeAlias = bytes | Image.Image | NDArray[np.uint8]
"""A picture source after `read_source`: nothing in it can change on disk any more."""

DECODE_VERSION = 1
"""Raised by one whenever this module starts to make other pixels from the same file."""

MAX_PICTURE_PIXELS = 2**27
"""Largest picture that is decoded or made: 134 million pixels, for which Pillow takes up to 2.1 GB of memory."""

MAX_FILE_BYTES = 2**29
"""Largest file that is read: the largest picture, stored uncompressed, takes 0.4 GB."""

# Raster formats with a decoder of their own inside Pillow. EPS would start Ghostscript, WMF and PDF are
# drawings, ICO and ICNS hold several pictures, TGA has no signature and so claims files of any other kind.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""The file formats that are opened, by Pillow's names."""

# EXIF 2.32, tag 0x0112: what undoes each orientation; 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_quiet_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class PixelRule:
    """How one model family's reference processor sizes a picture.

    Both sides become multiples of `factor`, their product lies between `min_pixels` and `max_pixels`.
    Raises PictureError where the limits make no sense.
    """

    name: str
    factor: int
    min_pixels: int
    max_pixels: int

    def __post_init__(self) -> None:
        for field in ("factor", "min_pixels", "max_pixels"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PictureError(f"{field} {value!r} is not usable: expected a whole number of at least 1")
        if self.max_pixels < self.factor**2:
            raise PictureError(
                f"max_pixels {self.max_pixels} is less than one image token of {self.name}: "
                f"expected at least {self.factor**2}"
            )
        if self.max_pixels > MAX_PICTURE_PIXELS:
            raise PictureError(
                f"max_pixels {self.max_pixels} is more than any picture may have: expected at most {MAX_PICTURE_PIXELS}"
            )
        if self.min_pixels > self.max_pixels:
            raise PictureError(
                f"min_pixels {self.min_pixels} is more than max_pixels {self.max_pixels}: "
                f"give a smaller min_pixels or a larger max_pixels"
            )

    def limited(self, min_pixels: int | None, max_pixels: int | None) -> "PixelRule":
        """Return this rule with the caller's limits; None keeps the rule's own."""
        return replace(
            self,
            min_pixels=self.min_pixels if min_pixels is None else min_pixels,
            max_pixels=self.max_pixels if max_pixels is None else max_pixels,
        )


# The limits of the families' published preprocessor_config.json files.
QWEN3_VL = PixelRule("qwen3vl", 32, 65_536, 16_777_216)
QWEN2_VL = PixelRule("qwen2vl", 28, 3_136, 12_845_056)


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """RGB pixels, ready for a vision tower.

    `pixels` is uint8 (height, width, 3), C-contiguous and read-only; an array that is not so is copied.
    `original_size` is (width, height), upright, before any resizing. `preprocessing` names what made the
    pixels, without the limits: one rule's equal pixels have equal descriptions. Raises PictureError.
    """

    pixels: NDArray[np.uint8]
    original_size: tuple[int, int]
    preprocessing: str

    def __post_init__(self) -> None:
        pixels = self.pixels
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
            raise PictureError(
                f"pixels of shape {pixels.shape} and type {pixels.dtype} are no picture: "
                f"expected uint8 (height, width, 3)"
            )
        if pixels.flags.writeable or not pixels.flags.c_contiguous:
            pixels = np.array(pixels, order="C")
            pixels.flags.writeable = False
            object.__setattr__(self, "pixels", pixels)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the pixels."""
        height, width, _ = self.pixels.shape
        return width, height

    def content_hash(self) -> str:
        """Return the SHA-256, in hex, over the shape and every pixel."""
        width, height = self.size
        digest = hashlib.sha256(f"lookonce picture rgb8 {height}x{width}\n".encode())
        digest.update(self.pixels.data)
        return digest.hexdigest()


def read_source(source: PictureSource) -> SourceRead:
    """Return a path's bytes, read exactly once; check anything else and return it as it is.

    What `source_digest` and `open_picture` are then given is the same content, whatever happens to the
    file meanwhile. Raises PictureError for a path that is no ordinary, readable file, for what is too large
    and for types, shapes and dtypes that are no picture.
    """
    return _read(source, _describe(source))


def source_digest(source: SourceRead, rule: PixelRule | None) -> str | None:
    """Return the SHA-256, in hex, over a file's bytes and all that decides which pixels they become.

    Equal digests promise equal pixels, so that an unchanged file needs no decoding. None for PIL images and
    arrays: their pixels are at hand anyway.
    """
    if not isinstance(source, bytes):
        return None
    deciding = (
        "lookonce source",
        DECODE_VERSION,
        PIL.__version__,
        features.version("libjpeg_turbo"),
        features.version("webp"),
        ImageFile.LOAD_TRUNCATED_IMAGES,
        None if rule is None else (rule.name, rule.factor, rule.min_pixels, rule.max_pixels),
        len(source),
    )
    digest = hashlib.sha256(repr(deciding).encode())
    digest.update(source)
    return digest.hexdigest()


def open_picture(source: PictureSource, name: str | None = None) -> Picture:
    """Return a picture in RGB at its own size, upright, over white where it is transparent.

    Of an animation, the first frame; of 16-bit samples, the high byte; colour profiles are ignored, as the
    reference ignores them. `name` is only for messages. A PIL image stays as it is. Safe from any thread.
    Raises PictureError for whatever cannot be opened or is beyond the limits.
    """
    described = _describe(source) if name is None else _quote(name)
    source = _read(source, described)
    with _pillow_errors(described), _pillow_quiet():
        if isinstance(source, np.ndarray):
            rgb = _rgb(Image.fromarray(np.ascontiguousarray(source)), described)
        elif isinstance(source, bytes):
            with Image.open(io.BytesIO(source), formats=FORMATS) as image:
                rgb = _upright(image, described)
        else:
            rgb = _upright(source.copy(), described)
        return Picture(_pixels(rgb), rgb.size, "rgb")


def check_header(source: PictureSource, name: str) -> None:
    """Read a picture's file and its header, and decode nothing. Raises PictureError as `open_picture`, of less."""
    described = _quote(name)
    read = _read(source, described)
    if isinstance(read, bytes):
        with _pillow_errors(described), _pillow_quiet(), Image.open(io.BytesIO(read), formats=FORMATS) as image:
            _check_pixels(image.width, image.height, described)


def smart_size(height: int, width: int, rule: PixelRule) -> tuple[int, int]:
    """Return the (height, width) that the reference gives a picture.

    This is `smart_resize` of transformers' models/qwen2_vl/image_processing_qwen2_vl.py, with its rounding
    (half to even), floor and ceiling. Raises PictureError where one side is over 200 times the other, which
    is an error there too.
    """
    if min(height, width) < 1 or max(height, width) / min(height, width) > 200:
        raise PictureError(
            f"a picture of {width} x {height} pixels is too long for {rule.name}: "
            f"expected no side over 200 times the other, crop it first"
        )
    factor = rule.factor
    fitted_height = round(height / factor) * factor
    fitted_width = round(width / factor) * factor
    if fitted_height * fitted_width > rule.max_pixels:
        beta = math.sqrt((height * width) / rule.max_pixels)
        fitted_height = max(factor, math.floor(height / beta / factor) * factor)
        fitted_width = max(factor, math.floor(width / beta / factor) * factor)
    elif fitted_height * fitted_width < rule.min_pixels:
        beta = math.sqrt(rule.min_pixels / (height * width))
        fitted_height = math.ceil(height * beta / factor) * factor
        fitted_width = math.ceil(width * beta / factor) * factor
    return fitted_height, fitted_width


def fit(picture: Picture, rule: PixelRule) -> Picture:
    """Return the picture at the size that `smart_size` gives it, resized by Pillow's bicubic filter.

    A picture of the right size keeps its very pixels. Raises PictureError as `smart_size` does.
    """
    width, height = picture.size
    fitted_height, fitted_width = smart_size(height, width, rule)
    pixels = picture.pixels
    if (fitted_height, fitted_width) != (height, width):
        with _pillow_errors(f"a picture of {width} x {height} pixels"):
            resized = Image.fromarray(pixels).resize((fitted_width, fitted_height), Image.Resampling.BICUBIC)
            pixels = _pixels(resized)
    return Picture(pixels, picture.original_size, f"{rule.name}/{rule.factor}/pillow-bicubic")


def _quote(text: str) -> str:
    # repr keeps a message on one line and printable; a whole file given as base64 must not flood it.
    quoted = repr(text)
    return quoted if len(quoted) <= 300 else f"{quoted[:140]} ... {quoted[-140:]}"


def _describe(source: PictureSource) -> str:
    if isinstance(source, (str, os.PathLike)):
        return _quote(os.fspath(source))
    if isinstance(source, bytes):
        return f"a picture of {len(source)} bytes"
    if isinstance(source, np.ndarray):
        return f"an array of shape {source.shape} and type {source.dtype}"
    return f"a {type(source).__name__} object"


def _read(source: PictureSource, described: str) -> SourceRead:
    if isinstance(source, (str, os.PathLike)):
        source = _read_file(os.fspath(source), described)
    if isinstance(source, bytes):
        if not source:
            raise PictureError(f"{described} is empty: expected a picture file, save or fetch it again")
        _check_file_size(len(source), described)
    elif isinstance(source, np.ndarray):
        colour = source.ndim == 3 and source.shape[2] in (3, 4)
        if source.dtype != np.uint8 or not (colour or source.ndim == 2):
            raise PictureError(
                f"an array of shape {source.shape} and type {source.dtype} is no picture: "
                f"expected uint8 (height, width, 3), (height, width, 4) or (height, width)"
            )
        _check_pixels(source.shape[1], source.shape[0], described)
    elif isinstance(source, Image.Image):
        _check_pixels(*source.size, described)
    else:
        raise PictureError(f"{described} is no picture: expected a path, bytes, a PIL image or a uint8 array")
    return source


def _read_file(path: str, described: str) -> bytes:
    try:
        return _read_regular(path, described)
    except PictureError:
        raise
    except FileNotFoundError:
        raise PictureError(f"{described} does not exist: check the path") from None
    except IsADirectoryError:
        raise PictureError(f"{described} is a folder: expected a picture file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PictureError(f"{described} cannot be read ({reason}): check the path and its rights") from error


def _read_regular(path: str, described: str) -> bytes:
    with open(path, "rb", opener=_open_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise PictureError(f"{described} is a device or a pipe: expected a picture file")
        _check_file_size(status.st_size, described)
        # One byte more than allowed, in case the file grows or does not tell its size.
        return file.read(MAX_FILE_BYTES + 1)


def _open_without_waiting(path: str, flags: int) -> int:
    # A named pipe without a writer would otherwise hold the process for ever.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_file_size(size_bytes: int, described: str) -> None:
    if size_bytes > MAX_FILE_BYTES:
        raise PictureError(
            f"{described} has {size_bytes} bytes: expected at most {MAX_FILE_BYTES}, make it smaller first"
        )


def _check_pixels(width: int, height: int, described: str) -> None:
    if width < 1 or height < 1:
        raise PictureError(f"{described} is {width} x {height} pixels: expected at least one pixel")
    if width * height > MAX_PICTURE_PIXELS:
        raise PictureError(
            f"{described} is {width} x {height} pixels: "
            f"expected at most {MAX_PICTURE_PIXELS} in all, make it smaller first"
        )


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextmanager
def _pillow_errors(described: str) -> Iterator[None]:
    """Turn whatever Pillow raises into a PictureError."""
    try:
        yield
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError(
            f"{described} is not a picture that can be opened: expected a whole file in one of the formats "
            f"{', '.join(FORMATS)}, convert it first"
        ) from None
    except Image.DecompressionBombError as error:
        raise PictureError(
            f"{described} has too many pixels: expected at most {MAX_PICTURE_PIXELS}, make it smaller first"
        ) from error
    except MemoryError as error:
        raise PictureError(f"{described} does not fit in memory: make it smaller first") from error
    except Exception as error:
        # A damaged file makes Pillow's parsers raise any type at all.
        raise PictureError(
            f"{described} is damaged or incomplete ({_one_line(error)}): save or fetch the picture again"
        ) from error


@contextmanager
def _pillow_quiet() -> Iterator[None]:
    """Keep Pillow's warnings about sizes and metadata from the caller, who gets a picture or an error.

    Python keeps warning filters for the whole process. The lock makes it safe between our own threads; as
    the filter names Pillow's modules alone, other code loses none of its warnings while it stands.
    """
    with _quiet_lock, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _upright(image: Image.Image, described: str) -> Image.Image:
    _check_pixels(*image.size, described)
    image.load()
    # Only now: a PNG may carry its EXIF after the pixels, and Pillow turns a TIFF while loading it.
    transpose = _UPRIGHT.get(_orientation(image, described))
    rgb = _rgb(image, described)
    return rgb if transpose is None else rgb.transpose(transpose)


def _orientation(image: Image.Image, described: str) -> Any:
    try:
        return image.getexif().get(0x0112)
    except Exception as error:  # noqa: BLE001 - the pixels are sound, and any viewer shows them as they lie
        logger.warning("%s has unreadable EXIF data (%s): taken as upright", described, _one_line(error))
        return None


def _rgb(image: Image.Image, described: str) -> Image.Image:
    if image.mode.startswith("I"):
        image = _eight_bit(image, described)
    elif image.mode == "F":
        raise PictureError(
            f"{described} has floating-point pixels, which have no agreed white: convert it to 8 bits first"
        )
    elif image.mode == "La":
        image = image.convert("LA")
    if "A" in image.getbands() or image.mode == "RGBa" or image.info.get("transparency") is not None:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _eight_bit(image: Image.Image, described: str) -> Image.Image:
    """Return a 16-bit grey image as L or LA, by the high byte, as Pillow itself reads 16-bit colour."""
    samples = np.asarray(image)
    if samples.min() < 0 or samples.max() > 0xFFFF:
        raise PictureError(
            f"{described} has grey values from {samples.min()} to {samples.max()}: "
            f"expected 0 to 65535, convert it to 8 bits first"
        )
    if image.mode == "I" and image.format != "PNG" and samples.max() <= 0xFF:
        # Of 16 bits it would be all but black: more likely it has 8 bits in 32.
        raise PictureError(
            f"{described} has 32-bit grey values from {samples.min()} to {samples.max()}, which have no agreed white: "
            f"convert it to 8 bits first"
        )
    grey = Image.fromarray((samples >> 8).astype(np.uint8))
    key = image.info.get("transparency")
    if key is not None:
        grey.putalpha(Image.fromarray(np.where(samples == key, 0, 255).astype(np.uint8)))
    return grey


def _pixels(rgb: Image.Image) -> NDArray[np.uint8]:
    pixels = np.asarray(rgb)
    pixels.flags.writeable = False
    return pixels
