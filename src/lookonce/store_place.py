"""Where a store is, and how large it may be: what is given, else the environment, else the user's cache and 20 GiB.

Knows nothing of what a store holds.
"""

import os
import stat
from contextlib import suppress
from pathlib import Path

import platformdirs

from lookonce.byte_size import parse_size
from lookonce.errors import InputError, StoreError

__all__ = ["DEFAULT_LIMIT_BYTES", "folder_of", "limit_of"]

DEFAULT_LIMIT_BYTES = 20 << 30


def folder_of(given: str | os.PathLike[str] | None) -> Path:
    """The folder, else that of `LOOKONCE_STORE`, else one in the user's cache directory; it need not be there yet.

    Raises InputError for what is no path, and StoreError for one that is no folder or cannot be one.
    """
    named = (
        given or os.environ.get("LOOKONCE_STORE") or platformdirs.user_cache_path("lookonce", appauthor=False) / "store"
    )
    try:
        path = Path(named).expanduser()
        with suppress(FileNotFoundError):
            if not stat.S_ISDIR(path.stat().st_mode):
                raise StoreError(f"the store {path} is not a folder: give another")
    except TypeError as error:
        raise InputError(f"the store is {named!r}: give the path of a folder") from error
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a NUL, a home folder that nobody has
        reason = error.strerror if isinstance(error, OSError) else error
        raise StoreError(f"the store {os.fspath(named)!r} cannot be used ({reason}): give another folder") from error
    return path


def limit_of(limit_bytes: int | None) -> int:
    """The limit, else that of `LOOKONCE_STORE_LIMIT` (5GB, say), else 20 GiB. Raises InputError."""
    if limit_bytes is None:
        named = os.environ.get("LOOKONCE_STORE_LIMIT")
        try:
            return parse_size(named) if named else DEFAULT_LIMIT_BYTES
        except InputError as error:
            raise InputError(f"LOOKONCE_STORE_LIMIT: {error}") from error
    if isinstance(limit_bytes, bool) or not isinstance(limit_bytes, int) or limit_bytes < 0:
        raise InputError(f"limit_bytes is {limit_bytes!r}: give a number of bytes, from 0 on")
    return limit_bytes
