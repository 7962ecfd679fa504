"""What hubs published, kept apart by hub, repository, revision and file."""

from dataclasses import replace
from pathlib import Path

import pytest

from lookonce.cards import CardFile, ModelCard
from lookonce.published import complete, recall, remember

FILE = CardFile("tiny.gguf")
KNOWN = CardFile("tiny.gguf", 4, "ab" * 32)
CARD = ModelCard("tiny", "qwen3vl", "MIT", {"F32": FILE}, {}, "me/Tiny", "me/Tiny")


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return tmp_path


def test_what_was_published_completes_a_card() -> None:
    assert complete(CARD, FILE) == FILE
    remember("me/Tiny", KNOWN)
    assert complete(CARD, FILE) == KNOWN
    own = CardFile("tiny.gguf", 5, "cd" * 32)
    assert complete(CARD, own) == own
    assert complete(CARD, CardFile("tiny.gguf", 5)) == CardFile("tiny.gguf", 5)


def test_names_that_differ_in_their_slashes_alone_have_records_of_their_own() -> None:
    remember("a/b", CardFile("c/d.gguf", 4, "ab" * 32))
    assert recall("a/b", CardFile("c--d.gguf")) == CardFile("c--d.gguf")
    assert recall("a--b/c", CardFile("d.gguf")) == CardFile("d.gguf")
    assert recall("a/b", CardFile("c/d.gguf")).sha256 == "ab" * 32


def test_the_two_hubs_have_records_of_their_own() -> None:
    theirs = CardFile("tiny.gguf", 5, "cd" * 32)
    remember("me/Tiny", theirs, revision="master", source="modelscope")
    assert recall("me/Tiny", FILE, revision="master") == FILE
    assert complete(CARD, FILE) == theirs
    remember("me/Tiny", KNOWN)
    assert complete(CARD, FILE) == KNOWN
    assert complete(replace(CARD, huggingface=None), FILE) == theirs


def test_each_revision_has_a_record_of_its_own() -> None:
    remember("me/Tiny", KNOWN)
    assert complete(replace(CARD, revision="v2"), FILE) == FILE
    second = CardFile("tiny.gguf", 6, "ef" * 32)
    remember("me/Tiny", second, revision="v2")
    assert complete(replace(CARD, revision="v2"), FILE) == second
    assert complete(CARD, FILE) == KNOWN


def test_without_a_home_folder_nothing_is_known_and_nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 54321)  # of whom the system knows no home
    assert recall("me/Tiny", FILE) == FILE
    assert complete(CARD, FILE) == FILE
    with pytest.raises(OSError, match="home directory"):
        remember("me/Tiny", KNOWN)


@pytest.mark.parametrize("damage", ["", "[1]", '{"size_bytes": 4}', '{"size_bytes": 4, "sha256": "../x"}'])
def test_a_record_that_is_torn_or_of_another_form_is_none(data: Path, damage: str) -> None:
    remember("me/Tiny", KNOWN)
    (record,) = data.rglob("*.json")
    record.write_text(damage)
    assert complete(CARD, FILE) == FILE
