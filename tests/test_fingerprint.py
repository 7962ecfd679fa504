"""Fingerprints: right, and read once."""

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import gguf_maker as maker
from gguf_maker import Q, T
from lookonce import fingerprint, gguf_file
from lookonce.errors import ModelFileError
from lookonce.fingerprint import Fingerprint, fingerprint_of, hash_files, known_fingerprint, remember_fingerprint
from lookonce.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store") as store:
        yield store


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file that was changed long ago."""
    path = tmp_path / "a.gguf"
    path.write_bytes(os.urandom(1000) * 9000)
    os.utime(path, (1e9, 1e9))
    return path


def sha256(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def bytes_read() -> int:
    """What this process has read through system calls so far, from the disk or the page cache."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def test_a_fingerprint_is_the_sha256_of_the_content(file: Path, store: Store) -> None:
    assert fingerprint_of(file, store) == hash_files([file]) == sha256(file)
    with pytest.raises(ModelFileError, match="cannot be read"):
        fingerprint_of(file.with_name("none.gguf"), store)
    with pytest.raises(ModelFileError, match="does not exist"):
        hash_files([file.with_name("none.gguf")])


def test_that_of_a_split_model_is_of_all_parts_in_order(tmp_path: Path, store: Store) -> None:
    paths = [tmp_path / f"m-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    for i, path in enumerate(paths):
        keys = {"split.no": (T.UINT16, i), "split.count": (T.UINT16, 3), "split.tensors.count": (T.INT32, 3)}
        maker.write(path, keys, {f"t{i}": ((8,), Q.F32)})
        os.utime(path, (1e9, 1e9))
    gguf = gguf_file.read(paths[0])
    assert fingerprint_of(gguf, store) == sha256(*paths)
    assert fingerprint_of(paths[0], store) == sha256(paths[0])
    paths[2].write_bytes(paths[2].read_bytes() + b"x")
    assert known_fingerprint(gguf_file.read(paths[0]), store) is None
    with pytest.raises(ModelFileError, match="was changed while the model was loaded"):
        known_fingerprint(gguf, store)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts what a process reads")
def test_an_unchanged_file_is_read_once(file: Path, store: Store) -> None:
    assert known_fingerprint(file, store) is None
    first = fingerprint_of(file, store)
    with Store(store.folder) as later:
        before = bytes_read()
        assert fingerprint_of(file, later) == first
        assert bytes_read() - before < 100_000 < file.stat().st_size


@pytest.mark.parametrize("change", ["content", "size", "inode", "path", "mtime"])
def test_a_changed_file_is_read_again(file: Path, store: Store, change: str) -> None:
    fingerprint_of(file, store)
    content = file.read_bytes()
    if change == "content":
        file.write_bytes(b"x" + content[1:])
    elif change == "size":
        file.write_bytes(content + b"x")
    elif change == "inode":
        copy = file.with_name("copy")
        copy.write_bytes(content)
        copy.replace(file)
    elif change == "path":
        file = file.rename(file.with_name("b.gguf"))
    if change != "mtime":
        os.utime(file, (1e9, 1e9))
    else:
        os.utime(file, (1e9, 1e9 + 1))
    assert known_fingerprint(file, store) is None
    assert fingerprint_of(file, store) == sha256(file)


def test_a_file_of_this_moment_is_not_remembered(file: Path, store: Store) -> None:
    now = int(time.time()) + 1  # as a clock of whole seconds has it
    os.utime(file, (now, now))
    fingerprint_of(file, store)
    assert known_fingerprint(file, store) is None


def test_a_file_that_changes_while_it_is_read_is_refused(
    file: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hash_and_change(paths: tuple[Path, ...]) -> str:
        found = hash_files(paths)
        file.write_bytes(b"other")
        return found

    monkeypatch.setattr(fingerprint, "hash_files", hash_and_change)
    with pytest.raises(ModelFileError, match="was changed while the model was loaded"):
        fingerprint_of(file, store)
    monkeypatch.undo()
    assert fingerprint_of(file, store) == sha256(file)


def test_what_was_verified_elsewhere_is_taken(file: Path, store: Store) -> None:
    remember_fingerprint(file, "ab" * 32, store)
    assert fingerprint_of(file, store) == "ab" * 32


def test_without_a_store_the_users_own_is_read_and_not_written(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    monkeypatch.setenv("LOOKONCE_STORE", str(own))
    assert fingerprint_of(file, None) == sha256(file)
    assert not own.exists()
    with Store() as store:
        remember_fingerprint(file, "cd" * 32, store)
    assert fingerprint_of(file, None) == "cd" * 32
    monkeypatch.setenv("LOOKONCE_STORE", str(file))
    assert fingerprint_of(file, None) == sha256(file)


def test_a_note_of_another_form_is_no_fingerprint(file: Path, store: Store) -> None:
    store.remember("fingerprint", fingerprint.identity([file]), "nonsense")
    assert fingerprint_of(file, store) == sha256(file)


def test_a_file_replaced_after_its_header_was_read_has_no_fingerprint(tmp_path: Path, store: Store) -> None:
    path = maker.write(tmp_path / "m.gguf", {}, {"t": ((8,), Q.F32)})
    gguf = gguf_file.read(path)
    path.with_name("other").write_bytes(path.read_bytes())
    path.with_name("other").replace(path)
    for ask in (Fingerprint(gguf, store).value, Fingerprint(gguf, store).check_unchanged):
        with pytest.raises(ModelFileError, match="was changed while the model was loaded"):
            ask()
    assert Fingerprint(gguf_file.read(path), store).value() == sha256(path)


def test_what_is_remembered_is_read_anew_on_demand(file: Path, store: Store) -> None:
    remember_fingerprint(file, "ab" * 32, store)
    assert Fingerprint(file, store).value() == "ab" * 32
    assert Fingerprint(file, store).read() == sha256(file)
    assert known_fingerprint(file, store) == sha256(file)


def test_an_old_time_that_was_given_to_a_new_content_does_not_hide_its_age(
    file: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(fingerprint.time, "sleep", waited.append)
    os.utime(file, (1e9, 1e9 + 0.5))  # as cp -p and rsync -t leave a file that they have written just now
    remember_fingerprint(file, sha256(file), store)
    assert len(waited) == 1
    assert 0 < waited[0] <= 0.1


def test_a_change_behind_the_reading_is_not_noted(file: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def hash_and_wait(paths: tuple[Path, ...]) -> str:
        found = hash_files(paths)
        time.sleep(0.4)  # as a large file takes
        return found

    monkeypatch.setattr(fingerprint, "hash_files", hash_and_wait)
    now = time.time() + 0.15  # of the moment still when the reading begins
    os.utime(file, (now, now))
    fingerprint_of(file, store)
    assert known_fingerprint(file, store) is None
