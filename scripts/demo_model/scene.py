"""The scenes of the demo model's training: their picture sizes, and their pixels as the vision tower sees them.

Knows nothing of questions or models. A scene is a pure function of the generator it is given.
"""

import random

import numpy as np
from numpy.typing import NDArray

from lookonce.drawing import draw
from lookonce.images import QWEN3_VL, Picture, fit, open_picture
from lookonce.scene import PLACES, WORDS, Scene, random_scene

__all__ = ["GRIDS", "PIXEL_RULE", "crowd", "fitted", "grid_of", "make_scene", "random_grid"]

# Small pictures keep their size, large ones shrink to at most twenty image rows: the model is quick with any photo.
PIXEL_RULE = QWEN3_VL.limited(96 * 96, 160 * 128)

# Sizes as drawn, (width, height), by the grid of merged tokens, (rows, columns), that the pixel rule gives them.
_SIZES = {
    (3, 3): ((96, 96), (96, 96), (100, 92), (80, 80)),
    (3, 4): ((128, 96), (128, 96), (120, 90), (136, 100)),
    (4, 3): ((96, 128), (96, 128), (90, 120)),
    (4, 4): ((128, 128), (128, 128), (112, 112), (256, 256), (300, 300)),
    (3, 5): ((160, 96), (150, 100), (480, 320), (400, 300)),
    (5, 3): ((96, 160), (100, 150), (320, 480), (300, 400)),
    (4, 5): ((160, 128), (150, 120)),
    (5, 4): ((128, 160), (120, 150)),
}
GRIDS = tuple(_SIZES)
_GRID_WEIGHTS = (4, 2, 2, 3, 2, 1, 1, 1)


def random_grid(rng: random.Random) -> tuple[int, int]:
    """Choose the rows and columns of merged tokens that a picture will have."""
    return rng.choices(GRIDS, weights=_GRID_WEIGHTS)[0]


def make_scene(
    rng: random.Random,
    *,
    grid: tuple[int, int] | None = None,
    counts: tuple[int, ...] = (30, 30, 25, 15),
    word_share: float = 0.4,
) -> Scene:
    """Make a scene of one to four shapes; `counts` are the weights of how many there are."""
    size = rng.choice(_SIZES[grid or random_grid(rng)])
    return random_scene(rng, size, counts=counts, word_share=word_share)


def crowd(rng: random.Random, grid: tuple[int, int]) -> tuple[Scene, tuple[tuple[str, str], ...]]:
    """Make a scene of three to seven shapes with words at free places: more to be told of one picture."""
    scene = make_scene(rng, grid=grid, counts=(0, 0, 2, 2, 2, 1, 1), word_share=0.0)
    taken = {thing.place for thing in scene.things}
    free = [place for place in PLACES if place not in taken and rng.random() < 0.8]
    return scene, tuple((rng.choice(WORDS), place) for place in free)


def fitted(scene: Scene, more_words: tuple[tuple[str, str], ...] = ()) -> NDArray[np.uint8]:
    """Draw a scene and give the pixels (height, width, 3) that the vision tower sees."""
    picture: Picture = fit(open_picture(draw(scene, more_words)), PIXEL_RULE)
    return picture.pixels


def grid_of(pixels: NDArray[np.uint8]) -> tuple[int, int]:
    """Give the rows and columns of merged tokens of a fitted picture."""
    return pixels.shape[0] // PIXEL_RULE.factor, pixels.shape[1] // PIXEL_RULE.factor
