"""Where the files of cards are found."""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import try_to_load_from_cache

from lookonce.cards import CardFile, ModelCard
from lookonce.errors import ModelFileError
from lookonce.model_folders import find_named, folder_problem, folders, locate, published_name, user_folder

FILE = CardFile("tiny.gguf", 4)
CARD = ModelCard("tiny", "qwen3vl", "MIT", {"F32": FILE}, {}, "me/Tiny.GGUF", "us/Tiny.GGUF")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with nothing in it, and a folder of models."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "MODELSCOPE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOOKONCE_MODELS_DIR", str(tmp_path / "models"))
    return tmp_path


def put(path: Path, content: bytes = b"GGUF") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "place",
    [
        "models/tiny.gguf",
        "models/tiny/tiny.gguf",
        "models/anything/tiny.gguf",
        "models/me/Tiny.GGUF/tiny.gguf",
        "models/me_Tiny.GGUF_tiny.gguf",
        "models/us_Tiny.GGUF_tiny.gguf",
        ".local/share/lookonce/models/tiny.gguf",
        ".cache/huggingface/hub/models--me--Tiny.GGUF/snapshots/abc/tiny.gguf",
        ".cache/modelscope/models/us--Tiny.GGUF/snapshots/master/tiny.gguf",
        ".cache/modelscope/models/us/Tiny___GGUF/tiny.gguf",
        ".cache/modelscope/hub/models/us/Tiny___GGUF/tiny.gguf",
        ".cache/modelscope/hub/us/Tiny.GGUF/tiny.gguf",
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="the user's folders have other names")
def test_a_cards_file_is_found_wherever_tools_put_it(home: Path, place: str) -> None:
    assert locate(CARD, FILE) is None
    put(home / place)
    assert locate(CARD, FILE) == home / place


def test_a_repositorys_file_of_another_name_or_repository_is_not_taken(home: Path) -> None:
    put(home / "models" / "other.gguf")
    put(home / "models" / "you_Tiny.GGUF_tiny.gguf")
    put(home / ".cache/huggingface/hub/models--you--Tiny.GGUF/snapshots/abc/tiny.gguf")
    assert locate(CARD, FILE) is None


def test_a_file_of_another_size_is_passed_over_with_a_warning(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    cut = put(home / "models" / "tiny.gguf", b"GG")
    with caplog.at_level(logging.WARNING, "lookonce.model_folders"):
        assert locate(CARD, FILE) is None
    assert f"{cut} has 2 bytes where the card tiny says 4" in caplog.text
    whole = put(home / "models" / "deep" / "tiny.gguf")
    assert locate(CARD, FILE) == whole
    assert locate(CARD, FILE, any_size=True) == whole
    whole.unlink()
    assert locate(CARD, FILE, any_size=True) == cut
    assert locate(CARD, CardFile("tiny.gguf")) == cut


def test_the_snapshot_of_the_cards_revision_is_taken_as_the_hubs_own_library_does(home: Path) -> None:
    cache = home / ".cache/huggingface/hub"
    for commit in ("aaa", "bbb", "ccc"):
        put(cache / f"models--me--Tiny.GGUF/snapshots/{commit}/tiny.gguf")
    put(cache / "models--me--Tiny.GGUF/refs/main", b"bbb")
    found = locate(CARD, FILE)
    assert str(found) == try_to_load_from_cache("me/Tiny.GGUF", "tiny.gguf", cache_dir=cache)
    assert found is not None
    assert found.parent.name == "bbb"


def test_of_a_revision_that_the_card_names_only_its_own_snapshot_is_taken(home: Path) -> None:
    card = replace(CARD, revision="v2")
    cache = home / ".cache/huggingface/hub/models--me--Tiny.GGUF"
    put(cache / "snapshots/aaa/tiny.gguf")
    put(cache / "refs/main", b"aaa")
    assert locate(CARD, FILE) == cache / "snapshots/aaa/tiny.gguf"
    assert locate(card, FILE) is None
    put(cache / "refs/v2", b"bbb")
    assert locate(card, FILE) is None
    assert locate(card, FILE) != put(cache / "snapshots/ccc/tiny.gguf")
    assert put(cache / "snapshots/bbb/tiny.gguf") == locate(card, FILE)


@pytest.mark.parametrize(
    "given",
    [
        {"HF_HOME": "{home}/one"},
        {"HF_HUB_CACHE": "{home}/two", "HF_HOME": "{home}/one"},
        {"HUGGINGFACE_HUB_CACHE": "{home}/three"},
        {"XDG_CACHE_HOME": "{home}/four"},
        {"HF_HOME": "$HOME/five"},
        {"HF_HUB_CACHE": "~/six"},
    ],
)
def test_hugging_faces_cache_is_where_its_library_says(
    home: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str]
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value.format(home=home))
    code = "import json; from huggingface_hub import constants; print(json.dumps(constants.HF_HUB_CACHE))"
    cache = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
    file = put(Path(cache) / "models--me--Tiny.GGUF/snapshots/abc/tiny.gguf")
    assert locate(CARD, FILE) == file


def test_modelscopes_cache_may_be_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_CACHE", str(home / "ms"))
    assert locate(CARD, FILE) is None
    file = put(home / "ms/models/us--Tiny.GGUF/snapshots/v1/tiny.gguf")
    assert locate(CARD, FILE) == file
    shutil.rmtree(home / "ms")
    assert locate(CARD, FILE) is None
    put(home / "ms/us/Tiny.GGUF/tiny.gguf")
    assert locate(CARD, FILE) == home / "ms/us/Tiny.GGUF/tiny.gguf"


def test_a_card_with_a_folder_has_its_files_there_and_nowhere_else(home: Path) -> None:
    card = ModelCard("tiny", "qwen3vl", "MIT", {"F32": FILE}, {}, folder=home / "built")
    put(home / "models" / "tiny.gguf")
    assert locate(card, FILE) is None
    file = put(home / "built" / "tiny.gguf")
    assert locate(card, FILE) == file


def test_the_folders_are_searched_in_the_promised_order(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folders() == (home / "models", Path("/models"), user_folder())
    monkeypatch.delenv("LOOKONCE_MODELS_DIR")
    assert folders() == (Path("/models"), user_folder())
    monkeypatch.setenv("LOOKONCE_MODELS_DIR", "~/models")
    file = put(home / "models" / "any.gguf")
    assert find_named("any.gguf") == file
    assert find_named("none.gguf") is None


@pytest.mark.parametrize("place", ["any.gguf", "one/any.gguf", "owner/repository/any.gguf"])
def test_a_name_alone_is_found_up_to_two_folders_deeper(home: Path, place: str) -> None:
    assert find_named("any.gguf") is None
    file = put(home / "models" / place)
    assert find_named("any.gguf") == file
    assert find_named("*.gguf") is None
    assert find_named(file.parent.name) == (None if place == "any.gguf" else file.parent)


def test_a_name_that_lies_in_several_folders_is_refused_with_these(home: Path) -> None:
    files = [put(home / "models" / one / "mmproj-F16.gguf") for one in ("a", "b")]
    with pytest.raises(
        ModelFileError, match=rf"'mmproj-F16.gguf' is in several folders \({files[0]}, {files[1]}\): give"
    ):
        find_named("mmproj-F16.gguf")
    first = put(home / "models" / "mmproj-F16.gguf")
    assert find_named("mmproj-F16.gguf") == first


def test_a_named_folder_that_is_none_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = home / "models"
    assert folder_problem() == f"LOOKONCE_MODELS_DIR is '{named}', which does not exist"
    named.write_bytes(b"")
    assert folder_problem() == f"LOOKONCE_MODELS_DIR is '{named}', which is no folder"
    named.unlink()
    named.mkdir()
    assert folder_problem() == ""
    monkeypatch.delenv("LOOKONCE_MODELS_DIR")
    assert folder_problem() == ""


def test_what_cannot_be_read_is_no_place_to_find_anything(home: Path) -> None:
    put(home / "models" / "tiny.gguf").unlink()
    (home / "models" / "tiny.gguf").symlink_to(home / "models" / "tiny.gguf")
    (home / "models" / "tiny").mkdir()
    (home / "models" / "tiny" / "tiny.gguf").mkdir()
    assert locate(CARD, FILE) is None
    os.mkfifo(home / "models" / "me_Tiny.GGUF_tiny.gguf")
    assert locate(CARD, FILE) is None


def test_a_published_name_stands_alone_or_after_its_repository() -> None:
    assert published_name(CARD, FILE, "tiny.gguf")
    assert published_name(CARD, FILE, "me_Tiny.GGUF_tiny.gguf")
    assert not published_name(CARD, FILE, "you_Tiny.GGUF_tiny.gguf")
    assert not published_name(CARD, FILE, "mytiny.gguf")


def test_a_home_folder_that_nobody_has_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOKONCE_MODELS_DIR", "~nosuchuser/x")
    with pytest.raises(ModelFileError, match=r"LOOKONCE_MODELS_DIR is '~nosuchuser/x' \(.*\): set it to a folder"):
        folders()


HOMELESS = """
import os, sys
os.environ.pop("HOME", None) if sys.argv[1] == "none" else os.environ.update(HOME=sys.argv[1])
from lookonce.cards import CardFile, ModelCard  # imported while all may be read
from lookonce.model_files import find_files
from lookonce.model_folders import find_named, locate
os.setuid(54321)
card = ModelCard("tiny", "qwen3vl", "MIT", {"F32": CardFile("tiny.gguf")}, {}, "me/Tiny.GGUF", "us/Tiny.GGUF")
print(find_files(sys.argv[2]).text.path, find_named("x"), locate(card, CardFile("tiny.gguf")))
"""


@pytest.mark.skipif(sys.platform == "win32" or os.getuid() != 0, reason="needs another user")
@pytest.mark.parametrize("kind", ["none", "unreadable"])
def test_without_a_home_that_can_be_read_a_path_still_loads(tiny_pair: tuple[Path, Path], kind: str) -> None:
    with tempfile.TemporaryDirectory() as one:
        Path(one).chmod(0o755)
        text = Path(shutil.copy(tiny_pair[0], one))
        text.chmod(0o644)
        closed = Path(one) / "home"
        closed.mkdir(mode=0o700)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "LOOKONCE_"))}
        for name in ("HF_HOME", "MODELSCOPE_CACHE"):
            environment.pop(name)
        ended = subprocess.run(
            [sys.executable, "-c", HOMELESS, "none" if kind == "none" else closed, text],
            check=False,
            capture_output=True,
            env=environment,
            text=True,
        )
        assert ended.stdout.split() == [str(text), "None", "None"], ended.stderr
        assert "your own cards are not read: " in ended.stderr
