"""The fingerprint of a file: SHA-256 of its content, remembered in the store while the file is unchanged."""

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Final

from lookonce import gguf_file
from lookonce.errors import ModelFileError
from lookonce.store import Store

_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_SETTLED_S: Final = 2.0  # a file changed this lately could change again within the clock's resolution


class Fingerprint:
    """The fingerprint of the file that stands at `path` when this is made."""

    def __init__(self, path: Path, store: Store | None) -> None:
        self.path = path
        self._store = store
        self._value: str | None = None
        self._identity = _identity(path)

    def known(self) -> str | None:
        """The fingerprint where it takes no reading of the file. Raises what `value` raises."""
        self.check_unchanged()
        if self._value is None and self._store is not None:
            found = self._store.recall("fingerprint", self._identity)
            if found is not None and _SHA256.fullmatch(found):
                self._value = found
        return self._value

    def value(self) -> str:
        """The fingerprint; the first time it takes a second for each gigabyte or two.

        Raises ModelFileError where the file is no longer the one that it was.
        """
        if (known := self.known()) is not None:
            return known
        found = gguf_file.fingerprint(self.path)
        self.check_unchanged()
        if self._store is not None and time.time() - self.path.stat().st_mtime > _SETTLED_S:
            self._store.remember("fingerprint", self._identity, found)
        self._value = found
        return found

    def check_unchanged(self) -> None:
        """Raise ModelFileError where the file is no longer the one that it was."""
        if self._identity != _identity(self.path):
            raise ModelFileError(f"{self.path} was changed while the model was loaded: load the model again")


def _identity(path: Path) -> str:
    """What tells a file from another without reading it; the same digest as the projector's."""
    try:
        status = path.stat()
    except OSError as error:
        raise ModelFileError(
            f"{path} cannot be read ({error.strerror}): put it back, or load the model again"
        ) from error
    marks = (path.resolve(), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return hashlib.sha256(json.dumps(["file", *map(str, marks)]).encode()).hexdigest()
