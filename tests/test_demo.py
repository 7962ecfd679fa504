import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import lookonce
from lookonce import cli
from lookonce.demo import DEMO_SEED, DemoResult, Question, Subject, draw_subject, run_demo
from lookonce.looker import LookOptions
from lookonce.scene import COLOURS, SHAPES

ONE_THREAD = ("--threads", "1")


@dataclass(frozen=True)
class Place:
    """A working folder, a user's store that already holds the demo's picture, and a folder for temporary files."""

    work: Path
    store: Path
    temporary: Path

    def run(self, *arguments: object, **options: Any) -> "subprocess.CompletedProcess[str]":
        settings = {"LOOKONCE_STORE": str(self.store), "TMPDIR": str(self.temporary), "COLUMNS": "80"}
        return subprocess.run(
            [sys.executable, "-m", "lookonce", *map(str, arguments)],
            cwd=self.work,
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            **options,
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    base = tmp_path_factory.mktemp("demo")
    made = Place(base / "work", base / "store", base / "temporary")
    made.work.mkdir()
    made.temporary.mkdir()
    draw_subject(DEMO_SEED).picture.save(base / "seen.png")
    looked = made.run("look", base / "seen.png", "--model", "demo", *ONE_THREAD)
    assert (looked.returncode, looked.stderr) == (0, "")
    return made


@pytest.fixture(scope="module")
def shown(place: Place) -> "subprocess.CompletedProcess[str]":
    """The command as a newcomer gives it."""
    return place.run("demo", *ONE_THREAD, "--save-picture", "scene.png")


@pytest.fixture(scope="module")
def told(place: Place) -> dict[str, Any]:
    """What it tells as JSON."""
    run = place.run("demo", *ONE_THREAD, "--json")
    assert (run.returncode, run.stderr, run.stdout.count("\n")) == (0, "", 1)
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def test_the_demo_ends_well_on_a_terminal_of_80_columns(shown: "subprocess.CompletedProcess[str]") -> None:
    assert (shown.returncode, shown.stderr) == (0, "")
    assert max(map(len, shown.stdout.splitlines())) <= 80


def test_it_shows_three_right_answers_and_the_right_caption_first(shown: "subprocess.CompletedProcess[str]") -> None:
    subject = draw_subject(DEMO_SEED)
    unfolded = " ".join(shown.stdout.split())
    for question in subject.questions:
        assert f"{question.text} {question.truth} (right)" in unfolded
    assert (len(subject.questions), unfolded.count("(right)"), unfolded.count("wrong")) == (3, 3, 0)
    scores = [(mark, float(score)) for mark, score in re.findall(r"(?m)^   ([* ])  (-?\d\.\d{3})  ", shown.stdout)]
    assert [mark for mark, _ in scores] == ["*", " ", " ", " "]
    assert scores == sorted(scores, key=lambda one: -one[1])
    assert f"* {scores[0][1]:.3f} {subject.caption}" in unfolded


def test_it_ends_with_what_to_run_for_a_real_model(shown: "subprocess.CompletedProcess[str]") -> None:
    steps = shown.stdout.partition("\nNext")[2].splitlines()[1:]
    assert steps[0].split() == ["lookonce", "pull", "qwen3-vl-2b-instruct"]
    assert all(step.endswith("qwen3-vl-2b-instruct") for step in steps)
    assert "   lookonce ask" in steps[1]


def test_the_picture_it_saves_is_the_one_that_it_drew(shown: "subprocess.CompletedProcess[str]", place: Place) -> None:
    with Image.open(place.work / "scene.png") as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(draw_subject(DEMO_SEED).picture))


def test_it_neither_asks_nor_changes_the_users_store_and_leaves_nothing_behind(
    told: dict[str, Any], place: Place
) -> None:
    with lookonce.Store(place.store) as store:
        assert {kind: one.entries for kind, one in store.stats().kinds.items()} == {"look": 1}
    assert told["first"]["source"] == "encoded"
    assert list(place.temporary.iterdir()) == []


def test_the_second_round_is_answered_from_the_store_without_a_tower(told: dict[str, Any]) -> None:
    first, again = told["first"], told["again"]
    assert (first["source"], first["tower_loaded"], again["source"], again["tower_loaded"]) == (
        *("encoded", True),
        *("store", False),
    )
    assert [one["prefix"] for one in first["answers"]] == ["evaluated", "memory", "memory"]
    assert [one["prefix"] for one in again["answers"]] == ["store", "memory", "memory"]
    assert [one["text"] for one in again["answers"]] == [one["text"] for one in first["answers"]]
    assert again["look_s"] < first["look_s"]
    assert (told["same_answers"], told["tower_spared"], told["passed"]) == (True, True, True)


def test_the_json_has_the_answers_the_truth_and_the_captions(told: dict[str, Any]) -> None:
    subject = draw_subject(DEMO_SEED)
    for done in (told["first"], told["again"]):
        assert [(one["question"], one["text"], one["right"]) for one in done["answers"]] == [
            (one.text, one.truth, True) for one in subject.questions
        ]
        assert all(0 <= one["first_token_s"] <= one["total_s"] for one in done["answers"])
    assert {one["caption"] for one in told["matches"]} == set(subject.captions)
    assert [one["is_own"] for one in told["matches"]] == [True, False, False, False]
    assert told["picture"] == [480, 320]


def test_the_right_caption_is_found_for_nearly_every_seed() -> None:
    with lookonce.load("demo", threads=1, store=False) as model, lookonce.Embedder(model) as embedder:
        found = []
        for seed in range(40):
            subject = draw_subject(seed)
            scores = embedder.embed_batch(list(subject.captions)) @ embedder.embed_image(subject.picture)
            found.append(subject.captions[scores.argmax()] == subject.caption)
    assert sum(found) >= 38, found


def test_every_seed_draws_a_scene_of_its_own_that_tells_its_own_answers() -> None:
    subjects = [draw_subject(seed) for seed in range(60)]
    assert len({subject.caption for subject in subjects}) == 60
    for subject in subjects:
        assert len(set(subject.captions)) == 4
        assert subject.caption in subject.captions
        describe, shape, word = subject.questions
        colour = shape.text.removeprefix("Which shape is ").removesuffix("?")
        assert (describe.truth, colour in COLOURS, shape.truth in SHAPES) == (subject.caption, True, True)
        assert f"{colour} {shape.truth} at the" in describe.truth
        assert describe.truth.count(f"{colour} ") == 1
        assert describe.truth.endswith(f" that says {word.truth}")
    assert draw_subject(7).picture.tobytes() == draw_subject(7).picture.tobytes()


def test_another_seed_is_another_scene(place: Place) -> None:
    run = place.run("demo", *ONE_THREAD, "--seed", 2, "--json")
    assert run.returncode == 0
    assert {one["caption"] for one in json.loads(run.stdout)["matches"]} == set(draw_subject(2).captions)


def demonstrate(subject: Subject, *, store: bool = True) -> tuple[DemoResult, str]:
    lines: list[str] = []
    result = run_demo(
        lambda made: lookonce.load("demo", threads=1, store=made if store else False),
        subject,
        LookOptions(),
        lines.append,
    )
    return result, "\n".join(lines)


def test_a_wrong_answer_and_a_wrong_caption_are_called_so() -> None:
    drawn = draw_subject(DEMO_SEED)
    other = next(one for one in drawn.captions if one != drawn.caption)
    shape = drawn.questions[1]
    result, page = demonstrate(replace(drawn, questions=(Question(shape.text, "ladder"),), caption=other))
    assert f"{shape.truth} (wrong: ladder)" in page
    assert "the picture's own caption: NOT found." in page
    assert result.first.answers[0].right is False
    assert result.passed


def test_a_picture_that_no_store_kept_is_told_and_fails() -> None:
    drawn = draw_subject(DEMO_SEED)
    result, page = demonstrate(replace(drawn, questions=drawn.questions[2:]), store=False)
    assert (result.same_answers, result.tower_spared, result.passed) == (True, False, False)
    assert "was NOT in the store" in " ".join(page.split())


def run_here(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A photo in the working folder, with a model named nowhere."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(7).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")
    return Path("photo.png")


def test_of_a_given_picture_and_model_nothing_is_called_right_or_wrong(
    capsys: pytest.CaptureFixture[str], photo: Path, tiny_pair: tuple[Path, Path]
) -> None:
    options = ("--model", tiny_pair[0], *ONE_THREAD, "--save-picture", "copy.png")
    status, page, err = run_here(capsys, "demo", "-i", photo, *options)
    assert (status, err) == (0, "")
    assert len(re.findall(r"(?m)^      -?\d\.\d{3}  ", page.partition("4 captions")[2])) == 4
    assert not any(word in page for word in ("right", "wrong", "drawn", "found", "lookonce pull"))
    assert f"--model {tiny_pair[0]}" in page.partition("\nNext")[2]
    assert np.array_equal(np.asarray(Image.open("copy.png")), np.asarray(Image.open(photo)))


def test_another_models_answers_stand_beside_what_was_drawn(
    capsys: pytest.CaptureFixture[str], photo: Path, tiny_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOKONCE_MODEL", str(tiny_pair[0]))
    status, page, _ = run_here(capsys, "demo", *ONE_THREAD)
    assert status == 0
    unfolded = " ".join(page.split())
    assert all(f"(drawn: {question.truth})" in unfolded for question in draw_subject(DEMO_SEED).questions)
    assert "(right)" not in page
    assert "(wrong" not in page


def test_other_questions_may_be_asked_and_none_knows_their_answers(
    capsys: pytest.CaptureFixture[str], photo: Path, tiny_pair: tuple[Path, Path]
) -> None:
    asked = ("--prompt", "Why?", "--prompt", "Is it a very long question, so long that it takes more than its column?")
    status, out, _ = run_here(capsys, "demo", *asked, "--model", tiny_pair[0], *ONE_THREAD, "--json")
    told = json.loads(out)
    assert status == 0
    assert [one["question"] for one in told["again"]["answers"]] == list(asked[1::2])
    assert {(one["right"], one["truth"]) for one in told["again"]["answers"]} == {(None, None)}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--save-picture", "gone/scene.png"), "give a file in a folder of your own"),
        (("--save-picture", "photo.png/scene.png"), "give a file in a folder of your own"),
        (("--save-picture", "folder.png"), "'folder.png' cannot be written"),
        (("--save-picture", "scene.jpg"), "'scene.jpg' is no name for the picture: end it in .png"),
        (("--save-picture", "scene"), "end it in .png"),
        (("-i", "gone.png"), "gone.png"),
        (("-i", "text.png"), "text.png"),
        (("-i", "photo.png", "--seed", "3"), "--image and --seed were both given"),
        (("--seed", "three"), "--seed"),
        (("--prompt", " "), "--prompt is empty"),
        (("--store", "mine"), "No such option: --store"),
        (("--model", "nowhere.gguf"), "nowhere.gguf"),
        (("--max-pixels", "0"), "0"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], photo: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    Path("folder.png").mkdir()
    Path("text.png").write_text("no picture")
    status, out, err = run_here(capsys, "demo", *arguments, "--json")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert sentence in err
    assert sorted(path.name for path in Path().iterdir()) == ["folder.png", "photo.png", "text.png"]


def test_without_a_temporary_folder_one_line_says_what_to_set(
    capsys: pytest.CaptureFixture[str], photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "gone")
    status, _, err = run_here(capsys, "demo")
    assert (status, err.count("\n")) == (2, 1)
    assert "set TMPDIR" in err


def test_a_full_disk_costs_the_second_round_its_speed_and_the_demo_its_status(place: Place) -> None:
    def no_file_over_20_kb() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    run = place.run("demo", *ONE_THREAD, preexec_fn=no_file_over_20_kb)
    assert run.returncode == 1
    assert "was NOT in the store" in " ".join(run.stdout.split())
    assert run.stdout.count("(right)") == 3
    assert run.stderr
    assert all(line.startswith("lookonce: warning: ") for line in run.stderr.splitlines())
    assert list(place.temporary.iterdir()) == []
