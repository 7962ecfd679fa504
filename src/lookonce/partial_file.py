"""A file that is being fetched, and is no file of that name before its content is known to be right.

Beside `model.gguf` the bytes that have come lie in `.model.gguf.HASH.incomplete`, where HASH begins the SHA-256 that
the whole must have: what another version of the file left behind is never gone on with. Only one process at a time
writes there. Knows nothing of hubs.
"""

import errno
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
from lookonce.errors import DownloadError

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
        self._hashed: os.stat_result | None = None
        self._is_gone = False

    def __enter__(self) -> Self:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        while not self._open_alone():
            self._waiting(self.size_bytes)
            time.sleep(_WAIT_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # One that another process has begun since is not this one's to delete.
        if not self._is_gone and not self.size_bytes:
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
            self._hashed = os.fstat(file.fileno())
            while block := file.read(_BLOCK):
                digest.update(block)
                report(file.tell())
        return digest.hexdigest()

    def is_at(self, path: Path) -> bool:
        """Whether a file is the one that `fingerprint` has read, unchanged since."""
        if self._hashed is None:
            return False
        now, then = path.stat(), self._hashed
        return os.path.samestat(now, then) and (now.st_size, now.st_mtime_ns) == (then.st_size, then.st_mtime_ns)

    def finish(self) -> None:
        """Make it the target, on the disk when this returns. Raises FileExistsError where there is one by now."""
        os.fsync(self._file.fileno())
        if sys.platform == "win32":  # where an open file cannot be renamed, and none is renamed over another
            self._file.close()
            self.path.rename(self.target)
        else:
            self._link()
        self._is_gone = True
        sync_folder(self.target.parent)

    def discard(self) -> None:
        """Delete it."""
        self.path.unlink(missing_ok=True)
        self._is_gone = True

    def _link(self) -> None:
        """Give it the target's name, as a rename does, but not in place of another file."""
        try:
            self.target.hardlink_to(self.path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            if self.target.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.target)) from None
            self.path.rename(self.target)
        else:
            self.path.unlink()

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
        except OSError as error:  # as some network file systems
            self._file.close()
            raise DownloadError(
                f"{self.path.parent} takes no locks ({error.strerror}), which keep two pulls apart: "
                "give a folder on another disk with --to"
            ) from error
        # The other process may have finished or deleted it between the opening and the locking.
        opened = os.fstat(self._file.fileno())
        try:
            is_there = os.path.samestat(opened, self.path.stat())
        except FileNotFoundError:
            is_there = False
        if is_there and opened.st_nlink > 1:  # whoever finished it was killed before it had only the target's name
            self.path.unlink()
            is_there = False
        if not is_there:
            self._file.close()
        return is_there
