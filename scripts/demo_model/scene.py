"""Scenes of coloured shapes in a grid of nine places, some with a short word, and how they are drawn.

Knows nothing of questions or models. A scene is a pure function of the generator it is given.
"""

import math
import random
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lookonce.images import QWEN3_VL, Picture, fit, open_picture

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "GRIDS",
    "PIXEL_RULE",
    "PLACES",
    "SHAPES",
    "SIZES",
    "WORDS",
    "Scene",
    "Thing",
    "crowd",
    "draw",
    "fitted",
    "grid_of",
    "make_scene",
    "make_twin",
    "random_grid",
]

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (220, 30, 30),
    "green": (20, 150, 50),
    "blue": (30, 60, 220),
    "yellow": (245, 215, 30),
    "orange": (250, 130, 10),
    "purple": (140, 40, 170),
}
BACKGROUNDS = {"white": (255, 255, 255), "gray": (150, 150, 150), "black": (0, 0, 0), "pink": (250, 190, 205)}
SIZES = ("small", "large")
WORDS = ("go", "up", "hi", "ok", "cat", "sun", "key", "map", *"0123456789")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")

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


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape: what it is, where it stands, and by how much of its room it is off the middle, -1 to 1."""

    shape: str
    colour: str
    size: str
    place: str
    offset: tuple[float, float] = (0.0, 0.0)
    scale: float = 1.0

    @property
    def cell(self) -> int:
        """Number of its place, row by row."""
        return PLACES.index(self.place)


@dataclass(frozen=True, slots=True)
class Scene:
    """Shapes in reading order on a background, and a word at a place of its own where there is one."""

    things: tuple[Thing, ...]
    background: str
    word: str | None
    word_place: str | None
    width: int
    height: int
    seed: int


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
    width, height = rng.choice(_SIZES[grid or random_grid(rng)])
    count = rng.choices(range(1, len(counts) + 1), weights=counts)[0]
    has_word = rng.random() < word_share
    cells = rng.sample(range(9), count + has_word)
    things = tuple(_make_thing(rng, PLACES[cell]) for cell in sorted(cells[:count]))
    return Scene(
        things,
        rng.choice(tuple(BACKGROUNDS)),
        rng.choice(WORDS) if has_word else None,
        PLACES[cells[-1]] if has_word else None,
        width,
        height,
        rng.getrandbits(32),
    )


def crowd(rng: random.Random, grid: tuple[int, int]) -> tuple[Scene, tuple[tuple[str, str], ...]]:
    """Make a scene of three to seven shapes with words at free places: more to be told of one picture."""
    scene = make_scene(rng, grid=grid, counts=(0, 0, 2, 2, 2, 1, 1), word_share=0.0)
    taken = {thing.place for thing in scene.things}
    free = [place for place in PLACES if place not in taken and rng.random() < 0.8]
    return scene, tuple((rng.choice(WORDS), place) for place in free)


def make_twin(rng: random.Random, scene: Scene) -> Scene:
    """Make a scene that differs in one attribute: a shape, a colour, a place, the background or the word."""
    kinds = ["shape", "colour", "place", "background", *(["word"] if scene.word else [])]
    kind = rng.choice(kinds)
    if kind == "background":
        return replace(scene, background=_other(rng, tuple(BACKGROUNDS), scene.background))
    if kind == "word":
        return replace(scene, word=_other(rng, WORDS, scene.word))
    index = rng.randrange(len(scene.things))
    thing = scene.things[index]
    if kind == "shape":
        changed = replace(thing, shape=_other(rng, SHAPES, thing.shape))
    elif kind == "colour":
        changed = replace(thing, colour=_other(rng, tuple(COLOURS), thing.colour))
    else:
        taken = {one.place for one in scene.things} | {scene.word_place}
        changed = replace(thing, place=rng.choice([place for place in PLACES if place not in taken]))
    things = (*scene.things[:index], changed, *scene.things[index + 1 :])
    return replace(scene, things=tuple(sorted(things, key=lambda one: one.cell)))


def draw(scene: Scene, more_words: tuple[tuple[str, str], ...] = ()) -> Image.Image:
    """Draw a scene at its own size, with more words, each with its place. The same scene gives the same pixels."""
    rng = random.Random(scene.seed)
    picture = Image.new("RGB", (scene.width, scene.height), _shade(rng, BACKGROUNDS[scene.background]))
    brush = ImageDraw.Draw(picture)
    for thing in scene.things:
        _draw_thing(brush, thing, scene, _shade(rng, COLOURS[thing.colour]))
    if scene.word is not None and scene.word_place is not None:
        _draw_word(brush, scene, scene.word, scene.word_place, rng)
    for word, place in more_words:
        _draw_word(brush, scene, word, place, rng)
    return picture


def fitted(scene: Scene, more_words: tuple[tuple[str, str], ...] = ()) -> NDArray[np.uint8]:
    """Draw a scene and give the pixels (height, width, 3) that the vision tower sees."""
    picture: Picture = fit(open_picture(draw(scene, more_words)), PIXEL_RULE)
    return picture.pixels


def grid_of(pixels: NDArray[np.uint8]) -> tuple[int, int]:
    """Give the rows and columns of merged tokens of a fitted picture."""
    return pixels.shape[0] // PIXEL_RULE.factor, pixels.shape[1] // PIXEL_RULE.factor


def _make_thing(rng: random.Random, place: str) -> Thing:
    offset = (rng.uniform(-1, 1), rng.uniform(-1, 1))
    return Thing(
        rng.choice(SHAPES), rng.choice(tuple(COLOURS)), rng.choice(SIZES), place, offset, rng.uniform(0.94, 1.06)
    )


def _other(rng: random.Random, choices: tuple[str, ...], current: str | None) -> str:
    return rng.choice([choice for choice in choices if choice != current])


def _shade(rng: random.Random, colour: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, channel + rng.randint(-10, 10))) for channel in colour)
    return red, green, blue


def _middle(scene: Scene, place: str) -> tuple[float, float]:
    row, column = divmod(PLACES.index(place), 3)
    return (column + 0.5) * scene.width / 3, (row + 0.5) * scene.height / 3


def _draw_thing(brush: ImageDraw.ImageDraw, thing: Thing, scene: Scene, colour: tuple[int, int, int]) -> None:
    room = min(scene.width, scene.height) / 3
    radius = room / 2 * {"small": 0.5, "large": 0.86}[thing.size] * thing.scale
    x, y = _middle(scene, thing.place)
    x += thing.offset[0] * 0.7 * (scene.width / 6 - radius)
    y += thing.offset[1] * 0.7 * (scene.height / 6 - radius)
    if thing.shape == "circle":
        brush.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        return
    corners = [(x + radius * dx, y + radius * dy) for dx, dy in _corners(thing.shape)]
    brush.polygon(corners, fill=colour)


@cache
def _corners(shape: str) -> tuple[tuple[float, float], ...]:
    """Give a shape's corners around its middle, within a radius of about one."""
    if shape == "square":
        return ((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88))
    if shape == "triangle":
        return ((0.0, -1.0), (-1.0, 0.85), (1.0, 0.85))
    if shape == "cross":
        arm = 0.34
        quarter = ((-arm, -1.0), (arm, -1.0), (arm, -arm), (1.0, -arm), (1.0, arm), (arm, arm))
        return (*quarter, (arm, 1.0), (-arm, 1.0), (-arm, arm), (-1.0, arm), (-1.0, -arm), (-arm, -arm))
    turns = (math.pi * step / 5 for step in range(10))
    radii = (1.1 if step % 2 == 0 else 0.45 for step in range(10))
    return tuple((radius * math.sin(turn), -radius * math.cos(turn)) for turn, radius in zip(turns, radii, strict=True))


def _draw_word(brush: ImageDraw.ImageDraw, scene: Scene, word: str, place: str, rng: random.Random) -> None:
    room = min(scene.width, scene.height) / 3
    ink = {"white": (20, 20, 20), "pink": (20, 20, 20)}.get(scene.background, (245, 245, 245))
    font = _font(word, round(room * 0.92))
    x, y = _middle(scene, place)
    x, y = x + rng.uniform(-1, 1) * 0.03 * room, y + rng.uniform(-1, 1) * 0.08 * room
    brush.text((x, y), word, fill=ink, font=font, anchor="mm")


@cache
def _font(word: str, width: int) -> ImageFont.FreeTypeFont:
    """Give Pillow's own font at the largest size at which the word is no wider than `width`, nor higher than it."""
    size = round(width * 0.9)
    while True:
        font = ImageFont.load_default(size)
        left, top, right, bottom = font.getbbox(word)
        if (right - left <= width and bottom - top <= width) or size <= 6:
            return font  # type: ignore[return-value]
        size -= 1
