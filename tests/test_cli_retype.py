"""`lookonce models retype`: what it prints, what it refuses, and that the new file is used when told so."""

import json
import shutil
from pathlib import Path

import pytest

from lookonce import cli, projector_choice

Pair = tuple[Path, Path]


@pytest.fixture
def model(tmp_path: Path, tiny_pair: Pair) -> Path:
    shutil.copy(tiny_pair[0], tmp_path / "text.gguf")
    shutil.copy(tiny_pair[1], tmp_path / "mmproj-F32.gguf")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_it_writes_the_file_and_says_how_alike_both_are_and_how_to_use_it(
    capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    status, out, err = run(capsys, "models", "retype", model / "mmproj-F32.gguf", "--type", "bf16", "--threads", 1)
    made = model / "mmproj-BF16.gguf"
    lines = out.splitlines()
    assert (status, err, made.exists()) == (0, "", True)
    assert lines[0] == f"{made}: BF16, 4.9 MB, retyped from mmproj-F32.gguf"
    assert 0.999 <= float(lines[1].partition(": ")[2]) < 1
    assert lines[2] == "to use it: --mmproj-type BF16, or LOOKONCE_MMPROJ_TYPE=BF16"


def test_json_tells_the_same_and_a_folder_stands_for_its_projector(
    capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    for existed in (False, True):
        status, out, _ = run(capsys, "models", "retype", model, "--type", "Q8_0", "--threads", 1, "--json")
        told = json.loads(out)
        assert status == 0
        assert told.pop("lowest_row_cosine") >= 0.999
        assert told == {
            "path": str(model / "mmproj-Q8_0.gguf"),
            "type": "Q8_0",
            "original": str(model / "mmproj-F32.gguf"),
            "original_type": "F32",
            "existed": existed,
        }


@pytest.mark.parametrize("faster", ["BF16", "F32"])
def test_auto_writes_the_fastest_and_nothing_where_that_is_the_files_own(
    capsys: pytest.CaptureFixture[str], model: Path, monkeypatch: pytest.MonkeyPatch, faster: str
) -> None:
    def times(*_: object, **__: object) -> dict[str, list[float]]:
        return {kind: [0.1 if kind == faster else 1.0] for kind in ("F32", "BF16", "F16", "Q8_0")}

    monkeypatch.setattr(projector_choice, "measure_types", times)
    status, out, _ = run(capsys, "models", "retype", model, "--threads", 1)
    assert status == 0
    assert (model / "mmproj-BF16.gguf").exists() == (faster == "BF16")
    begin = (
        "BF16 is 10.00 times as fast as F32 (" if faster == "BF16" else f"{model / 'mmproj-F32.gguf'} stays as it is"
    )
    assert out.startswith(begin)
    told = json.loads(run(capsys, "models", "retype", model, "--threads", 1, "--json")[1])
    assert told["type"] == faster
    assert told["times_s"][faster] == 0.1


def test_a_file_retyped_earlier_that_auto_would_take_is_told(
    capsys: pytest.CaptureFixture[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(capsys, "models", "retype", model, "--type", "Q8_0", "--threads", 1)
    times = {"F32": [0.1], "BF16": [1.0], "F16": [1.0], "Q8_0": [1.0]}
    monkeypatch.setattr(projector_choice, "measure_types", lambda *_, **__: times)
    status, out, err = run(capsys, "models", "retype", model, "--threads", 1)
    assert (status, len(err.splitlines())) == (0, 1)
    assert "stays as it is" in out
    assert f"--mmproj-type auto takes {model / 'mmproj-Q8_0.gguf'}, which was retyped earlier" in err


def test_ask_uses_the_new_file_when_the_option_says_so(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    run(capsys, "models", "retype", model, "--type", "BF16", "--threads", 1)
    ask = ("look", _picture(tmp_path), "--model", model, "--threads", 1, "--store", tmp_path / "store", "--json")
    first = json.loads(run(capsys, *ask)[1])
    second = json.loads(run(capsys, *ask, "--mmproj-type", "BF16")[1])
    assert (first["source"], second["source"]) == ("encoded", "encoded")
    assert first["key"] != second["key"]
    status, _, err = run(capsys, *ask, "--mmproj-type", "F16")
    assert status == 2
    assert "has no F16 file beside it: make one with `lookonce models retype " in err


def test_a_type_that_the_environment_asks_for_and_nobody_made_stops_pictures_alone(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOKONCE_MMPROJ_TYPE", "BF16")
    ask = ("ask", "What?", "--model", model, "--threads", 1, "--no-store", "--max-tokens", 2)
    assert run(capsys, *ask)[0] == 0
    status, out, err = run(capsys, *ask, "-i", _picture(tmp_path))
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert "LOOKONCE_MMPROJ_TYPE asks for the projector in BF16, but " in err
    for _ in range(2):  # a folder stands for its original
        assert run(capsys, "models", "retype", model, "--type", "BF16", "--threads", 1)[0] == 0
    assert run(capsys, *ask, "-i", _picture(tmp_path))[0] == 0


def _picture(folder: Path) -> Path:
    from lookonce.drawing import draw_scene

    path = folder / "scene.png"
    draw_scene().resize((64, 64)).save(path)
    return path


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("text.gguf",), "is a text model"),
        (("none.gguf",), "none.gguf does not exist"),
        (("demo", "--type", "F16"), "is part of the package, where nothing is written"),
        (("mmproj-F32.gguf", "--threads", "0"), "Invalid value for '--threads'"),
        (("mmproj-F32.gguf", "--type", "Q2_K"), "'Q2_K' is no type of a projector here: choose one of BF16"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str],
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    told: str,
) -> None:
    monkeypatch.chdir(model)
    status, out, err = run(capsys, "models", "retype", *arguments)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert told in err
