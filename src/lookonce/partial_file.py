"""A file that is being fetched, and is no file of that name before its content is known to be right.

Beside `model.gguf` the bytes that have come lie in `.model.gguf.HASH.incomplete`, where HASH begins the SHA-256 that
the whole must have: what another version of the file left behind is never gone on with. Only one process at a time
writes there. Knows nothing of hubs.
"""

import hashlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final

from typing_extensions import Self

from lookonce.durable import sync_folder

__all__ = ["PartialFile"]

_BLOCK: Final = 1 << 22
_WAIT_S: Final = 0.2
_NAME_LIMIT: Final = 200  # file systems allow 255 bytes


class PartialFile:
    """What there is so far of the file that goes to `target`; to be used in a `with` block.

    Entering waits while another process has it, and tells `waiting` its size meanwhile. Leaving keeps what there is, to
    go on with, unless `finish` or `discard` was called. Raises OSError where the disk does not play its part.
    """

    def __init__(self, target: Path, sha256: str, waiting: Callable[[int], object]) -> None:
        self.target: Final = target
        self.path: Final = target.with_name(f".{target.name[-_NAME_LIMIT:]}.{sha256[:16]}.incomplete")
        self._waiting = waiting

    def __enter__(self) -> Self:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        while not self._open_alone():
            self._waiting(self.size_bytes)
            time.sleep(_WAIT_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.size_bytes:
            self.path.unlink(missing_ok=True)
        self._file.close()

    @property
    def size_bytes(self) -> int:
        """How many bytes there are; 0 where it is no more."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def clear(self) -> None:
        """Begin anew."""
        os.truncate(self.path, 0)

    def fingerprint(self, report: Callable[[int], object]) -> str:
        """Read the SHA-256 of what there is, and tell `report` how far it has come."""
        digest = hashlib.sha256()
        with self.path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                report(file.tell())
        return digest.hexdigest()

    def finish(self) -> None:
        """Make it the target, on the disk when this returns."""
        os.fsync(self._file.fileno())
        if sys.platform == "win32":  # where an open file cannot be renamed
            self._file.close()
        self.path.replace(self.target)
        sync_folder(self.target.parent)

    def discard(self) -> None:
        """Delete it."""
        self.path.unlink(missing_ok=True)

    def _open_alone(self) -> bool:
        self._file = self.path.open("ab")
        if sys.platform == "win32":
            return True
        import fcntl

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            return False
        # The other process may have finished or deleted it between the opening and the locking.
        try:
            is_there = os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except FileNotFoundError:
            is_there = False
        if not is_there:
            self._file.close()
        return is_there
