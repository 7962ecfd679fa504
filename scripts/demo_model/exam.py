"""Held-out scenes with their questions and captions, and how answers and matches are counted.

Knows nothing of models: whoever is examined gives answers and vectors.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lookonce.scene import Scene, caption, make_twin

from .scene import make_scene
from .task import TASKS, Question, ask, ask_pair

__all__ = ["Entry", "Marks", "Matching", "make_exam", "make_matching", "recall"]

_TRIES = 30


@dataclass(frozen=True, slots=True)
class Entry:
    """One question of the exam: about one scene, or about two, which stand inline or come before it."""

    scenes: tuple[Scene, ...]
    question: Question
    inline: bool = False


@dataclass(frozen=True, slots=True)
class Matching:
    """Scenes with captions of their own, each followed at the same place by a twin that differs in one attribute."""

    scenes: tuple[Scene, ...]
    twins: tuple[Scene, ...]

    @property
    def captions(self) -> list[str]:
        """Captions of the scenes, then of the twins."""
        return [caption(scene) for scene in (*self.scenes, *self.twins)]


@dataclass(slots=True)
class Marks:
    """Right and given answers by task."""

    right: dict[str, int] = field(default_factory=dict)
    given: dict[str, int] = field(default_factory=dict)
    wrong: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, task: str, text: str, answer: str, expected: str) -> None:
        """Count one answer; it is right where it is the expected one, letter for letter."""
        self.given[task] = self.given.get(task, 0) + 1
        self.right[task] = self.right.get(task, 0) + (answer == expected)
        if answer != expected:
            self.wrong.append((text, expected, answer))

    @property
    def overall(self) -> float:
        """Share of right answers."""
        return sum(self.right.values()) / sum(self.given.values())

    @property
    def by_task(self) -> dict[str, float]:
        """Share of right answers of each task."""
        return {task: self.right[task] / given for task, given in self.given.items()}


def make_exam(seed: str, count: int) -> list[Entry]:
    """Make `count` scenes and ask one question of every task about each that allows one."""
    rng = random.Random(f"exam {seed}")
    scenes = [make_scene(rng) for _ in range(count)]
    entries: list[Entry] = []
    for scene, other in zip(scenes, [*scenes[1:], scenes[0]], strict=True):
        for task in TASKS[:-1]:
            asked = (ask(rng, scene, task) for _ in range(_TRIES))
            entries += [Entry((scene,), one) for one in (next(filter(None, asked), None),) if one]
        inline = rng.random() < 0.5
        compared = (ask_pair(rng, scene, other, inline=inline) for _ in range(_TRIES))
        entries += [Entry((scene, other), one, inline) for one in (next(filter(None, compared), None),) if one]
    return entries


def make_matching(seed: str, count: int) -> Matching:
    """Make scenes and twins, all of whose captions differ."""
    rng = random.Random(f"matching {seed}")
    scenes: list[Scene] = []
    twins: list[Scene] = []
    told: set[str] = set()
    while len(scenes) < count:
        scene = make_scene(rng)
        twin = make_twin(rng, scene)
        texts = {caption(scene), caption(twin)}
        if len(texts) == 2 and not texts & told:
            told |= texts
            scenes.append(scene)
            twins.append(twin)
    return Matching(tuple(scenes), tuple(twins))


def recall(asked: NDArray[np.float32], offered: NDArray[np.float32]) -> float:
    """Give the share of asked vectors (n, d) that are nearest to the offered vector (m, d) at their own place."""
    nearest: Sequence[int] = (asked @ offered.T).argmax(axis=1).tolist()
    return float(np.mean([place == found for place, found in enumerate(nearest)]))
