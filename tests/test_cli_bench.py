"""`lookonce bench`: its two forms of output, the model of random weights, and what it refuses."""

import json
import shutil
from pathlib import Path

import platformdirs
import pytest

from lookonce import cli, retype
from lookonce.synthetic.pair import find_pair, make_pair, needed_bytes

Pair = tuple[Path, Path]
FAST = ("--rounds", "1", "--max-tokens", "3", "--threads", "1", "--n-ctx", "512")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return platformdirs.user_cache_path("lookonce")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main(["bench", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_model_of_random_weights_is_made_once_in_the_cache_and_measured(
    capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    status, out, err = run(capsys, "--synthetic", "tiny", *FAST)
    assert (status, err) == (0, "")
    assert "cold: tower, prompt, first token" in out
    pair = find_pair(cache / "synthetic", type="Q4_K_M", mmproj_type="F16")
    assert pair is not None
    times = [path.stat().st_mtime_ns for path in pair]
    status, out, _ = run(capsys, "--synthetic", "tiny", "--json", *FAST)
    told = json.loads(out)
    assert status == 0
    assert [path.stat().st_mtime_ns for path in pair] == times
    assert told["model"]["projector_type"] == "F16"
    assert told["median"]["state"]["first_token_s"] > 0
    assert [path.name for path in cache.iterdir()] == ["synthetic"]


def test_a_picture_a_question_and_a_store_of_ones_own(
    capsys: pytest.CaptureFixture[str], tiny_pair: Pair, tmp_path: Path
) -> None:
    from lookonce.drawing import draw_scene

    picture = tmp_path / "scene.png"
    draw_scene().resize((64, 96)).save(picture)
    store = tmp_path / "disk"
    given = ("--model", tiny_pair[0], "-i", picture, "--prompt", "Who?", "--store", store, "--min-pixels", "1024")
    status, out, _ = run(capsys, *given, "--json", *FAST)
    told = json.loads(out)
    assert status == 0
    assert told["median"]["cold"]["image_rows"] == 6
    assert (told["prompt"], told["picture"]) == ("Who?", str(picture))
    assert list(store.iterdir()) == []


def test_the_projector_of_the_type_that_is_asked_for_is_reported_and_handed_to_the_processes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text, original = make_pair(tmp_path, mmproj_type="F16")
    made = retype.retype(original, "BF16").path
    monkeypatch.setenv("LOOKONCE_MMPROJ_TYPE", "bf16")
    status, out, err = run(capsys, "--model", text, "--mmproj", original, "--json", *FAST)
    assert (status, err) == (0, "")
    told = json.loads(out)
    assert (told["model"]["projector"], told["model"]["projector_type"]) == (str(made), "BF16")
    assert (told["options"]["mmproj"], told["options"]["mmproj_type"]) == (str(made), "BF16")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "no model was given: give --model NAME|FILE|FOLDER, set LOOKONCE_MODEL, or --synthetic 2b"),
        (("--synthetic", "3b"), "there is no shape '3b': choose one of tiny, "),
        (("--synthetic", "demo"), "there is no shape 'demo': choose one of tiny, 2b, 4b, 8b"),
        (("--synthetic", "tiny", "--mmproj", "x.gguf"), "--synthetic and --mmproj were both given"),
        (("--synthetic", "tiny", "--model", "demo"), "--synthetic and --model were both given"),
        (("--model", "x.gguf", "--no-store"), "No such option: --no-store"),
        (("--model", "x.gguf"), "'x.gguf' does not exist"),
        (("--model", "x.gguf", "-i", "none.png"), "none.png"),
        (("--model", "x.gguf", "--rounds", "0"), "--rounds"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert told in err


def test_the_shapes_that_the_help_names_are_those_that_the_refusal_names(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, err = run(capsys, "--synthetic", "3b")
    named = err.strip().rpartition("choose one of ")[2]
    assert named == "tiny, 2b, 4b, 8b"
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert f"made at first use: {named}." in " ".join(out.replace("│", " ").split())


def test_a_disk_without_room_for_the_model_is_told_before_any_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    usage = shutil.disk_usage(".")._replace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    status, _, err = run(capsys, "--synthetic", "2b", *FAST)
    assert status == 2
    assert "a model of the shape 2b needs 5.3" in err
    assert list((cache / "synthetic").iterdir()) == []


def test_the_room_that_is_asked_for_covers_what_a_pair_takes(tiny_pair: Pair) -> None:
    assert 4e6 < needed_bytes() < 2 * sum(path.stat().st_size for path in tiny_pair)
