"""Pictures of every kind and condition: pixels, sizes, hashes and errors."""

import dataclasses
import hashlib
import io
import os
import random
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import ExifTags, Image, ImageFile, ImageOps

from lookonce import images
from lookonce.errors import PictureError
from lookonce.images import (
    QWEN2_VL,
    QWEN3_VL,
    Picture,
    PixelRule,
    fit,
    open_picture,
    read_source,
    smart_size,
    source_digest,
)

# python -c "from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
# for factor, low, high in ((32, 65536, 16777216), (28, 3136, 12845056), (32, 4096, 60000)):
#     for h, w in ((400, 600), (427, 640), (1, 1), (1, 200), (48, 80), (112, 112), (15, 45), (999, 333),
#                  (4032, 3024), (6000, 9000), (37, 7400)):
#         print((factor, low, high, h, w, *smart_resize(h, w, factor, low, high)), end=',\n')"
# with transformers 5.23.0.
REFERENCE_SIZES = [
    (32, 65536, 16777216, 400, 600, 384, 608),
    (32, 65536, 16777216, 427, 640, 416, 640),
    (32, 65536, 16777216, 1, 1, 256, 256),
    (32, 65536, 16777216, 1, 200, 32, 3648),
    (32, 65536, 16777216, 48, 80, 224, 352),
    (32, 65536, 16777216, 112, 112, 256, 256),
    (32, 65536, 16777216, 15, 45, 160, 448),
    (32, 65536, 16777216, 999, 333, 992, 320),
    (32, 65536, 16777216, 4032, 3024, 4032, 3008),
    (32, 65536, 16777216, 6000, 9000, 3328, 4992),
    (32, 65536, 16777216, 37, 7400, 32, 7392),
    (28, 3136, 12845056, 400, 600, 392, 588),
    (28, 3136, 12845056, 427, 640, 420, 644),
    (28, 3136, 12845056, 1, 1, 56, 56),
    (28, 3136, 12845056, 1, 200, 28, 812),
    (28, 3136, 12845056, 48, 80, 56, 84),
    (28, 3136, 12845056, 112, 112, 112, 112),
    (28, 3136, 12845056, 15, 45, 56, 112),
    (28, 3136, 12845056, 999, 333, 1008, 336),
    (28, 3136, 12845056, 4032, 3024, 4032, 3024),
    (28, 3136, 12845056, 6000, 9000, 2912, 4368),
    (28, 3136, 12845056, 37, 7400, 28, 7392),
    (32, 4096, 60000, 400, 600, 192, 288),
    (32, 4096, 60000, 427, 640, 192, 288),
    (32, 4096, 60000, 1, 1, 64, 64),
    (32, 4096, 60000, 1, 200, 32, 928),
    (32, 4096, 60000, 48, 80, 64, 64),
    (32, 4096, 60000, 112, 112, 128, 128),
    (32, 4096, 60000, 15, 45, 64, 128),
    (32, 4096, 60000, 999, 333, 416, 128),
    (32, 4096, 60000, 4032, 3024, 256, 192),
    (32, 4096, 60000, 6000, 9000, 192, 288),
    (32, 4096, 60000, 37, 7400, 32, 3456),
]

SIDES = st.integers(1, 20_000)
RULES = st.builds(
    lambda factor, low, more: PixelRule("any", factor, low, max(low + more, factor**2)),
    st.sampled_from([28, 32]),
    st.integers(1, 1_000_000),
    st.integers(0, 20_000_000),
)


def pattern(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 7 + y * 3, x * y // 5, (x ^ y) * 11], axis=-1).astype(np.uint8)


def encode(image: Image.Image | np.ndarray, file_format: str, **options: object) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    fields = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", fields)


def jpeg_with_broken_exif() -> bytes:
    """A JPEG whose EXIF block promises 200 bytes of text at an offset beyond its end."""
    entry = struct.pack("<HHII", 0x010E, 2, 200, 5000)
    tiff = b"II*\0" + struct.pack("<IH", 8, 1) + entry + struct.pack("<I", 0)
    return encode(pattern(16, 24), "JPEG", exif=b"Exif\0\0" + tiff)


def assert_refused(source: object, *words: str) -> None:
    with pytest.raises(PictureError) as caught:
        open_picture(source)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


# Sizing


@pytest.mark.parametrize("row", REFERENCE_SIZES, ids=str)
def test_smart_size_gives_what_the_reference_gives(row: tuple[int, ...]) -> None:
    factor, low, high, height, width, *expected = row
    assert [*smart_size(height, width, PixelRule("any", factor, low, high))] == expected


@given(SIDES, SIDES, st.sampled_from([QWEN3_VL, QWEN2_VL]))
def test_the_published_rules_always_keep_their_limits(height: int, width: int, rule: PixelRule) -> None:
    if max(height, width) / min(height, width) > 200:
        with pytest.raises(PictureError, match="200 times"):
            smart_size(height, width, rule)
        return
    fitted_height, fitted_width = smart_size(height, width, rule)
    assert fitted_height % rule.factor == 0
    assert fitted_width % rule.factor == 0
    assert rule.min_pixels <= fitted_height * fitted_width <= rule.max_pixels


@given(st.integers(1, 3000), st.integers(1, 15), RULES)
def test_any_rule_gives_whole_tokens_and_leaves_a_right_size_alone(side: int, ratio: int, rule: PixelRule) -> None:
    fitted = smart_size(side, side * ratio, rule)
    assert all(length % rule.factor == 0 and length >= rule.factor for length in fitted)
    area = fitted[0] * fitted[1]
    if rule.min_pixels <= area <= rule.max_pixels and max(fitted) / min(fitted) <= 200:
        assert smart_size(*fitted, rule) == fitted


@pytest.mark.parametrize(("height", "width"), [(201, 1), (1, 201), (10, 2001), (0, 5), (5, 0)])
def test_a_picture_too_long_for_the_reference_is_refused(height: int, width: int) -> None:
    with pytest.raises(PictureError, match=f"{width} x {height}"):
        smart_size(height, width, QWEN3_VL)


# Qwen2VLImageProcessorPil(patch_size=16 or 14, do_rescale=False, do_normalize=False, size={"shortest_edge":
# rule.min_pixels, "longest_edge": rule.max_pixels}) of transformers 5.23.0 on pattern(150, 211), its patches
# put back in their places, SHA-256 over the bytes. Pillow's own bicubic filter changed between 12.0 and 13.0:
# the second line has both, the older first.
REFERENCE_PIXELS = {
    QWEN3_VL: {"5f19c84645b1d0745b2a5db222ef79afc8c67f48df99067027b840ecb7c04059"},
    QWEN2_VL: {
        "fc4a23d0a1fbe5dcb09745c311e8ab7c5bbc039d344e5f16f6ce579240f69571",
        "0dba166509a2e6ffd767aff014da7d553f1b34d0940c05c1d4791074ed0db182",
    },
}


@pytest.mark.parametrize(("rule", "size"), [(QWEN3_VL, (320, 224)), (QWEN2_VL, (224, 140))])
def test_fit_gives_the_pixels_of_the_reference(rule: PixelRule, size: tuple[int, int]) -> None:
    fitted = fit(open_picture(pattern(150, 211)), rule)
    assert fitted.size == size
    assert hashlib.sha256(fitted.pixels.data).hexdigest() in REFERENCE_PIXELS[rule]
    assert fitted.original_size == (211, 150)


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([28, 32]))
def test_fit_leaves_the_pixels_of_a_right_size_untouched(rows: int, columns: int, factor: int) -> None:
    picture = open_picture(pattern(rows * factor, columns * factor))
    fitted = fit(picture, PixelRule("any", factor, 1, 10_000_000))
    assert fitted.pixels is picture.pixels
    assert fitted.preprocessing == f"any/{factor}/pillow-bicubic"
    assert fitted.original_size == picture.original_size


def test_the_description_is_the_same_whether_and_under_whatever_limits_a_picture_was_resized() -> None:
    exact = fit(open_picture(pattern(256, 320)), QWEN3_VL)
    resized = fit(open_picture(pattern(200, 300)), QWEN3_VL.limited(1024, 65_536))
    assert exact.preprocessing == resized.preprocessing == "qwen3vl/32/pillow-bicubic"
    assert open_picture(pattern(4, 4)).preprocessing == "rgb"


def test_fit_names_the_size_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "resize", no_memory)
    with pytest.raises(PictureError, match="24 x 16 pixels does not fit in memory"):
        fit(open_picture(pattern(16, 24)), QWEN3_VL)


# Rules


def test_limits_of_the_caller_replace_only_those_given() -> None:
    assert QWEN3_VL.limited(None, None) == QWEN3_VL
    assert QWEN3_VL.limited(1024, None) == dataclasses.replace(QWEN3_VL, min_pixels=1024)
    assert QWEN3_VL.limited(None, 70_000) == dataclasses.replace(QWEN3_VL, max_pixels=70_000)
    assert QWEN3_VL.limited(1024, 1024).max_pixels == 1024


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0, None, "min_pixels 0"),
        (-5, None, "min_pixels -5"),
        (True, None, "min_pixels True"),
        (1.5, None, "min_pixels 1.5"),
        ("64", None, "min_pixels '64'"),
        (None, 0, "max_pixels 0"),
        (None, False, "max_pixels False"),
        (1, 1023, "at least 1024"),
        (None, 65_535, "min_pixels 65536 is more than max_pixels 65535"),
        (16_777_217, None, "more than max_pixels"),
        (None, images.MAX_PICTURE_PIXELS + 1, "at most"),
    ],
)
def test_limits_that_make_no_sense_are_refused(low: int | None, high: int | None, words: str) -> None:
    with pytest.raises(PictureError, match=words):
        QWEN3_VL.limited(low, high)


# Pictures and their hashes


@given(npst.arrays(np.uint8, st.tuples(st.integers(1, 6), st.integers(1, 6), st.just(3))))
def test_pictures_of_equal_bytes_and_another_shape_have_another_hash(pixels: np.ndarray) -> None:
    height, width, _ = pixels.shape
    hashes = {
        open_picture(pixels.reshape(h, -1, 3)).content_hash()
        for h in range(1, height * width + 1)
        if height * width % h == 0
    }
    assert len(hashes) == sum(height * width % h == 0 for h in range(1, height * width + 1))


def test_two_by_eight_and_eight_by_two_pixels_are_two_pictures() -> None:
    wide = np.arange(48, dtype=np.uint8).reshape(2, 8, 3)
    assert open_picture(wide).content_hash() != open_picture(wide.reshape(8, 2, 3)).content_hash()


@given(st.integers(0, 15), st.integers(0, 23), st.integers(0, 2), st.integers(0, 7))
def test_one_other_bit_gives_another_hash(y: int, x: int, channel: int, bit: int) -> None:
    pixels = pattern(16, 24)
    before = open_picture(pixels).content_hash()
    pixels[y, x, channel] ^= 1 << bit
    assert open_picture(pixels).content_hash() != before


def test_the_hash_does_not_depend_on_how_the_pixels_came(tmp_path: Path) -> None:
    pixels = pattern(37, 53)
    path = tmp_path / "photo of a cat.bmp"
    path.write_bytes(encode(pixels, "BMP"))
    sources = [
        path,
        str(path),
        encode(pixels, "PNG"),
        encode(pixels, "TIFF", compression="tiff_lzw"),
        encode(pixels, "WEBP", lossless=True),
        encode(pixels, "PPM"),
        pixels,
        np.asfortranarray(pixels),
        pixels[::-1][::-1],
        Image.fromarray(pixels),
        Image.fromarray(pixels).convert("RGBA"),
    ]
    assert len({open_picture(source).content_hash() for source in sources}) == 1
    assert len({fit(open_picture(source), QWEN2_VL).content_hash() for source in sources}) == 1


def test_pixels_cannot_be_changed_through_a_picture_or_its_source() -> None:
    pixels = pattern(8, 8)
    picture = open_picture(pixels)
    direct = Picture(pixels, (8, 8), "rgb")
    for made in (picture, direct):
        with pytest.raises(ValueError, match="read-only"):
            made.pixels[0, 0, 0] = 1
    before = picture.content_hash()
    pixels[:] = 0
    assert picture.content_hash() == direct.content_hash() == before
    assert picture.pixels.flags.c_contiguous


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4), (0, 4, 3)])
def test_a_picture_of_another_shape_cannot_be_made(shape: tuple[int, ...]) -> None:
    with pytest.raises(PictureError, match="expected uint8"):
        Picture(np.zeros(shape, np.uint8), (4, 4), "rgb")


def test_a_file_digest_covers_bytes_rule_limits_and_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(pattern(8, 8), "PNG")
    first = source_digest(data, QWEN3_VL)
    assert first == source_digest(bytes(data), QWEN3_VL)
    others = [
        source_digest(data + b"\0", QWEN3_VL),
        source_digest(data[:-1] + b"\0", QWEN3_VL),
        source_digest(data, None),
        source_digest(data, QWEN2_VL),
        source_digest(data, QWEN3_VL.limited(1024, None)),
        source_digest(data, QWEN3_VL.limited(None, 70_000)),
    ]
    monkeypatch.setattr(images, "DECODE_VERSION", images.DECODE_VERSION + 1)
    others.append(source_digest(data, QWEN3_VL))
    monkeypatch.undo()
    monkeypatch.setattr(images.PIL, "__version__", "0.0")
    others.append(source_digest(data, QWEN3_VL))
    monkeypatch.undo()
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    others.append(source_digest(data, QWEN3_VL))
    assert len({first, *others}) == 1 + len(others)


def test_images_and_arrays_have_no_file_digest() -> None:
    assert source_digest(pattern(4, 4), QWEN3_VL) is None
    assert source_digest(Image.new("RGB", (4, 4)), QWEN3_VL) is None


def test_what_was_read_stays_the_same_when_the_file_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(encode(pattern(8, 8), "PNG"))
    source = read_source(path)
    path.write_bytes(encode(pattern(8, 8)[::-1], "PNG"))
    assert open_picture(source, str(path)).content_hash() == open_picture(pattern(8, 8)).content_hash()
    assert open_picture(path).content_hash() != open_picture(source).content_hash()


# Kinds of picture

# How an upright picture lies in the file under each orientation (EXIF 2.32, tag 0x0112).
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(
    ("file_format", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})],
)
def test_every_orientation_is_put_upright(orientation: int, file_format: str, options: dict[str, object]) -> None:
    upright = pattern(5, 9)
    stored = np.ascontiguousarray(STORED[orientation](upright))
    data = encode(stored, file_format, exif=oriented(orientation), **options)
    for source in (data, Image.open(io.BytesIO(data))):
        picture = open_picture(source)
        assert picture.original_size == (9, 5)
        np.testing.assert_array_equal(picture.pixels, upright)


@pytest.mark.parametrize("orientation", [*STORED, 0, 9])
def test_a_jpeg_is_turned_as_pillow_turns_it(orientation: int) -> None:
    data = encode(pattern(24, 40), "JPEG", exif=oriented(orientation))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(open_picture(data).pixels, expected)


def test_transparency_lies_over_white_in_every_mode() -> None:
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[..., :3] = (200, 40, 0)
    rgba[..., 3] = [[0, 255, 128], [0, 255, 64]]
    blended = np.round(rgba[..., :3] * (rgba[..., 3:] / 255) + 255 - rgba[..., 3:]).astype(np.uint8)
    for source in (rgba, Image.fromarray(rgba), encode(rgba, "PNG"), encode(rgba, "TIFF")):
        np.testing.assert_array_equal(open_picture(source).pixels, blended)

    grey = Image.merge("LA", (Image.new("L", (2, 1), 100), Image.fromarray(np.array([[0, 255]], np.uint8))))
    expected = [[[255] * 3, [100] * 3]]
    premultiplied = (grey.convert("RGBA").convert("RGBa"), grey.convert("La"))
    for source in (grey, encode(grey, "PNG"), *premultiplied):
        assert open_picture(source).pixels.tolist() == expected

    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 100, 100, 100])
    palette.putpixel((1, 0), 1)
    with_alpha = palette.convert("PA")
    with_alpha.putalpha(Image.fromarray(np.array([[0, 255]], np.uint8)))
    assert open_picture(with_alpha).pixels.tolist() == expected
    for transparency in (0, b"\x00\xff"):
        data = encode(palette, "PNG", transparency=transparency)
        assert open_picture(data).pixels.tolist() == expected
    assert open_picture(encode(palette, "GIF", transparency=0)).pixels.tolist() == expected
    assert open_picture(encode(palette, "PNG")).pixels.tolist() == [[[10, 20, 30], [100] * 3]]


def test_a_transparent_colour_lies_over_white() -> None:
    rgb = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    data = encode(rgb, "PNG", transparency=(1, 2, 3))
    assert open_picture(data).pixels.tolist() == [[[255] * 3, [4, 5, 6]]]
    grey = np.array([[7, 8]], np.uint8)
    data = encode(grey, "PNG", transparency=8)
    assert open_picture(data).pixels.tolist() == [[[7] * 3, [255] * 3]]


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    samples = np.array([[0, 255, 256, 0x7FFF, 0x8000, 0xFFFF]], np.uint16)
    expected = [[[value] * 3 for value in (0, 0, 1, 127, 128, 255)]]
    image = Image.fromarray(samples)
    assert image.mode == "I;16"
    wide = Image.fromarray(samples.astype(np.int32))
    assert wide.mode == "I"
    big_endian = Image.frombytes("I;16B", (6, 1), samples.astype(">u2").tobytes())
    for source in (
        image,
        wide,
        big_endian,
        encode(image, "PNG"),
        encode(image, "TIFF"),
        encode(wide, "PPM"),
    ):
        assert open_picture(source).pixels.tolist() == expected


def test_a_transparent_value_of_sixteen_bit_grey_lies_over_white() -> None:
    rows = zlib.compress(b"\0" + struct.pack(">3H", 0x1234, 0x1235, 0xFFFF))
    head = png_header(3, 1, depth=16, colour=0) + png_chunk(b"tRNS", b"\x12\x34")
    data = head + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    assert open_picture(data).pixels.tolist() == [[[255] * 3, [0x12] * 3, [255] * 3]]


@pytest.mark.parametrize("values", [[0, 65_536], [-1, 5], [2**31 - 1, 0]])
def test_grey_values_beyond_sixteen_bits_are_refused(values: list[int]) -> None:
    assert_refused(Image.fromarray(np.array([values], np.int32)), "0 to 65535")


def test_eight_bits_in_integers_of_thirty_two_are_refused_rather_than_read_as_black() -> None:
    assert_refused(Image.new("I", (2, 2), 200), "32-bit grey values from 200 to 200")


def test_floating_point_pixels_are_refused() -> None:
    assert_refused(Image.new("F", (2, 2), 0.5), "floating-point")


def test_one_bit_is_black_and_white() -> None:
    image = Image.new("1", (9, 1))
    image.putpixel((8, 0), 1)
    for source in (image, encode(image, "PNG"), encode(image, "BMP"), encode(image, "TIFF")):
        pixels = open_picture(source).pixels
        assert pixels[0, 0].tolist() == [0, 0, 0]
        assert pixels[0, 8].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "LAB", "RGBX"])
def test_other_colour_spaces_become_rgb(mode: str) -> None:
    image = Image.new("RGB", (8, 8), (200, 30, 60)).convert(mode)
    pixel = open_picture(image).pixels[3, 3].astype(int)
    assert abs(pixel - (200, 30, 60)).max() <= 3


def test_a_cmyk_jpeg_keeps_its_colours() -> None:
    image = Image.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK")
    data = encode(image, "JPEG", quality=95)
    # Adobe's marker and its inverted samples, as Photoshop writes them.
    assert b"Adobe" in data
    pixel = open_picture(data).pixels[8, 8].astype(int)
    assert abs(pixel - (200, 30, 60)).max() <= 6


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(file_format: str) -> None:
    frames = [Image.new("RGB", (12, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
        image.seek(1)
        assert (open_picture(image).pixels == (0, 255, 0)).all(), "a PIL image gives the frame it stands at"
    assert (open_picture(data).pixels == (255, 0, 0)).all()


def test_grey_arrays_become_rgb() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(open_picture(grey).pixels, np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize("kind", ["palette", "jpeg", "tiff", "grey16"])
def test_an_image_of_the_caller_stays_as_it_is(kind: str) -> None:
    if kind == "palette":
        image = Image.open(io.BytesIO(encode(Image.new("P", (3, 2)), "PNG", transparency=b"\x00")))
    elif kind == "grey16":
        image = Image.fromarray(np.array([[1, 60_000]], np.uint16))
    else:
        image = Image.open(io.BytesIO(encode(pattern(4, 8), kind.upper(), exif=oriented(6))))
    image.load()

    def seen() -> tuple[object, ...]:
        return (
            image.mode,
            image.size,
            image.tobytes(),
            image.getpalette("RGBA"),
            dict(image.info),
            image.readonly,
        )

    before = seen()
    open_picture(image)
    assert seen() == before


# Bad input


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    assert_refused(tmp_path / "no\nsuch.png", "does not exist: check the path", "such.png")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path, "is a folder")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_devices_are_refused_without_waiting(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    errors: list[PictureError] = []

    def open_pipe() -> None:
        try:
            open_picture(pipe)
        except PictureError as error:
            errors.append(error)

    thread = threading.Thread(target=open_pipe, daemon=True)
    thread.start()
    thread.join(10)
    assert str(errors[0]).startswith(f"{str(pipe)!r} is a device or a pipe")
    assert_refused("/dev/zero", "is a device or a pipe")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("", "does not exist"),
        ("a\0b", "cannot be read"),
        ("x" * 5000, "cannot be read"),
        ("\udcff", "does not exist"),
    ],
)
def test_a_string_that_cannot_be_a_path_is_refused_in_a_short_message(path: str, words: str) -> None:
    with pytest.raises(PictureError, match=words) as caught:
        open_picture(path)
    assert len(str(caught.value)) < 500
    str(caught.value).encode()


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.png"
    path.touch()
    assert_refused(path, "empty.png", "is empty")
    assert_refused(b"", "is empty")


def test_a_file_larger_than_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(images.MAX_FILE_BYTES + 1000)
    assert_refused(path, "large.png", f"has {images.MAX_FILE_BYTES + 1000} bytes", "at most")


def test_bytes_beyond_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(pattern(4, 4), "PNG")
    monkeypatch.setattr(images, "MAX_FILE_BYTES", len(data))
    open_picture(data)
    assert_refused(data + b"\0", "at most")


@pytest.mark.parametrize(
    "data",
    [
        b"hello, I am a text",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
        b"%PDF-1.4\n",
        b"\xd7\xcd\xc6\x9a" + b"\0" * 60,
        b"GGUF" + b"\0" * 60,
    ],
    ids=["text", "eps", "pdf", "wmf", "gguf"],
)
def test_other_kinds_of_file_are_refused_with_the_formats_named(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(data)
    assert_refused(path, "picture.jpg", "PNG, JPEG, WEBP, GIF, BMP, TIFF, PPM")


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused(file_format: str, part: float) -> None:
    noise = np.random.default_rng(5).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(noise, file_format)
    open_picture(data)
    assert_refused(data[: int(len(data) * part)], "bytes")


@pytest.mark.parametrize("side", [12_000, 100_000, 2**31 - 1])
def test_a_header_that_claims_too_many_pixels_costs_nothing(side: int) -> None:
    resource = pytest.importorskip("resource")
    data = png_header(side, side) + png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_refused(data, "pixels", f"at most {images.MAX_PICTURE_PIXELS}")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_other_headers_that_claim_too_many_pixels_are_refused_as_well() -> None:
    gif = b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\0\0\0," + struct.pack("<4H", 0, 0, 65_535, 65_535)
    ppm = b"P6 100000 100000 255\n"
    bmp = bytearray(encode(pattern(4, 4), "BMP"))
    bmp[18:26] = struct.pack("<ii", 30_000, 30_000)
    webp = bytearray(encode(pattern(4, 4), "WEBP", lossless=True, exif=oriented(1)))
    assert webp[12:16] == b"VP8X"
    webp[24:30] = b"\xfe\x3f\x00\xfe\x3f\x00"
    for data in (gif + b"\0\x08\0", ppm, bytes(bmp), bytes(webp)):
        assert_refused(data)


def test_large_images_and_arrays_of_the_caller_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PICTURE_PIXELS", 100)
    open_picture(pattern(10, 10))
    for source in (pattern(10, 11), Image.new("RGB", (11, 10)), encode(pattern(10, 11), "PNG")):
        assert_refused(source, "11 x 10 pixels", "at most 100")
    with pytest.raises(PictureError, match="11 x 10"):
        read_source(Image.new("RGB", (11, 10)))


def test_a_compressed_text_or_profile_bomb_is_refused_or_ignored() -> None:
    bomb = zlib.compress(bytes(200_000_000))
    good = encode(pattern(4, 4), "PNG")
    head, rest = good[:33], good[33:]
    for chunk in (png_chunk(b"zTXt", b"a\0\0" + bomb), png_chunk(b"iCCP", b"a\0\0" + bomb)):
        try:
            picture = open_picture(head + chunk + rest)
        except PictureError:
            continue
        np.testing.assert_array_equal(picture.pixels, pattern(4, 4))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.uint16),
        np.zeros((4, 4, 3), bool),
        np.zeros((3, 5, 6), np.uint8),
        np.zeros((4, 4, 1), np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
    ],
    ids=lambda array: f"{array.dtype}-{array.shape}",
)
def test_an_array_of_another_shape_or_dtype_is_refused_with_both_named(array: np.ndarray) -> None:
    assert_refused(array, str(array.shape), str(array.dtype), "expected uint8")


@pytest.mark.parametrize("source", [np.zeros((0, 4, 3), np.uint8), Image.new("RGB", (4, 0))])
def test_a_picture_without_pixels_is_refused(source: object) -> None:
    assert_refused(source, "at least one pixel")


@pytest.mark.parametrize("source", [None, 5, bytearray(b"x"), ["a.png"], io.BytesIO()])
def test_another_type_is_refused_with_its_name(source: object) -> None:
    assert_refused(source, type(source).__name__, "expected a path")


def test_a_closed_image_is_refused() -> None:
    image = Image.open(io.BytesIO(encode(pattern(4, 4), "PNG")))
    image.close()
    assert_refused(image, "PngImageFile")


def test_the_name_given_is_the_name_in_the_message() -> None:
    with pytest.raises(PictureError, match=r"^'cat\.png' is empty"):
        open_picture(b"", "cat.png")


# Pillow's manners


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_broken_exif_data_leaves_the_picture_upright(file_format: str) -> None:
    garbage = encode(pattern(16, 24), file_format, exif=b"Exif\0\0garbage, no TIFF at all")
    assert open_picture(garbage).size == (24, 16)


def test_broken_exif_data_is_logged_with_the_name(caplog: pytest.LogCaptureFixture) -> None:
    open_picture(encode(pattern(16, 24), "PNG", exif=b"Exif\0\0garbage, no TIFF at all"), "cat.png")
    assert "'cat.png' has unreadable EXIF data" in caplog.text


def test_warnings_of_pillow_reach_nobody_and_no_filter_stays() -> None:
    data = jpeg_with_broken_exif()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        Image.open(io.BytesIO(data)).getexif()
        assert heard, "the file no longer makes Pillow warn: this test needs another one"
        heard.clear()
        filters = list(warnings.filters)
        assert open_picture(data).size == (24, 16)
        large = Image.new("1", (10_000, 10_000))
        assert open_picture(encode(large, "PNG")).size == (10_000, 10_000)
        assert not heard
        assert warnings.filters == filters


def test_many_threads_open_pictures_at_once() -> None:
    sources = [encode(pattern(40, 60), "PNG"), jpeg_with_broken_exif(), b"no picture"]
    expected = [open_picture(source).content_hash() for source in sources[:2]]
    filters = list(warnings.filters)
    results: list[object] = []

    def work() -> None:
        for _ in range(20):
            try:
                results.append([open_picture(source).content_hash() for source in sources[:2]] == expected)
                open_picture(sources[2])
            except PictureError:
                results.append(True)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 320
    assert warnings.filters == filters


def test_any_error_of_pillow_becomes_ours_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("one line\nand another")

    monkeypatch.setattr(Image, "open", fail)
    assert_refused(b"x", "damaged or incomplete (RuntimeError: one line and another)")


def test_settings_of_pillow_stay_as_they_are() -> None:
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    open_picture(encode(pattern(4, 4), "JPEG"))
    assert_refused(png_header(100_000, 100_000))
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def fix_png_checksums(data: bytes) -> bytes:
    """Without this, nearly every mutation of a PNG would end at its first checksum."""
    fixed, position = bytearray(data[:8]), 8
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        body = data[position + 4 : position + 8 + length]
        fixed += data[position : position + 4] + body + struct.pack(">I", zlib.crc32(body))
        position += 12 + length
    return bytes(fixed)


def mutate(data: bytes, chance: random.Random) -> bytes:
    mutated = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 5, 20])):
        # Headers decide more than pixels do.
        place = chance.randrange(min(len(mutated), chance.choice([64, 200, len(mutated)])))
        action = chance.randrange(5)
        if action == 0:
            mutated[place] ^= 1 << chance.randrange(8)
        elif action == 1:
            mutated[place] = chance.choice([0, 1, 0x7F, 0x80, 0xFF])
        elif action == 2:
            mutated[place : place + 4] = chance.randbytes(4)
        elif action == 3:
            del mutated[place : place + chance.randint(1, 9)]
        else:
            mutated[place:place] = mutated[place : place + chance.randint(1, 30)]
        if not mutated:
            break
    if chance.random() < 0.3:
        del mutated[chance.randrange(len(mutated) + 1) :]
    return bytes(mutated)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_damaged_files_end_in_a_picture_or_our_error(file_format: str) -> None:
    chance = random.Random(file_format)
    frames = [Image.fromarray(pattern(16, 24)), Image.fromarray(pattern(16, 24)[::-1])]
    animated = {"save_all": True, "append_images": frames[1:]}
    options = {
        "PNG": [{"exif": oriented(6)}, animated],
        "JPEG": [{"exif": oriented(8)}, {"progressive": True}],
        "GIF": [{}, animated],
        "BMP": [{}],
        "WEBP": [{"exif": oriented(3)}, {"lossless": True}, animated],
        "TIFF": [{"exif": oriented(5)}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}],
    }
    seeds = [encode(frames[0], file_format, **chosen) for chosen in options[file_format]]
    seeds.append(encode(frames[0].quantize(16) if file_format in {"PNG", "BMP", "TIFF"} else frames[1], file_format))
    opened, refused = 0, []
    for _ in range(300):
        data = mutate(chance.choice(seeds), chance)
        if file_format == "PNG" and chance.random() < 0.7:
            data = fix_png_checksums(data)
        try:
            picture = open_picture(data)
        except PictureError as error:
            refused.append(str(error))
        else:
            opened += 1
            assert picture.content_hash() == open_picture(data).content_hash()
    assert not any("\n" in message for message in refused)
    assert min(opened, len(refused)) > 5
