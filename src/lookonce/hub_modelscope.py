"""ModelScope, through its package, which is an extra: its requests, its errors and its cache.

Of the package the listing, the addresses and the login are used. Its transfers are not: they draw bars that cannot be
turned off, or try a full disk for half a minute and take whatever is sent. MODELSCOPE_API_TOKEN, MODELSCOPE_ENDPOINT,
MODELSCOPE_CACHE and what the package reads of its tries and their time are respected.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from lookonce.errors import LookonceError
from lookonce.hub import TITLES, HubFile, HubUnavailable, PartWriter, Source, first_line, held, is_final, muted, refusal
from lookonce.hub_cache import modelscope_cache
from lookonce.sha256_form import is_sha256

__all__ = ["INSTALL", "REVISION", "ModelScope"]

INSTALL: Final = "pip install 'lookonce[modelscope]'"

REVISION: Final = "master"  # a card names none of this hub

_TITLE: Final = TITLES["modelscope"]
_PARTIAL: Final = 206  # the status of a reply that is the range asked for
_BLOCK: Final = 1 << 18
_TRIES: Final = 2


class ModelScope:
    """The hub that MODELSCOPE_ENDPOINT names, and the cache in MODELSCOPE_CACHE."""

    source: Source = "modelscope"
    title: str = _TITLE
    revision: str = REVISION

    def is_installed(self) -> bool:
        """Tell whether the package is there, without importing it."""
        return importlib.util.find_spec("modelscope") is not None

    def describe(self, repository: str, name: str) -> HubFile:
        """Ask the hub for one file's size and hash."""
        if not self.is_installed():
            raise HubUnavailable(f"its package is missing: {INSTALL}")
        with _translated(repository, name):
            from modelscope_hub import HubApi, HubConfig

            files = HubApi(config=HubConfig()).list_repo_files(repository, "model", revision=REVISION)
            found = {one.path: one for one in files}
        if name not in found:
            raise refusal(_TITLE, 404, repository, name, "MODELSCOPE_API_TOKEN")
        told = str(found[name].sha256).lower()
        sha256 = told if is_sha256(told) else None
        return HubFile(repository, name, REVISION, sha256 or "", found[name].size or None, sha256)

    def fetch(self, file: HubFile, part: Path, size_bytes: int, report: Callable[[int], object]) -> None:
        """Add to `part` what it lacks of the file."""
        with _translated(file.repository, file.name), PartWriter(part, size_bytes, report) as output:
            import requests
            from modelscope.hub.file_download import get_file_download_url
            from modelscope_hub import HubApi, HubConfig, constants

            config, start = HubConfig(), output.tell()
            reply = requests.get(
                get_file_download_url(file.repository, file.name, file.revision, endpoint=config.endpoint),
                headers={"Accept-Encoding": "identity", "Range": f"bytes={start}-{size_bytes - 1}"},
                cookies=HubApi(config=config).get_cookies(),
                stream=True,
                timeout=(constants.API_CONNECT_TIMEOUT, constants.API_TIMEOUT),
            )
            with reply:
                reply.raise_for_status()
                if reply.status_code != _PARTIAL:  # all of it, from a server that knows no ranges
                    output.seek(0)
                    output.truncate()
                for block in reply.iter_content(_BLOCK):
                    output.write(block)

    def place(self, file: HubFile) -> Path:
        """Say where in the cache the file belongs."""
        folder = modelscope_cache() / "models" / file.repository.replace("/", "--")
        return folder / "snapshots" / file.revision / file.name

    def publish(self, file: HubFile) -> Path:
        """Give the place itself: in this cache a file has no other name."""
        return self.place(file)


@contextmanager
def _translated(repository: str, name: str) -> Iterator[None]:
    try:
        _import_client()  # which sets the levels of its logs itself
        with muted("modelscope", "modelscope_hub", "urllib3"), _few_tries():
            yield
    except LookonceError:
        raise
    except Exception as error:
        # The package raises its own errors, those of requests and those of urllib3, as it comes; the first of them
        # tells why all tries failed.
        chain = list(_chain(error))
        status = next((found for one in chain if (found := _status(one)) is not None), None)
        if is_final(status):
            raise refusal(_TITLE, status, repository, name, "MODELSCOPE_API_TOKEN") from error
        if status:
            raise HubUnavailable(f"it answered {status}") from error
        if any(isinstance(one, TimeoutError) for one in chain):
            raise HubUnavailable("it did not answer in time") from error
        raise HubUnavailable(first_line(chain[-1])) from error


def _import_client() -> None:
    for name in ("modelscope.hub.file_download", "modelscope_hub"):
        importlib.import_module(name)


@contextmanager
def _few_tries() -> Iterator[None]:
    """Have a listing tried twice where the user has set no other number: by itself the client tries for a minute."""
    from modelscope_hub import _legacy_api as client  # there is no other way that reaches a client made before

    name = "REPO_TREE_PAGE_MAX_ATTEMPTS"
    if os.environ.get(f"MODELSCOPE_{name}") or not hasattr(client, name):
        yield
        return
    with held(name, _TRIES, partial(getattr, client, name), partial(setattr, client, name)):
        yield


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from, the first one last."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _status(error: Any) -> int | None:
    found = getattr(error, "status_code", None) or getattr(getattr(error, "response", None), "status_code", None)
    return found if isinstance(found, int) else None
