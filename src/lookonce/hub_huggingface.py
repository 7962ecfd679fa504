"""Hugging Face, through huggingface_hub: its requests, its errors and its cache.

The client's own `hf_hub_download` begins anew after every interruption (from version 2 on; it throws its temporary file
away), so the parts that it is made of are used instead: the metadata, the transfer into a file of the caller's, and the
documented form of the cache. HF_TOKEN, HF_HOME, HF_HUB_CACHE and HF_ENDPOINT are the client's to read.
"""

import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from lookonce.errors import DownloadError, LookonceError
from lookonce.hub import HubFile, HubUnavailable, Source, muted, refusal
from lookonce.version import VERSION

__all__ = ["HuggingFace"]

_TITLE: Final = "Hugging Face"
_BLOCK: Final = 1 << 18
_PLAIN: Final = re.compile(r"[\w.-]*\w", re.ASCII)  # a name that stays in its folder
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_PASSING: Final = (408, 425, 429)  # answers that change by themselves, as those from 500 on do


class HuggingFace:
    """The hub that HF_ENDPOINT names, and the cache in HF_HUB_CACHE or HF_HOME."""

    source: Source = "huggingface"
    title: str = _TITLE

    def __init__(self, revision: str) -> None:
        self._revision = revision

    def describe(self, repository: str, name: str) -> HubFile:
        """Ask the hub for one file's size and hash."""
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

        with _translated(repository, name):
            found = get_hf_file_metadata(
                hf_hub_url(repository, name, revision=self._revision),
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
                library_name="lookonce",
                library_version=VERSION,
            )
        label, commit = found.etag or "", found.commit_hash or ""
        if not _PLAIN.fullmatch(label) or not _PLAIN.fullmatch(commit):
            raise HubUnavailable(f"{constants.ENDPOINT} does not answer as a hub does")
        sha256 = label if _SHA256.fullmatch(label) else None
        return HubFile(repository, name, commit, label, found.size, sha256)

    def fetch(self, file: HubFile, part: Path, size_bytes: int, report: Callable[[int], object]) -> None:
        """Add to `part` what it lacks of the file."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # it is documented there

        headers = build_hf_headers(library_name="lookonce", library_version=VERSION)
        no_bar: Any = _NoBar()
        with _translated(file.repository, file.name), _small_blocks(), _Part(part, report) as output:
            http_get(
                hf_hub_url(file.repository, file.name, revision=file.revision),
                output,
                resume_size=output.tell(),
                headers={**headers, "Accept-Encoding": "identity"},
                expected_size=size_bytes,
                displayed_filename=file.name,
                _tqdm_bar=no_bar,  # there is no other way that all versions of the client know
            )

    def place(self, file: HubFile) -> Path:
        """Say where in the cache the file's content belongs."""
        return _folder(file.repository) / "blobs" / file.label

    def publish(self, file: HubFile) -> Path:
        """Link the content into the revision's snapshot, and remember which commit the revision was."""
        folder = _folder(file.repository)
        blob, pointer = self.place(file), folder / "snapshots" / file.revision / file.name
        pointer.parent.mkdir(parents=True, exist_ok=True)
        if not pointer.exists():
            pointer.unlink(missing_ok=True)  # a link to nowhere
            try:
                pointer.symlink_to(os.path.relpath(blob, pointer.parent))
            except OSError:  # where links are not for everyone, the client itself does the same
                blob.replace(pointer)
        if self._revision != file.revision:
            reference = folder / "refs" / self._revision
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(file.revision)
        return pointer


def _folder(repository: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")


class _Part(io.FileIO):
    """A partial file, written at its end, that tells its size. Raises DownloadError where the disk does not take it."""

    def __init__(self, path: Path, report: Callable[[int], object]) -> None:
        super().__init__(path, "r+")
        self._path = path
        self._report = report
        self.seek(0, io.SEEK_END)

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[super().write(rest) :]
        except OSError as error:
            raise DownloadError(
                f"{self._path.parent} takes no more ({error.strerror}): free some space and pull again, "
                "which goes on from here"
            ) from error
        self._report(self.tell())
        return len(data)


@contextmanager
def _small_blocks() -> Iterator[None]:
    """Let the client write what has come block by small block: by itself it drops up to 10 MiB at every cut."""
    from huggingface_hub import constants

    before = constants.DOWNLOAD_CHUNK_SIZE
    constants.DOWNLOAD_CHUNK_SIZE = min(_BLOCK, before)
    try:
        yield
    finally:
        constants.DOWNLOAD_CHUNK_SIZE = before


class _NoBar:
    """Stands where the client would draw a bar of its own."""

    def update(self, _: float | None = None) -> None:
        """Draw nothing."""


@contextmanager
def _translated(repository: str, name: str) -> Iterator[None]:
    from huggingface_hub import errors

    with muted("huggingface_hub"):
        try:
            yield
        except LookonceError:
            raise
        except errors.RevisionNotFoundError as error:
            raise DownloadError(
                f"{_TITLE} has no such revision of {repository} (404): correct the card's revision"
            ) from error
        except errors.GatedRepoError as error:
            raise refusal(_TITLE, 403, repository, name, "HF_TOKEN") from error
        except errors.RepositoryNotFoundError as error:
            raise DownloadError(
                f"{_TITLE} knows no {repository}, or keeps it private (404 or 401): correct the card, "
                "or set HF_TOKEN to a token that may read it"
            ) from error
        except errors.HfHubHTTPError as error:
            status = getattr(error.response, "status_code", None)
            if status is not None and status < 500 and status not in _PASSING:
                raise refusal(_TITLE, status, repository, name, "HF_TOKEN") from error
            raise HubUnavailable(f"it answered {status}") from error
        except Exception as error:
            # The client has been built on three HTTP libraries so far, each with errors of its own.
            raise HubUnavailable(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
