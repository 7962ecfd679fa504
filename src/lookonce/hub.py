"""What the hubs that models are fetched from have in common.

Knows nothing of cards and of either hub's client.
"""

import io
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeVar

from lookonce.errors import DownloadError

__all__ = [
    "TITLES",
    "Hub",
    "HubFile",
    "HubUnavailable",
    "PartWriter",
    "Source",
    "first_line",
    "held",
    "is_final",
    "muted",
    "refusal",
]

_Value = TypeVar("_Value")

Source = Literal["huggingface", "modelscope"]

TITLES: Final[Mapping[Source, str]] = {"huggingface": "Hugging Face", "modelscope": "ModelScope"}
_PASSING: Final = (408, 425, 429)  # answers that change by themselves, as those from 500 on do


class HubUnavailable(Exception):  # noqa: N818  no failure of its own: there may be another hub
    """A hub cannot be reached, or does not answer as one; the message says how it showed."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file as a hub describes it.

    `revision` is what pins its content, `label` the hub's own name for that content; `size_bytes` and `sha256` are what
    the hub publishes.
    """

    repository: str
    name: str
    revision: str
    label: str
    size_bytes: int | None
    sha256: str | None


class Hub(Protocol):
    """One hub, through its own client and with its own cache on the disk.

    `describe` and `fetch` raise `HubUnavailable`, or DownloadError where the hub is there and refuses.
    """

    source: Source
    title: str
    revision: str  # what is asked for: a branch or tag, which may move, or a commit

    def describe(self, repository: str, name: str) -> HubFile:
        """Ask the hub for one file's size and hash."""

    def fetch(self, file: HubFile, part: Path, size_bytes: int, report: Callable[[int], object]) -> None:
        """Add to `part`, which holds the file's first bytes, what it lacks; tell `report` its size as it grows.

        An error leaves in `part` what has come so far.
        """

    def place(self, file: HubFile) -> Path:
        """Say where in the cache the file's content belongs."""

    def publish(self, file: HubFile) -> Path:
        """Give the content that now lies there the name by which the hub's other tools find it."""


def refusal(hub: str, status: int | None, repository: str, name: str, token: str) -> DownloadError:
    """The error for a hub's answer that no other try would change."""
    if status in (401, 403):
        return DownloadError(
            f"{hub} refuses {repository} ({status}): accept its licence on its page where it asks for that, "
            f"and set {token} to a token that may read it"
        )
    if status == 404:
        return DownloadError(
            f"{hub} has no {name} in {repository} (404): give another --quant or --source, or correct the card"
        )
    return DownloadError(f"{hub} refuses {name} of {repository} ({status or 'no status'}): try another --source")


def is_final(status: int | None) -> bool:
    """Whether a hub's answer is one that no other try would change."""
    return status is not None and 400 <= status < 500 and status not in _PASSING


def first_line(error: object) -> str:
    """What an error says, in one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class PartWriter(io.FileIO):
    """A partial file, written at its end, that tells `report` its size.

    Raises DownloadError where the disk does not take it, and HubUnavailable for what goes beyond `size_bytes`: what a
    hub sends too much does not fill the disk.
    """

    def __init__(self, path: Path, size_bytes: int, report: Callable[[int], object]) -> None:
        super().__init__(path, "r+")
        self._path = path
        self._size_bytes = size_bytes
        self._report = report
        self.seek(0, io.SEEK_END)

    def write(self, data: Any) -> int:
        """Write all of `data` that belongs to the file."""
        rest = memoryview(data)[: max(self._size_bytes - self.tell(), 0)]
        is_too_much = len(rest) < len(data)
        try:
            while rest:
                rest = rest[super().write(rest) :]
        except OSError as error:
            raise DownloadError(
                f"{self._path.parent} takes no more ({error.strerror}): free some space and pull again, "
                "which goes on from here"
            ) from error
        self._report(self.tell())
        if is_too_much:
            raise HubUnavailable("it sends more than it published")
        return len(data)


@contextmanager
def muted(*loggers: str) -> Iterator[None]:
    """Keep a client's own log off the terminal: what matters of it comes back as an error."""
    with ExitStack() as stack:
        for logger in map(logging.getLogger, loggers):
            get = lambda logger=logger: logger.level  # noqa: E731
            stack.enter_context(held(f"level of {logger.name}", logging.CRITICAL + 1, get, logger.setLevel))
        yield


_lock: Final = threading.Lock()
_held: Final[dict[str, tuple[int, Any]]] = {}


@contextmanager
def held(what: str, value: _Value, get: Callable[[], _Value], set_: Callable[[_Value], object]) -> Iterator[None]:
    """Have a setting of a client be `value` while any thread is in here, and what it was before after the last."""
    with _lock:
        count, before = _held.get(what) or (0, get())
        _held[what] = count + 1, before
        set_(value)
    try:
        yield
    finally:
        with _lock:
            count, before = _held.pop(what)
            if count > 1:
                _held[what] = count - 1, before
            else:
                set_(before)
