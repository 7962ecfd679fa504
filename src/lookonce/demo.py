"""The demonstration: a picture looked at, asked about, asked about again from the store, and found by its caption.

Knows nothing of where its lines go. What is right is read off the scene that was drawn; of a picture that was given
nothing is claimed.
"""

import random
import shutil
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final

from PIL import Image

from lookonce.drawing import draw
from lookonce.embedder import Embedder
from lookonce.embedding import ImageEmbedding
from lookonce.errors import InputError
from lookonce.images import open_picture, read_source
from lookonce.looker import LookOptions
from lookonce.model import Model
from lookonce.scene import Scene, caption, make_twin, random_scene
from lookonce.store import Store
from lookonce.store_place import DEFAULT_LIMIT_BYTES
from lookonce.terminal import status

__all__ = ["DEMO_MODEL", "DEMO_SEED", "DemoResult", "Question", "Subject", "draw_subject", "open_subject", "run_demo"]

DEMO_MODEL: Final = "demo"
DEMO_SEED: Final = 1  # its scene is one that the model in the package reads rightly

_SIZE: Final = (480, 320)
_MAX_TOKENS: Final = 80
_N_CAPTIONS: Final = 4
_WIDTH: Final = 78
# In the words that the demo model was taught, which are sensible of any picture.
_QUESTIONS: Final = ("Describe the picture.", "What colour is the background?", "What does it say?")
_CAPTIONS: Final = ("people", "an animal", "a landscape or a street", "a page with writing on it")


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and the right answer where it is known."""

    text: str
    truth: str | None = None


@dataclass(frozen=True, slots=True)
class Subject:
    """A picture and what is done with it. `caption` is the right one of the captions; None where that is not known."""

    picture: Image.Image
    told: str
    questions: tuple[Question, ...]
    captions: tuple[str, ...]
    caption: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer; `prefix` says where the beginning of its prompt, the picture, came from.

    `right` is None where that cannot be told: another model than the demo's has other words for what is right.
    """

    question: str
    text: str
    right: bool | None
    truth: str | None
    prefix: str
    first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Round:
    """A model loaded, the picture looked at, and the questions asked."""

    loaded_s: float
    source: str
    rows: int
    look_s: float
    tower_loaded: bool
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Match:
    """A caption and its cosine with the picture. `is_own` says whether it is the picture's; None where nobody knows."""

    caption: str
    score: float
    is_own: bool | None


@dataclass(frozen=True, slots=True)
class DemoResult:
    """All that happened; `matches` has the nearest caption first."""

    model: str
    picture: tuple[int, int]
    first: Round
    again: Round
    matches: tuple[Match, ...]
    embedded_s: float

    @property
    def same_answers(self) -> bool:
        """Whether the second round's answers are the first's, word for word."""
        return [one.text for one in self.first.answers] == [one.text for one in self.again.answers]

    @property
    def tower_spared(self) -> bool:
        """Whether the second round did without the vision tower."""
        return self.again.source == "store" and not self.again.tower_loaded

    @property
    def passed(self) -> bool:
        """Whether the second round gave the same answers without the vision tower."""
        return self.same_answers and self.tower_spared

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        names = ("same_answers", "tower_spared", "passed")
        return {**asdict(self), **{name: getattr(self, name) for name in names}}


def draw_subject(seed: int, prompts: Sequence[str] = ()) -> Subject:
    """Draw the scene of that seed, with questions and captions of which the scene itself tells what is right.

    The questions are replaced by `prompts`, whose answers nobody knows.
    """
    rng = random.Random(f"demo {seed}")  # noqa: S311  no secret, but the same each time
    scene = _draw_lots(rng)
    thing = rng.choice(scene.things)
    asked = (
        Question("Describe the picture.", caption(scene)),
        Question(f"Which shape is {thing.colour}?", thing.shape),
        Question("What does it say?", scene.word),
    )
    captions = [caption(scene)]
    while len(captions) < _N_CAPTIONS:
        twin = make_twin(rng, scene)
        # The model was taught words, but vectors in which a word outweighs the rest it has not.
        if twin.word == scene.word and caption(twin) not in captions:
            captions.append(caption(twin))
    rng.shuffle(captions)
    questions = tuple(map(Question, prompts)) or asked
    return Subject(draw(scene), f"drawn by seed {seed}, {caption(scene)}", questions, tuple(captions), caption(scene))


def _draw_lots(rng: random.Random) -> Scene:
    """Two or three things, each of a shape and a colour of its own, and a word: something to ask of any of them."""
    while True:
        scene = random_scene(rng, _SIZE, counts=(0, 1, 1), word_share=1.0)
        shapes, colours = ({getattr(thing, name) for thing in scene.things} for name in ("shape", "colour"))
        if len(shapes) == len(colours) == len(scene.things):
            return scene


def open_subject(image: str, prompts: Sequence[str] = ()) -> Subject:
    """Open a picture file, to be asked `prompts` or what can be asked of any. Raises PictureError."""
    picture = Image.fromarray(open_picture(read_source(image), image).pixels)
    return Subject(picture, image, tuple(map(Question, prompts or _QUESTIONS)), _CAPTIONS)


def run_demo(
    load: Callable[[Store], Model], subject: Subject, pixels: LookOptions, tell: Callable[[str], None]
) -> DemoResult:
    """Do all of it with a store in a temporary folder, which is gone afterwards; `tell` is given lines as they come.

    Raises InputError where there is no temporary folder, and what loading, looking and asking raise.
    """
    picture = subject.picture
    tell(_fill(f"The picture, {picture.width} x {picture.height}: {subject.told}"))
    with _temporary_store() as store:
        tell("\n1. A first look, and the questions")
        with _loaded(load, store) as (model, loaded_s):
            first, _ = _ask_round(model, loaded_s, subject, pixels)
        _tell_all(tell, _answer_lines(first))
        tell("\n2. The model loaded anew: the same picture, the same questions")
        with _loaded(load, store) as (model, loaded_s):
            again, look = _ask_round(model, loaded_s, subject, pixels)
            _tell_all(tell, _time_lines(first, again))
            matches, embedded_s = _match(model, look, subject)
            name = model.name
    result = DemoResult(name, picture.size, first, again, matches, embedded_s)
    _tell_all(tell, _verdict_lines(result))
    _tell_all(tell, _match_lines(result))
    return result


@contextmanager
def _temporary_store() -> Iterator[Store]:
    try:
        folder = tempfile.mkdtemp(prefix="lookonce-demo-")
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"no temporary folder can be made ({reason}): set TMPDIR to one that can be used") from error
    try:
        with Store(folder, limit_bytes=DEFAULT_LIMIT_BYTES) as store:
            yield store
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _loaded(load: Callable[[Store], Model], store: Store) -> Iterator[tuple[Model, float]]:
    started = time.perf_counter()
    with load(store) as model:
        yield model, time.perf_counter() - started


def _ask_round(model: Model, loaded_s: float, subject: Subject, pixels: LookOptions) -> tuple[Round, ImageEmbedding]:
    started = time.perf_counter()
    with status("Looking at the picture"):
        look = model.look(subject.picture, min_pixels=pixels.min_pixels, max_pixels=pixels.max_pixels)
    look_s = time.perf_counter() - started
    judged = model.card is not None and model.card.name == DEMO_MODEL
    with status("Asking"):
        answers = tuple(_ask(model, look, question, judged=judged) for question in subject.questions)
    return Round(loaded_s, look.source, look.n_rows, look_s, model.tower_loaded, answers), look


def _ask(model: Model, look: ImageEmbedding, question: Question, *, judged: bool) -> Answer:
    reply = model.ask(question.text, [look], temperature=0.0, max_tokens=_MAX_TOKENS)
    right = reply.text == question.truth if judged and question.truth is not None else None
    first_s = reply.timings.first_token_s
    total_s = first_s + reply.timings.generation_s
    return Answer(question.text, reply.text, right, question.truth, reply.usage.prefix, first_s, total_s)


def _match(model: Model, look: ImageEmbedding, subject: Subject) -> tuple[tuple[Match, ...], float]:
    started = time.perf_counter()
    with status("Comparing captions"), Embedder(model) as embedder:
        scores = embedder.embed_batch(list(subject.captions)) @ embedder.embed_image(look)
    own = [None if subject.caption is None else text == subject.caption for text in subject.captions]
    matches = map(Match, subject.captions, scores.tolist(), own)
    return tuple(sorted(matches, key=lambda one: -one.score)), time.perf_counter() - started


def _tell_all(tell: Callable[[str], None], lines: Iterator[str]) -> None:
    for line in lines:
        tell(line)


def _fill(text: str, indent: str = "") -> str:
    joined = " ".join(text.split())
    return textwrap.fill(joined, _WIDTH, initial_indent=indent, subsequent_indent=indent)


def _answer_lines(first: Round) -> Iterator[str]:
    yield f"   {first.rows} rows in {first.look_s:.3f} s, encoded by the vision tower"
    for answer in first.answers:
        yield _fill(answer.question, "   ")
        yield _fill(f"{answer.text or '(nothing)'}{_remark(answer)}", "      ")


def _remark(answer: Answer) -> str:
    if answer.right is None:
        return "" if answer.truth is None else f"  (drawn: {answer.truth})"
    return "  (right)" if answer.right else f"  (wrong: {answer.truth})"


def _time_lines(first: Round, again: Round) -> Iterator[str]:
    yield f"   {'':<30}{'first time':>20}   {'again':>20}"
    yield _time_line("model loaded", ("", first.loaded_s), ("", again.loaded_s))
    yield _time_line("look", (first.source, first.look_s), (again.source, again.look_s))
    for one, two in zip(first.answers, again.answers, strict=True):
        title = textwrap.shorten(one.question, 29, placeholder="...")
        yield _time_line(title, (one.prefix, one.first_token_s), (two.prefix, two.first_token_s))


def _time_line(title: str, *times: tuple[str, float]) -> str:
    return f"   {title:<30}" + "   ".join(f"{where:>9} {seconds:8.3f} s" for where, seconds in times)


def _verdict_lines(result: DemoResult) -> Iterator[str]:
    same = "the same, word for word" if result.same_answers else "NOT the same: please report this, it is a fault"
    if result.tower_spared:
        spared = "The second time the picture came from the store, and no vision tower was loaded."
    else:
        spared = "The second time the picture was NOT in the store: is there room in the temporary folder?"
    yield _fill(f"Of a question the time to the answer's first word. {spared} The answers are {same}.", "   ")


def _match_lines(result: DemoResult) -> Iterator[str]:
    count = len(result.matches)
    yield f"\n3. {count} captions, the nearest to the picture first ({result.embedded_s:.3f} s for {count + 1} vectors)"
    for one in result.matches:
        mark = "* " if one.is_own else "  "
        text = " ".join(one.caption.split())
        yield textwrap.fill(f"{mark}{one.score:6.3f}  {text}", _WIDTH, initial_indent="   ", subsequent_indent=" " * 13)
    if result.matches[0].is_own is not None:
        found = "found" if result.matches[0].is_own else "NOT found"
        yield f"   * is the picture's own caption: {found}."
