"""Questions about scenes and their only right answers.

Knows nothing of tokens or models. A question is asked only where the scene leaves no doubt about its answer.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lookonce.scene import BACKGROUNDS, COLOURS, PLACES, SHAPES, Scene, Thing, caption

__all__ = ["ALIASES", "NO_PICTURE", "TASKS", "Question", "ask", "ask_blind", "ask_pair"]

TASKS = ("describe", "colour", "shape", "place", "size", "count", "yes/no", "word", "follow-up", "compare")
ALIASES = ("<image_1>", "<image_2>")
NO_PICTURE = "there is no picture"

_NUMBERS = ("zero", "one", "two", "three", "four")
_DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


@dataclass(frozen=True, slots=True)
class Question:
    """Turns of user text and answer. A picture whose alias stands in no turn comes before the first."""

    task: str
    turns: tuple[tuple[str, str], ...]


def ask(rng: random.Random, scene: Scene, task: str) -> Question | None:
    """Ask one question of a task about one scene; None where the scene has no unambiguous one."""
    turns = _ASKERS[task](rng, scene)
    return None if turns is None else Question(task, turns)


def ask_blind(rng: random.Random) -> Question:
    """Ask about a picture that is not there."""
    spoken = {"shape": rng.choice(SHAPES), "colour": rng.choice(tuple(COLOURS)), "place": rng.choice(PLACES)}
    text = rng.choice(
        (
            *("Describe the picture.", "What is in the picture?", "How many shapes are there?", "What does it say?"),
            *("What colour is the {shape}?", "What color is the {shape}?", "Where is the {colour} {shape}?"),
            *("Is there a {colour} {shape}?", "Which shape is {colour}?", "What colour is the background?"),
            *("Which shape is at the {place}?", "Is the {shape} small or large?"),
        )
    ).format(**spoken)
    return Question("blind", ((text, NO_PICTURE),))


def ask_pair(rng: random.Random, first: Scene, second: Scene, *, inline: bool) -> Question | None:
    """Ask about two pictures: inline their aliases stand in the question, in either order, else both come before it.

    "the first" is the picture that the reader sees first. None where the scenes do not differ as the question needs.
    """
    scenes = (first, second)
    if inline and rng.random() < 0.4:
        return _ask_one_of_two(rng, scenes)
    order = (0, 1) if not inline or rng.random() < 0.5 else (1, 0)
    answers = ("the first", "the second")
    found = _difference(rng, scenes)
    if found is None:
        return None
    text, winner = found
    if inline:
        text = f"{text}, {ALIASES[order[0]]} or {ALIASES[order[1]]}?"
    else:
        text += rng.choice(("?", ", the first or the second?"))
    return Question("compare", ((text, answers[order.index(winner)]),))


def _colour_word(rng: random.Random) -> str:
    return rng.choice(("colour", "color"))


def _unique(scene: Scene, attribute: str) -> list[Thing]:
    values = [getattr(thing, attribute) for thing in scene.things]
    return [thing for thing in scene.things if values.count(getattr(thing, attribute)) == 1]


def _pointed(rng: random.Random, scene: Scene) -> tuple[Thing, str] | None:
    """Choose a thing that can be pointed at by its shape or by its colour and shape, and give both."""
    by_shape = _unique(scene, "shape")
    pairs = [(thing.colour, thing.shape) for thing in scene.things]
    by_both = [thing for thing in scene.things if pairs.count((thing.colour, thing.shape)) == 1]
    if by_shape and rng.random() < 0.5:
        thing = rng.choice(by_shape)
        return thing, thing.shape
    if not by_both:
        return None
    thing = rng.choice(by_both)
    return thing, f"{thing.colour} {thing.shape}"


def _describe(rng: random.Random, scene: Scene) -> tuple[tuple[str, str], ...]:
    texts = ("Describe the picture.", "Describe the image.", "What is in the picture?", "Describe it.")
    return ((rng.choice(texts), caption(scene)),)


def _colour(rng: random.Random, scene: Scene) -> tuple[tuple[str, str], ...] | None:
    word, kind = _colour_word(rng), rng.random()
    if kind < 0.2:
        return ((f"What {word} is the background?", scene.background),)
    if kind < 0.4:
        thing = rng.choice(scene.things)
        return ((f"What {word} is the shape at the {thing.place}?", thing.colour),)
    if not (unique := _unique(scene, "shape")):
        return None
    thing = rng.choice(unique)
    text = rng.choice((f"What {word} is the {thing.shape}?", f"What is the {word} of the {thing.shape}?"))
    return ((text, thing.colour),)


def _shape(rng: random.Random, scene: Scene) -> tuple[tuple[str, str], ...] | None:
    if rng.random() < 0.4:
        thing = rng.choice(scene.things)
        return ((rng.choice(("Which", "What")) + f" shape is at the {thing.place}?", thing.shape),)
    if not (unique := _unique(scene, "colour")):
        return None
    thing = rng.choice(unique)
    texts = (f"Which shape is {thing.colour}?", f"What shape is {thing.colour}?", f"What is the {thing.colour} shape?")
    return ((rng.choice(texts), thing.shape),)


def _place(rng: random.Random, scene: Scene) -> tuple[tuple[str, str], ...] | None:
    if scene.word_place and rng.random() < 0.15:
        return (("Where is the word?", scene.word_place),)
    if (pointed := _pointed(rng, scene)) is None:
        return None
    return ((f"Where is the {pointed[1]}?", pointed[0].place),)


def _size(rng: random.Random, scene: Scene) -> tuple[tuple[str, str], ...] | None:
    if (pointed := _pointed(rng, scene)) is None:
        return None
    thing, name = pointed
    texts = (f"Is the {name} small or large?", f"Is the {name} large or small?", f"What size is the {name}?")
    return ((rng.choice(texts), thing.size),)


def _count(rng: random.Random, scene: Scene) -> tuple[tuple[str, str], ...]:
    kind = rng.random()
    if kind < 0.5:
        text = rng.choice(("How many shapes are there?", "How many shapes are in the picture?"))
        return ((text, _NUMBERS[len(scene.things)]),)
    if kind < 0.75:
        shape = rng.choice((*(thing.shape for thing in scene.things), rng.choice(SHAPES)))
        count = sum(thing.shape == shape for thing in scene.things)
        plural = "crosses" if shape == "cross" else f"{shape}s"
        return ((f"How many {plural} are there?", _NUMBERS[count]),)
    colour = rng.choice((*(thing.colour for thing in scene.things), rng.choice(tuple(COLOURS))))
    count = sum(thing.colour == colour for thing in scene.things)
    return ((f"How many {colour} shapes are there?", _NUMBERS[count]),)


def _yes_no(rng: random.Random, scene: Scene) -> tuple[tuple[str, str], ...]:
    wanted, kind = rng.random() < 0.5, rng.random()
    thing = rng.choice(scene.things)
    if kind < 0.1:
        return (("Is there a word?", "yes" if scene.word else "no"),)
    if kind < 0.2:
        background = scene.background if wanted else rng.choice(tuple(BACKGROUNDS))
        return ((f"Is the background {background}?", _yes(background == scene.background)),)
    if kind < 0.4:
        shape = thing.shape if wanted else rng.choice(SHAPES)
        return ((f"Is there a {shape}?", _yes(any(one.shape == shape for one in scene.things))),)
    if wanted:
        colour, shape = thing.colour, thing.shape
    elif rng.random() < 0.5:
        colour, shape = thing.colour, rng.choice(SHAPES)
    else:
        colour, shape = rng.choice(tuple(COLOURS)), thing.shape
    article = "an" if colour == "orange" else "a"
    there = any((one.colour, one.shape) == (colour, shape) for one in scene.things)
    return ((f"Is there {article} {colour} {shape}?", _yes(there)),)


def _yes(true: bool) -> str:
    return "yes" if true else "no"


def _word(rng: random.Random, scene: Scene) -> tuple[tuple[str, str], ...] | None:
    if scene.word is None and rng.random() < 0.7:
        return None
    texts = (
        "What does it say?",
        "What is written?",
        "Read the text.",
        "Which word is written?",
        "What does the text say?",
    )
    return ((rng.choice(texts), scene.word or "nothing"),)


def _follow_up(rng: random.Random, scene: Scene) -> tuple[tuple[str, str], ...] | None:
    if (pointed := _pointed(rng, scene)) is None:
        return None
    thing, name = pointed
    firsts = {
        "place": (f"Where is the {name}?", thing.place),
        "size": (f"Is the {name} small or large?", thing.size),
        "there": (f"Is there {'an' if name.startswith('orange') else 'a'} {name}?", "yes"),
    }
    seconds = {
        "place": ("And where is it?", thing.place),
        "size": (rng.choice(("And is it small or large?", "And is it large or small?")), thing.size),
    }
    if name == thing.shape:
        word = _colour_word(rng)
        firsts["colour"] = (f"What {word} is the {name}?", thing.colour)
        seconds["colour"] = (f"And what {word} is it?", thing.colour)
    first = rng.choice(list(firsts))
    if rng.random() < 0.6:
        direction = rng.choice(list(_DIRECTIONS))
        if (beside := _beside(scene, thing, direction)) is not None:
            return (firsts[first], (f"And what is {direction} it?", beside))
    return (firsts[first], seconds[rng.choice([kind for kind in seconds if kind != first])])


def _beside(scene: Scene, thing: Thing, direction: str) -> str | None:
    """Say what lies in a direction of a thing, in its row or column or any other; None where that is not one thing."""
    down, across = _DIRECTIONS[direction]

    def lies_there(place: str) -> bool:
        row, column = divmod(PLACES.index(place), 3)
        return (row - thing.cell // 3) * down + (column - thing.cell % 3) * across > 0

    found = [one.name for one in scene.things if lies_there(one.place)]
    if scene.word_place and lies_there(scene.word_place):
        found.append(f"the word {scene.word}")
    return None if len(found) > 1 else (*found, "nothing")[0]


def _difference(rng: random.Random, scenes: Sequence[Scene]) -> tuple[str, int] | None:
    """Ask in which of two pictures something is; give the question without its end, and which picture."""
    kind = rng.random()
    if kind < 0.4:
        counts = [len(scene.things) for scene in scenes]
        return None if counts[0] == counts[1] else ("Which picture has more shapes", int(counts[1] > counts[0]))
    chosen = rng.randrange(2)
    here, there = scenes[chosen], scenes[1 - chosen]
    if kind < 0.6:
        same = here.background == there.background
        return None if same else (f"Which picture has a {here.background} background", chosen)
    if kind < 0.7:
        return None if here.word is None or there.word else ("Which picture has a word", chosen)
    thing = rng.choice(here.things)
    if kind < 0.85:
        shown = any(one.shape == thing.shape for one in there.things)
        return None if shown else (f"Which picture has a {thing.shape}", chosen)
    shown = any((one.colour, one.shape) == (thing.colour, thing.shape) for one in there.things)
    return None if shown else (f"Which picture has {thing.name}", chosen)


def _ask_one_of_two(rng: random.Random, scenes: Sequence[Scene]) -> Question:
    """Ask about the picture whose alias stands in the question; the other comes before it."""
    chosen = rng.randrange(2)
    scene, alias = scenes[chosen], ALIASES[chosen]
    turns = rng.choice(
        (
            (f"How many shapes are in {alias}?", _NUMBERS[len(scene.things)]),
            (f"What {_colour_word(rng)} is the background of {alias}?", scene.background),
        )
    )
    return Question("compare", (turns,))


_ASKERS: dict[str, Callable[[random.Random, Scene], tuple[tuple[str, str], ...] | None]] = {
    "describe": _describe,
    "colour": _colour,
    "shape": _shape,
    "place": _place,
    "size": _size,
    "count": _count,
    "yes/no": _yes_no,
    "word": _word,
    "follow-up": _follow_up,
}
