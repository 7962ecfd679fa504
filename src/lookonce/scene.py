"""Scenes of coloured shapes at nine places, some with a short word: what the demo model was taught, and all it knows.

Knows nothing of pixels or models. A random scene is a pure function of its generator, to the last call of it: the demo
model's training and exam are made again by their seeds.
"""

import random
from dataclasses import dataclass, replace
from typing import Final

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "PLACES",
    "SHAPES",
    "SIZES",
    "WORDS",
    "Scene",
    "Thing",
    "caption",
    "make_twin",
    "random_scene",
]

Rgb = tuple[int, int, int]

SHAPES: Final = ("circle", "square", "triangle", "star", "cross")
COLOURS: Final[dict[str, Rgb]] = {
    "red": (220, 30, 30),
    "green": (20, 150, 50),
    "blue": (30, 60, 220),
    "yellow": (245, 215, 30),
    "orange": (250, 130, 10),
    "purple": (140, 40, 170),
}
BACKGROUNDS: Final[dict[str, Rgb]] = {
    "white": (255, 255, 255),
    "gray": (150, 150, 150),
    "black": (0, 0, 0),
    "pink": (250, 190, 205),
}
SIZES: Final = ("small", "large")
WORDS: Final = ("go", "up", "hi", "ok", "cat", "sun", "key", "map", *"0123456789")
PLACES: Final = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)


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

    @property
    def name(self) -> str:
        """What it is called in captions and answers, its size and place left out."""
        return f"{'an' if self.colour == 'orange' else 'a'} {self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """Shapes in reading order on a background, and a word at a place of its own where there is one.

    `width` and `height` are those of the picture in pixels; `seed` decides its shades, and where its word trembles to.
    """

    things: tuple[Thing, ...]
    background: str
    word: str | None
    word_place: str | None
    width: int
    height: int
    seed: int


def random_scene(
    rng: random.Random,
    size: tuple[int, int],
    *,
    counts: tuple[int, ...] = (30, 30, 25, 15),
    word_share: float = 0.4,
) -> Scene:
    """Make a scene for a picture of (width, height), of one to four shapes; `counts` weigh how many there are."""
    width, height = size
    count = rng.choices(range(1, len(counts) + 1), weights=counts)[0]
    has_word = rng.random() < word_share
    cells = rng.sample(range(9), count + has_word)
    things = tuple(_random_thing(rng, PLACES[cell]) for cell in sorted(cells[:count]))
    return Scene(
        things,
        rng.choice(tuple(BACKGROUNDS)),
        rng.choice(WORDS) if has_word else None,
        PLACES[cells[-1]] if has_word else None,
        width,
        height,
        rng.getrandbits(32),
    )


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


def caption(scene: Scene) -> str:
    """Describe a whole scene in one sentence, in reading order.

    >>> star = Thing("star", "blue", "large", "top left")
    >>> caption(Scene((star,), "gray", "go", "center", 96, 96, 0))
    'a blue star at the top left on a gray background that says go'
    """
    things = [f"{thing.name} at the {thing.place}" for thing in scene.things]
    says = f" that says {scene.word}" if scene.word else ""
    return f"{' and '.join(things)} on a {scene.background} background{says}"


def _random_thing(rng: random.Random, place: str) -> Thing:
    offset = (rng.uniform(-1, 1), rng.uniform(-1, 1))
    return Thing(
        rng.choice(SHAPES), rng.choice(tuple(COLOURS)), rng.choice(SIZES), place, offset, rng.uniform(0.94, 1.06)
    )


def _other(rng: random.Random, choices: tuple[str, ...], current: str | None) -> str:
    return rng.choice([choice for choice in choices if choice != current])
