"""Files that were saved for later: read with care, and told apart, so that one that is given for another is named.

Knows nothing of what is in them but how they begin, as `tensor_file` writes it.
"""

import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Final, Literal

from lookonce.errors import SavedLookError
from lookonce.tensor_file import MAX_HEADER_BYTES, unpack

__all__ = ["Saved", "read_saved", "recognise"]

Saved = Literal["saved look", "saved chat"]

_BEGINNINGS: Final[dict[Saved, bytes]] = {"saved look": b'"segments":', "saved chat": b'"kind":"chat"'}
_BEGINNING_BYTES: Final = 96  # what follows may be anyone's text
_USES: Final[dict[Saved, str]] = {
    "saved look": "which stands where a picture does, as in model.chat([path])",
    "saved chat": "which lookonce.Chat.load(model, path) goes on with",
}
_EXPECTED: Final[dict[Saved, str]] = {
    "saved look": "give a picture or a saved look",
    "saved chat": "give a file that chat.save wrote",
}


def recognise(data: bytes) -> Saved | None:
    """What a file is that begins with `data`, be the rest damaged; None for what was not saved here."""
    begin = data[:_BEGINNING_BYTES]
    return next((kind for kind, mark in _BEGINNINGS.items() if mark in begin), None)


def read_saved(path: Path, tensors: Collection[str] | None, what: Saved, *, safetensors: bool = True) -> bytes:
    """A file's bytes, if it is a `what`; another is refused before gigabytes of weights are read.

    tensors: the names of those that it holds; None for any.
    safetensors: False for another container, of which nothing is checked here.

    Raises SavedLookError where it cannot be read, and for what is something else.
    """
    try:
        # A named pipe without a writer would otherwise hold the process for ever.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            status = os.fstat(file.fileno())
            _check_regular(path, status, what)
            data = file.read(8 + MAX_HEADER_BYTES)
            _refuse_another(data, path.name, what)
            if safetensors:
                _check_header(data, tensors, path.name, what, size_bytes=status.st_size)
            return data + file.read()
    except SavedLookError:
        raise
    except FileNotFoundError:
        raise SavedLookError(f"{path} does not exist: check the path, or save one there first") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SavedLookError(f"{path} cannot be read ({reason}): check the path and its rights") from error


def _refuse_another(data: bytes, name: str, what: Saved) -> None:
    found = recognise(data)
    if found is not None and found != what:
        raise SavedLookError(f"{name} is a {found}, {_USES[found]}: {_EXPECTED[what]} here")


def _check_header(data: bytes, tensors: Collection[str] | None, name: str, what: Saved, *, size_bytes: int) -> None:
    certain = recognise(data) == what
    try:
        unpack(data, tensors, name=name, what=what, certain=certain, total_bytes=size_bytes)
    except SavedLookError as error:
        remedy = "save it again, or use another copy" if certain else _EXPECTED[what]
        raise SavedLookError(f"{error}: {remedy}") from error
    if tensors is None and not certain:  # with no names to tell it by, any file of weights has come so far
        raise SavedLookError(f"{name} is not a {what}: {_EXPECTED[what]}")


def _check_regular(path: Path, status: os.stat_result, what: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise SavedLookError(f"{path} is a device or a pipe: expected a {what}")
