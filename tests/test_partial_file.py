"""Partial files: what they may delete, and what they may not replace."""

import errno
import fcntl
import hashlib
from pathlib import Path

import pytest

from lookonce.errors import DownloadError
from lookonce.partial_file import PartialFile

CONTENT = b"the whole"


def nothing(_: int) -> None:
    pass


@pytest.fixture
def part(tmp_path: Path) -> PartialFile:
    return part_of(tmp_path)


def part_of(folder: Path) -> PartialFile:
    return PartialFile(folder / "model.gguf", hashlib.sha256(CONTENT).hexdigest(), nothing)


def test_a_finished_file_has_the_targets_name_alone(part: PartialFile) -> None:
    with part:
        part.path.write_bytes(CONTENT)
        part.finish()
    assert list(part.target.parent.iterdir()) == [part.target]
    assert (part.target.read_bytes(), part.target.stat().st_nlink) == (CONTENT, 1)


@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_that_has_the_name_by_then_is_not_replaced(
    part: PartialFile, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    if not has_links:
        monkeypatch.setattr(Path, "hardlink_to", refuse_links)
    with part:
        part.path.write_bytes(CONTENT)
        part.target.write_text("mine")
        with pytest.raises(FileExistsError):
            part.finish()
    assert part.target.read_text() == "mine"
    assert part.path.read_bytes() == CONTENT


def test_a_file_system_without_links_serves_too(part: PartialFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "hardlink_to", refuse_links)  # as FAT does
    test_a_finished_file_has_the_targets_name_alone(part)


def refuse_links(*_: object) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


def test_what_another_began_after_a_discard_is_not_deleted(part: PartialFile) -> None:
    with part:
        part.path.write_bytes(b"wrong")
        part.discard()
        other = part_of(part.target.parent).__enter__()
    assert other.path.exists()
    other.path.write_bytes(CONTENT)
    other.finish()
    other.__exit__(None, None, None)
    assert other.target.read_bytes() == CONTENT


def test_an_empty_one_is_not_left_behind(part: PartialFile) -> None:
    with part:
        assert part.path.exists()
    assert not part.path.exists()


def test_a_second_name_of_a_finished_file_is_not_written_to(part: PartialFile) -> None:
    part.target.write_bytes(CONTENT)
    part.path.hardlink_to(part.target)  # as after a kill between the two steps of finishing
    with part:
        assert part.size_bytes == 0
        part.path.write_bytes(b"other")
    assert part.target.read_bytes() == CONTENT


def test_a_folder_that_takes_no_locks_is_refused_by_name(part: PartialFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:  # as a network file system without its lock service
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(DownloadError, match=r"takes no locks \(No locks available\).* --to") as caught:
        part.__enter__()
    assert str(part.target.parent) in str(caught.value)
    assert part._file.closed


def test_only_the_file_that_was_hashed_is_at_a_place(part: PartialFile) -> None:
    with part:
        part.path.write_bytes(CONTENT)
        assert not part.is_at(part.path)
        assert part.fingerprint(nothing) == hashlib.sha256(CONTENT).hexdigest()
        part.finish()
    assert part.is_at(part.target)
    copy = part.target.with_name("copy")
    copy.write_bytes(CONTENT)
    assert not part.is_at(copy)
    part.target.write_bytes(CONTENT + b"x")
    assert not part.is_at(part.target)
