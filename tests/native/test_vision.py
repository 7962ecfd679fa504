"""The vision tower and projector."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from look_maker import VISION_END, VISION_START, make_picture
from lookonce.embedding import RowSegment, TextSegment
from lookonce.errors import ClosedError, InputError, ModelFileError
from lookonce.native.text import TextModel
from lookonce.native.vision import VisionTower

Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def model(tiny_pair: Pair) -> Iterator[TextModel]:
    with TextModel(tiny_pair[0]) as model:
        yield model


@pytest.fixture(scope="module")
def tower(tiny_pair: Pair, model: TextModel) -> Iterator[VisionTower]:
    with VisionTower(tiny_pair[1], model, threads=1) as tower:
        yield tower


@pytest.mark.parametrize("size", [(32, 32), (96, 64), (64, 96), (32, 320)])
def test_a_pictures_rows_stand_in_its_grid_between_the_vision_tokens(tower: VisionTower, size: tuple[int, int]) -> None:
    columns, rows = size[0] // 32, size[1] // 32
    encoded = tower.encode(make_picture(0, *size))
    assert encoded.rows.shape == (rows * columns, 768)
    assert np.isfinite(encoded.rows).all()
    grid = [(0, row, column) for row in range(rows) for column in range(columns)]
    assert encoded.positions.tolist() == [list(place) for place in grid]
    assert encoded.segments == (
        TextSegment((VISION_START,)),
        RowSegment(rows * columns, max(rows, columns), causal=True),
        TextSegment((VISION_END,)),
    )
    assert tower.mrope


def test_a_pictures_rows_do_not_depend_on_what_was_encoded_before(tower: VisionTower) -> None:
    first = tower.encode(make_picture(1))
    tower.encode(make_picture(2, 128, 32))
    again = tower.encode(make_picture(1))
    assert np.array_equal(first.rows, again.rows)
    other = tower.encode(make_picture(3))
    assert not np.allclose(first.rows, other.rows)


def test_pixels_may_lie_anywhere_in_memory(tower: VisionTower) -> None:
    pixels = make_picture(1)
    turned = np.ascontiguousarray(pixels.transpose(1, 0, 2)).transpose(1, 0, 2)
    assert np.array_equal(tower.encode(turned).rows, tower.encode(pixels).rows)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((64, 64), np.uint8),
        np.zeros((64, 64, 4), np.uint8),
        np.zeros((64, 64, 3), np.float32),
        np.zeros((0, 64, 3), np.uint8),
    ],
    ids=["grey", "alpha", "floats", "nothing"],
)
def test_what_is_no_rgb_picture_is_refused(tower: VisionTower, pixels: np.ndarray) -> None:
    with pytest.raises(InputError, match="expected uint8"):
        tower.encode(pixels)


def test_a_file_that_is_no_projector_is_refused_with_the_native_reason(tiny_pair: Pair, model: TextModel) -> None:
    with pytest.raises(ModelFileError, match=r"could not be loaded as a projector for \S+: \S"):
        VisionTower(tiny_pair[0], model, threads=1)


def test_a_closed_tower_says_so_and_closes_twice(tiny_pair: Pair) -> None:
    with TextModel(tiny_pair[0]) as model:
        tower, other = (VisionTower(tiny_pair[1], model, threads=1) for _ in range(2))
        tower.close()
        tower.close()
        with pytest.raises(ClosedError, match=r"the vision tower .* is closed"):
            tower.encode(make_picture(1))
    with pytest.raises(ClosedError, match="the vision tower"):
        other.encode(make_picture(1))
