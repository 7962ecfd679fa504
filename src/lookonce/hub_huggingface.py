"""Hugging Face, through huggingface_hub: its requests, its errors and its cache.

The client's own `hf_hub_download` begins anew after every interruption (from version 2 on; it throws its temporary file
away), so the parts that it is made of are used instead: the metadata, the transfer into a file of the caller's, and the
documented form of the cache. HF_TOKEN, HF_HOME, HF_HUB_CACHE and HF_ENDPOINT are the client's to read.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from lookonce.errors import DownloadError, InputError, LookonceError
from lookonce.hub import TITLES, HubFile, HubUnavailable, PartWriter, Source, first_line, held, is_final, muted, refusal
from lookonce.hub_cache import huggingface_folder
from lookonce.sha256_form import is_sha256
from lookonce.version import VERSION

__all__ = ["HuggingFace"]

_TITLE: Final = TITLES["huggingface"]
_BLOCK: Final = 1 << 18
_PLAIN: Final = re.compile(r"[\w.-]*\w", re.ASCII)  # a name that stays in its folder


class HuggingFace:
    """The hub that HF_ENDPOINT names, and the cache in HF_HUB_CACHE or HF_HOME."""

    source: Source = "huggingface"
    title: str = _TITLE

    def __init__(self, revision: str) -> None:
        self.revision = revision

    def describe(self, repository: str, name: str) -> HubFile:
        """Ask the hub for one file's size and hash."""
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

        if not constants.ENDPOINT.startswith(("http://", "https://")):
            raise InputError(
                f"HF_ENDPOINT is {constants.ENDPOINT!r}: set it to a hub's address, which begins with https://, "
                "or unset it"
            )
        with _translated(repository, name):
            found = get_hf_file_metadata(
                hf_hub_url(repository, name, revision=self.revision),
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
                library_name="lookonce",
                library_version=VERSION,
            )
        label, commit = found.etag or "", found.commit_hash or ""
        if not _PLAIN.fullmatch(label) or not _PLAIN.fullmatch(commit):
            raise HubUnavailable(f"{constants.ENDPOINT} does not answer as a hub does")
        sha256 = label if is_sha256(label) else None
        return HubFile(repository, name, commit, label, found.size, sha256)

    def fetch(self, file: HubFile, part: Path, size_bytes: int, report: Callable[[int], object]) -> None:
        """Add to `part` what it lacks of the file."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # it is documented there

        headers = build_hf_headers(library_name="lookonce", library_version=VERSION)
        no_bar: Any = _NoBar()
        with _translated(file.repository, file.name), _small_blocks(), PartWriter(part, size_bytes, report) as output:
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
        return huggingface_folder(file.repository) / "blobs" / file.label

    def publish(self, file: HubFile) -> Path:
        """Link the content into the revision's snapshot, and remember which commit the revision was.

        A plain file that has the name already keeps it: whether it has the content is for the caller to see.
        """
        folder = huggingface_folder(file.repository)
        blob, pointer = self.place(file), folder / "snapshots" / file.revision / file.name
        pointer.parent.mkdir(parents=True, exist_ok=True)
        if pointer.is_symlink() and not (pointer.exists() and pointer.samefile(blob)):
            pointer.unlink(missing_ok=True)  # a link to nowhere or to other content, as the client itself replaces it
        if not pointer.exists():
            try:
                pointer.symlink_to(os.path.relpath(blob, pointer.parent))
            except FileExistsError:  # another process was faster
                pass
            except OSError:  # where links are not for everyone, the client itself does the same
                blob.replace(pointer)
        if self.revision != file.revision:
            reference = folder / "refs" / self.revision
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(file.revision)
        return pointer


@contextmanager
def _small_blocks() -> Iterator[None]:
    """Let the client write what has come block by small block: by itself it drops up to 10 MiB at every cut."""
    from huggingface_hub import constants

    name = "DOWNLOAD_CHUNK_SIZE"
    get, set_ = partial(getattr, constants, name), partial(setattr, constants, name)
    with held(name, _BLOCK, get, set_):
        yield


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
            if is_final(status):
                raise refusal(_TITLE, status, repository, name, "HF_TOKEN") from error
            raise HubUnavailable(f"it answered {status}") from error
        except Exception as error:
            # The client has been built on three HTTP libraries so far, each with errors of its own.
            raise HubUnavailable(first_line(error)) from error
