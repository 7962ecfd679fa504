"""Scenes as pictures, drawn with Pillow, for trying a model where no photo is at hand."""

import math
import random
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from lookonce.scene import BACKGROUNDS, COLOURS, PLACES, Rgb, Scene, Thing

__all__ = ["draw", "draw_scene", "draw_shape"]


def draw_scene() -> Image.Image:
    """Draw a red circle, a blue square and a green triangle in a row on white, 480 x 320."""
    row = (("circle", "red", "left"), ("square", "blue", "center"), ("triangle", "green", "right"))
    things = tuple(Thing(shape, colour, "large", place) for shape, colour, place in row)
    return draw(Scene(things, "white", None, None, 480, 320, seed=0))


def draw_shape(shape: str, colour: str, background: str) -> Image.Image:
    """Draw one shape in the middle of 256 x 256."""
    return draw(Scene((Thing(shape, colour, "large", "center"),), background, None, None, 256, 256, seed=0))


def draw(scene: Scene, more_words: tuple[tuple[str, str], ...] = ()) -> Image.Image:
    """Draw a scene at its own size, with more words, each with its place. The same scene gives the same pixels."""
    rng = random.Random(scene.seed)  # noqa: S311  no secret, but the same each time
    picture = Image.new("RGB", (scene.width, scene.height), _shade(rng, BACKGROUNDS[scene.background]))
    brush = ImageDraw.Draw(picture)
    for thing in scene.things:
        _draw_thing(brush, thing, scene, _shade(rng, COLOURS[thing.colour]))
    if scene.word is not None and scene.word_place is not None:
        _draw_word(brush, scene, scene.word, scene.word_place, rng)
    for word, place in more_words:
        _draw_word(brush, scene, word, place, rng)
    return picture


def _shade(rng: random.Random, colour: Rgb) -> Rgb:
    red, green, blue = (min(255, max(0, channel + rng.randint(-10, 10))) for channel in colour)
    return red, green, blue


def _middle(scene: Scene, place: str) -> tuple[float, float]:
    row, column = divmod(PLACES.index(place), 3)
    return (column + 0.5) * scene.width / 3, (row + 0.5) * scene.height / 3


def _draw_thing(brush: ImageDraw.ImageDraw, thing: Thing, scene: Scene, colour: Rgb) -> None:
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
