"""What the hubs that models are fetched from have in common.

Knows nothing of cards, of partial files and of either hub's client.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from lookonce.errors import DownloadError

__all__ = ["Hub", "HubFile", "HubUnavailable", "Source", "muted", "refusal"]

Source = Literal["huggingface", "modelscope"]


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


@contextmanager
def muted(*loggers: str) -> Iterator[None]:
    """Keep a client's own log off the terminal: what matters of it comes back as an error."""
    levels = [(logger, logger.level) for logger in map(logging.getLogger, loggers)]
    for logger, _ in levels:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)
