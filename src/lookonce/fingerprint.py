"""Fingerprints of files: the SHA-256 of their content, computed once and remembered while the file is unchanged.

A file counts as unchanged by its path, size, times and inode. What is known of it is noted in the store in use. Without
one the user's own is read, and nothing is written.

Not seen is a writer that has the file mapped into its memory: the times tell its first change to a page, and of the
next ones only those after the system has written that page to the disk. Nor is a change on a disk whose times lie.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lookonce.errors import InputError, ModelFileError, StoreError
from lookonce.gguf_cursor import open_file
from lookonce.gguf_file import GgufFile
from lookonce.sha256_form import is_sha256
from lookonce.store import Store

__all__ = [
    "Fingerprint",
    "fingerprint_of",
    "hash_files",
    "identity",
    "known_fingerprint",
    "recall",
    "remember_fingerprint",
]

_KIND: Final = "fingerprint"
# A file changed this lately could change again within its clock's resolution; clocks that tell no fractions are coarse.
_SETTLED_S: Final = 0.1
_SETTLED_COARSE_S: Final = 2.0


class Fingerprint:
    """The fingerprint of a file as it was when its header was read, or of another as it is when this is made.

    That of a split model is of its parts in order.
    """

    def __init__(self, file: GgufFile | Path, store: Store | None) -> None:
        self._paths = _paths(file)
        self.path = self._paths[0]
        self._store = store
        self._value: str | None = None
        self._statuses = file.statuses if isinstance(file, GgufFile) else _statuses(self._paths)
        self._identity = _identity(self._paths, self._statuses)

    def known(self) -> str | None:
        """The fingerprint where it takes no reading of the file. Raises what `value` raises."""
        self.check_unchanged()
        if self._value is None:
            found = recall(_KIND, self._identity, self._store)
            self._value = found if is_sha256(found) else None
        return self._value

    def value(self) -> str:
        """SHA-256 of the content in hexadecimal; the first time it takes a second for each gigabyte or two.

        Raises ModelFileError where the file cannot be read, or is no longer the one that it was.
        """
        known = self.known()
        return self.read() if known is None else known

    def read(self) -> str:
        """What `value` gives, from the content as it is, whatever is remembered of it."""
        settled = _settle(self._statuses)  # before the reading: a change behind its back has another time
        self.check_unchanged()
        found = hash_files(self._paths)
        self.check_unchanged()
        if settled and self._store is not None:
            self._store.remember(_KIND, self._identity, found)
        self._value = found
        return found

    def check_unchanged(self) -> None:
        """Raise ModelFileError where the file is no longer the one that it was."""
        if self._identity != identity(self._paths):
            raise ModelFileError(f"{self.path} was changed while the model was loaded: load the model again")


def fingerprint_of(file: GgufFile | Path, store: Store | None) -> str:
    """What `Fingerprint.value` gives for a file as it is now."""
    return Fingerprint(file, store).value()


def known_fingerprint(file: GgufFile | Path, store: Store | None) -> str | None:
    """What `Fingerprint.known` gives for a file as it is now."""
    return Fingerprint(file, store).known()


def remember_fingerprint(file: GgufFile | Path, sha256: str, store: Store) -> None:
    """Note what a file's content hashes to, as whoever has just verified it knows; not of one changed just now."""
    paths = _paths(file)
    statuses = _statuses(paths)
    if _settle(statuses):
        store.remember(_KIND, _identity(paths, statuses), sha256)


def identity(paths: Sequence[Path]) -> str:
    """What stays the same while files are unchanged. Raises ModelFileError for one that cannot be read."""
    return _identity(paths, _statuses(paths))


def _statuses(paths: Sequence[Path]) -> tuple[os.stat_result, ...]:
    try:
        return tuple(path.stat() for path in paths)
    except OSError as error:
        raise ModelFileError(
            f"{error.filename} cannot be read ({error.strerror}): put it back, or load the model again"
        ) from error


def _identity(paths: Sequence[Path], statuses: Sequence[os.stat_result]) -> str:
    parts: list[object] = []
    for path, status in zip(paths, statuses, strict=True):
        parts += [path.resolve(), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    return hashlib.sha256(json.dumps(["file", *map(str, parts)]).encode()).hexdigest()


def _settle(statuses: Sequence[os.stat_result]) -> bool:
    """Whether a change from now on would show in the files' times; waits a moment where that is all it takes."""
    # Tools that copy a file give it the old time of its content, and none can set that of its last change of any kind.
    last_ns = max(max(one.st_mtime_ns, one.st_ctime_ns) for one in statuses)
    limit_s = _SETTLED_COARSE_S if last_ns % 1_000_000_000 == 0 else _SETTLED_S
    left_s = limit_s - (time.time() - last_ns / 1e9)
    if 0 < left_s <= _SETTLED_S:
        time.sleep(left_s)
        return True
    return left_s <= 0


def hash_files(paths: Sequence[Path]) -> str:
    """SHA-256 of files' content, one after the other. Raises ModelFileError for one that cannot be read."""
    digest = hashlib.sha256()
    for path in paths:
        with open_file(path) as file:
            try:
                while piece := file.read(8 << 20):
                    digest.update(piece)
            except OSError as error:
                raise ModelFileError(f"{path} cannot be read ({error}): check the disk") from error
    return digest.hexdigest()


def recall(kind: str, digest: str, store: Store | None) -> str | None:
    """What was noted of files, in the store in use or in the user's own."""
    if store is not None:
        return store.recall(kind, digest)
    try:
        with Store() as own:
            return own.recall(kind, digest)
    except (StoreError, InputError):  # it cannot be used, or LOOKONCE_STORE_LIMIT is no size: nobody asked for it
        return None


def _paths(file: GgufFile | Path) -> tuple[Path, ...]:
    return file.parts if isinstance(file, GgufFile) else (file,)
