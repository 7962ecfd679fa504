"""Files that appear complete or not at all, and outlive a power cut.

Knows nothing about what the files hold.
"""

import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

__all__ = ["Data", "make_folder", "sync_folder", "write_durably", "write_temporary"]

Data: TypeAlias = bytes | memoryview


def write_durably(path: Path, *parts: Data) -> None:
    """Write `parts`, one after the other, beside `path` and rename them there; OSError leaves nothing behind."""
    temporary = write_temporary(path.parent, parts)
    try:
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_temporary(folder: Path, parts: Iterable[Data]) -> Path:
    """Write `parts` to a new file in `folder`, on the disk when this returns; OSError leaves no file."""
    path = folder / f".{os.getpid()}-{secrets.token_hex(8)}.tmp"
    # Not tempfile: its files are for the owner alone, where the umask should decide.
    file = path.open("xb")
    try:
        with file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def make_folder(folder: Path, *, root: Path) -> None:
    """Make `folder` and its parents down from `root`, each on the disk when this returns."""
    if folder.is_dir():
        return
    if folder != root:
        make_folder(folder.parent, root=root)
    folder.mkdir(parents=folder == root, exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Put renames within `folder` on the disk, where the system can (Windows cannot open folders)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
