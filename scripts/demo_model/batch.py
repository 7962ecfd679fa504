"""What one step of training, or one round of scoring, is made of: scenes, their pictures and their sequences.

A batch is a pure function of its generator, so that a resumed run goes on as if it had never stopped.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lookonce.images import smart_size
from lookonce.scene import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, WORDS, Scene, caption, make_twin

from .prompt import PromptMaker, TokenSequence
from .scene import GRIDS, PIXEL_RULE, crowd, fitted, grid_of, make_scene, random_grid
from .task import Question, ask, ask_blind, ask_pair

__all__ = ["KINDS", "Step", "TowerBatch", "make_pairs", "make_questions", "make_tower_batch", "row_labels"]

# What the throw-away heads tell of each row: which shape or word lies there, its colour and its size, which place it is
# and on which background; class 0 is none. The text model can read of a row only what the tower put there.
KINDS: dict[str, tuple[str, ...]] = {
    "kind": (*SHAPES, *WORDS),
    "colour": tuple(COLOURS),
    "size": SIZES,
    "place": PLACES,
    "background": tuple(BACKGROUNDS),
}

# How often scenes have one to four shapes: of one alone nothing is learned about which colour belongs to which shape.
_COUNTS = (1, 4, 3, 2)

# How often each task is asked; what is harder comes more often.
_TASK_WEIGHTS = {
    **{"describe": 1.4, "colour": 2.0, "shape": 1.2, "place": 2.2, "size": 1.2, "count": 1.2, "yes/no": 1.2},
    **{"word": 1.5, "follow-up": 1.6},
}


@dataclass(slots=True)
class Step:
    """One step: pictures by number, sequences of questions, and pairs of sequences to be matched."""

    pictures: list[NDArray[np.uint8]] = field(default_factory=list)
    questions: list[TokenSequence] = field(default_factory=list)
    captions: list[TokenSequence] = field(default_factory=list)
    seen: list[TokenSequence] = field(default_factory=list)
    labels: list[NDArray[np.int64]] = field(default_factory=list)

    @property
    def counts(self) -> list[int]:
        """Rows of each picture."""
        return [int(np.prod(grid_of(picture))) for picture in self.pictures]


@dataclass(frozen=True, slots=True)
class TowerBatch:
    """Pictures of one size (n, height, width, 3), and what the heads are to tell of each row (n x rows, kinds)."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


def row_labels(scene: Scene, grid: tuple[int, int], more_words: tuple[tuple[str, str], ...] = ()) -> NDArray[np.int64]:
    """Say of each row what lies at the place whose middle it holds: (rows, kinds).

    Where the grid is not that of the places a thing lies in several rows; still just this one is to tell of it.
    """
    rows, columns = grid
    labels = np.zeros((rows * columns, len(KINDS)), np.int64)

    def number(place: str) -> int:
        row, column = divmod(PLACES.index(place), 3)
        return (2 * row + 1) * rows // 6 * columns + (2 * column + 1) * columns // 6

    labels[:, 4] = 1 + list(BACKGROUNDS).index(scene.background)
    for place in PLACES:
        labels[number(place), 3] = 1 + PLACES.index(place)
    for thing in scene.things:
        labels[number(thing.place), :3] = (
            1 + SHAPES.index(thing.shape),
            1 + list(COLOURS).index(thing.colour),
            1 + SIZES.index(thing.size),
        )
    own = ((scene.word, scene.word_place),) if scene.word and scene.word_place else ()
    for word, place in (*own, *more_words):
        labels[number(place), 0] = 1 + len(SHAPES) + WORDS.index(word)
    return labels


def make_tower_batch(rng: random.Random, size: int, *, aligned: bool, crowded: bool) -> TowerBatch:
    """Make pictures for the tower alone; aligned ones have each thing within one row, crowded ones many things."""
    grid = (3, 3) if aligned else rng.choice(GRIDS)
    if crowded:
        made = [crowd(rng, grid) for _ in range(size)]
    else:
        made = [(make_scene(rng, grid=grid, counts=(1, 1, 2, 3), word_share=0.7), ()) for _ in range(size)]
    labels = [row_labels(scene, grid, words) for scene, words in made]
    return TowerBatch(np.stack([fitted(*one) for one in made]), np.concatenate(labels))


def make_questions(rng: random.Random, maker: PromptMaker, *, scenes: int, pairs: int, budget: int) -> Step:
    """Ask about every scene until its sequence has `budget` tokens, about `pairs` of scenes, and about no picture."""
    all_scenes = _some(rng, scenes)
    asked = [_questions(rng, maker, scene, number, budget) for number, scene in enumerate(all_scenes)]
    made = _seen(all_scenes)
    for pair in range(pairs):
        asked.append(_pair(rng, maker, all_scenes, made.pictures, inline=pair % 2 == 0, budget=budget))
    made.questions = [*asked, maker.ask([ask_blind(rng) for _ in range(2)], [])]
    return made


def make_pairs(rng: random.Random, maker: PromptMaker, *, scenes: int) -> Step:
    """Pair scenes and their twins, each of which differs in one attribute, with captions."""
    all_scenes = _some(rng, scenes)
    all_scenes += [make_twin(rng, scene) for scene in all_scenes]
    # An equal caption would be a right answer counted as wrong.
    all_scenes = list({caption(scene): scene for scene in all_scenes}.values())
    made = _seen(all_scenes)
    for number, (scene, picture) in enumerate(zip(all_scenes, made.pictures, strict=True)):
        made.captions.append(maker.embed(caption(scene)))
        made.seen.append(maker.embed((number, grid_of(picture))))
    return made


def _some(rng: random.Random, count: int) -> list[Scene]:
    """Make scenes of at most three grids, since pictures of one size go through the tower together."""
    grids = [random_grid(rng) for _ in range(3)]
    return [make_scene(rng, grid=rng.choice(grids), counts=_COUNTS) for _ in range(count)]


def _seen(scenes: Sequence[Scene]) -> Step:
    pictures = [fitted(scene) for scene in scenes]
    labels = [row_labels(scene, grid_of(picture)) for scene, picture in zip(scenes, pictures, strict=True)]
    return Step(pictures=pictures, labels=labels)


def _questions(rng: random.Random, maker: PromptMaker, scene: Scene, number: int, budget: int) -> TokenSequence:
    """Ask until the next question would go beyond `budget`: sequences of like length waste little on padding."""
    asked: list[Question] = []
    made = maker.ask([], [(number, _grid(scene))])
    while True:
        task = rng.choices(list(_TASK_WEIGHTS), weights=list(_TASK_WEIGHTS.values()))[0]
        if (question := ask(rng, scene, task)) is None:
            continue
        if asked and len(made) + maker.length(question) > budget:
            return made
        asked.append(question)
        maker.branch(made, question, len(asked))


def _grid(scene: Scene) -> tuple[int, int]:
    height, width = smart_size(scene.height, scene.width, PIXEL_RULE)
    return height // PIXEL_RULE.factor, width // PIXEL_RULE.factor


def _pair(
    rng: random.Random,
    maker: PromptMaker,
    scenes: Sequence[Scene],
    pictures: Sequence[NDArray[np.uint8]],
    *,
    inline: bool,
    budget: int,
) -> TokenSequence:
    while True:
        chosen = rng.sample(range(len(scenes)), 2)
        first, second = (scenes[number] for number in chosen)
        given = [(number, grid_of(pictures[number])) for number in chosen]
        if inline:
            question = ask_pair(rng, first, second, inline=True)
            if question is not None:
                return maker.ask_inline(question, given)
            continue
        made, branch = maker.ask([], given), 0
        for _ in range(20):
            if len(made) >= budget:
                break
            if (question := ask_pair(rng, first, second, inline=False)) is not None:
                branch += 1
                maker.branch(made, question, branch)
        if branch:
            return made
