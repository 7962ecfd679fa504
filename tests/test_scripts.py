import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lookonce import cli
from lookonce.embedding import ImageEmbedding
from script_options import make_parser

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
FAST = ("--temperature", "0", "--max-tokens", "8")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(np.random.default_rng(3).integers(0, 255, (256, 256, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def saved(tiny_pair: tuple[Path, Path], photo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("saved") / "look.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOOKONCE_STORE", str(target.with_name("store")))
        run = run_script(
            "save_embeddings", "--image", photo, "--text", "A photo.", "--output", target, "--model", tiny_pair[0]
        )
    assert (run.returncode, run.stderr) == (0, "")
    return target


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOOKONCE_MODEL", "LOOKONCE_MMPROJ"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOOKONCE_STORE", str(tmp_path / "store"))


def run_script(name: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_the_saved_file_holds_the_look_and_the_text(saved: Path) -> None:
    look = ImageEmbedding.load(saved)
    assert (look.text, look.n_rows) == ("A photo.", 64)


def test_each_prompt_is_asked_after_the_saved_text_on_a_new_line(
    capsys: pytest.CaptureFixture[str], tiny_pair: tuple[Path, Path], saved: Path, tmp_path: Path
) -> None:
    lone = tmp_path / "text.gguf"
    lone.symlink_to(tiny_pair[0])
    answers = []
    for question in ("A photo.\nWhat?", "A photo.\nWhere is it?"):
        assert cli.main(["ask", question, "-i", str(saved), "--model", str(lone), *FAST]) == 0
        answers.append(capsys.readouterr().out)
    both = run_script(
        "run_inference", "--embeddings", saved, "--prompt", "What?", "--prompt", "Where is it?", "--model", lone, *FAST
    )
    assert answers[0] != answers[1]
    assert (both.returncode, both.stderr) == (0, "")
    assert both.stdout == f"> What?\n{answers[0]}\n> Where is it?\n{answers[1]}"
    one = run_script("run_inference", "--embeddings", saved, "--prompt", "What?", "--model", lone, *FAST)
    assert one.stdout == answers[0]


@pytest.mark.parametrize(
    ("script", "arguments", "told"),
    [
        ("save_embeddings", ("--image", "none.png", "--output", "out.safetensors", "--model", "none.gguf"), "none.png"),
        ("save_embeddings", ("--image", "none.png", "--output", "out.npy", "--model", "none.gguf"), "out.npy"),
        ("save_embeddings", ("--image", "none.png"), "--output"),
        ("run_inference", ("--embeddings", "none.safetensors", "--prompt", "What?"), "none.safetensors"),
        ("run_inference", ("--frob",), "--embeddings"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, arguments: tuple[str, ...], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_script(script, *arguments)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert run.stderr.startswith(f"{script}: ")
    assert told in run.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is installed")
def test_a_pt_file_without_torch_is_refused_in_one_line(photo: Path, tmp_path: Path) -> None:
    target = tmp_path / "look.pt"
    run = run_script("save_embeddings", "--image", photo, "--output", target, "--model", "none.gguf")
    assert (run.returncode, run.stderr.count("\n"), target.exists()) == (2, 1, False)
    assert "torch" in run.stderr


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
def test_a_pt_file_answers_as_the_safetensors_file_does(
    tiny_pair: tuple[Path, Path], photo: Path, saved: Path, tmp_path: Path
) -> None:
    target = tmp_path / "look.pt"
    run_script("save_embeddings", "--image", photo, "--text", "A photo.", "--output", target, "--model", tiny_pair[0])
    runs = [
        run_script("run_inference", "--embeddings", path, "--prompt", "What?", "--model", tiny_pair[0], *FAST)
        for path in (target, saved)
    ]
    assert runs[0].stdout == runs[1].stdout != ""


# A python that records what it is asked to install, and fails where a file says so.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
    *pip\\ install*) echo "$*" >>installs; echo "a line of pip"; test ! -e broken ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with setup.sh, and a .venv whose python is a fake."""
    folder = tmp_path / "checkout"
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / "setup.sh").write_bytes((SCRIPTS / "setup.sh").read_bytes())
    (folder / "pyproject.toml").write_text("[project]\n")
    python = folder / ".venv" / "bin" / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    return folder


def set_up(checkout: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = ["bash", "-c", '. ./setup.sh && setup "$@"', "setup", *arguments]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False, timeout=60)


def installs(checkout: Path) -> list[str]:
    path = checkout / "installs"
    return [line.split()[-1] for line in path.read_text().splitlines()] if path.exists() else []


def test_set_up_installs_once_and_again_when_pyproject_changes(checkout: Path) -> None:
    assert [set_up(checkout).returncode for _ in range(2)] == [0, 0]
    assert installs(checkout) == ["."]
    assert [set_up(checkout, "dev").returncode for _ in range(2)] == [0, 0]
    assert installs(checkout) == [".", ".[dev]"]
    assert set_up(checkout).stdout == ""
    (checkout / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    assert set_up(checkout, "dev").returncode == 0
    assert set_up(checkout).returncode == 0
    assert installs(checkout) == [".", ".[dev]", ".[dev]"]


def test_a_failed_installation_is_shown_and_tried_again(checkout: Path) -> None:
    (checkout / "broken").touch()
    failed = set_up(checkout)
    assert failed.returncode != 0
    assert "a line of pip" in failed.stderr
    (checkout / "broken").unlink()
    assert set_up(checkout).returncode == 0
    assert installs(checkout) == [".", "."]


def test_without_a_python_that_is_new_enough_one_line_says_so(checkout: Path, tmp_path: Path) -> None:
    (checkout / ".venv" / "bin" / "python").unlink()
    tools = tmp_path / "tools"
    tools.mkdir()
    old = tools / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    command = ["/bin/bash", "-c", ". ./setup.sh && setup"]
    run = subprocess.run(
        command, cwd=checkout, env={"PATH": str(tools)}, capture_output=True, text=True, check=False, timeout=60
    )
    assert run.returncode != 0
    assert run.stderr.count("\n") == 1
    assert "Python 3.10" in run.stderr


@pytest.mark.parametrize("script", ["demo.sh", "test.sh", "setup.sh"])
def test_the_shell_scripts_parse_and_name_no_place_outside_the_repository(script: str) -> None:
    text = (SCRIPTS / script).read_text()
    assert subprocess.run(["bash", "-n", str(SCRIPTS / script)], check=False).returncode == 0
    assert "://" not in text
    assert os.environ.get("HOME", "/root") not in text


def test_the_help_says_that_a_model_has_a_name() -> None:
    assert "a card's name" in make_parser("x", "y").format_help()
