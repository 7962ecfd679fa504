"""ModelScope, through its package, which is an extra: its requests, its errors and its cache.

Of the package the listing and the plain transfer are used: its `model_file_download` draws bars that cannot be turned
off. MODELSCOPE_API_TOKEN, MODELSCOPE_ENDPOINT and MODELSCOPE_CACHE are respected.
"""

import errno
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from lookonce.errors import DownloadError, LookonceError
from lookonce.hub import HubFile, HubUnavailable, Source, muted, refusal

__all__ = ["INSTALL", "ModelScope"]

INSTALL: Final = "pip install 'lookonce[modelscope]'"

_TITLE: Final = "ModelScope"
_REVISION: Final = "master"
_PASSING: Final = (408, 425, 429)  # answers that change by themselves, as those from 500 on do
_DISK: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


class ModelScope:
    """The hub that MODELSCOPE_ENDPOINT names, and the cache in MODELSCOPE_CACHE."""

    source: Source = "modelscope"
    title: str = _TITLE

    def is_installed(self) -> bool:
        """Tell whether the package is there, without importing it."""
        return importlib.util.find_spec("modelscope") is not None

    def describe(self, repository: str, name: str) -> HubFile:
        """Ask the hub for one file's size and hash."""
        if not self.is_installed():
            raise HubUnavailable(f"its package is missing: {INSTALL}")
        with _translated(repository, name):
            from modelscope_hub import HubApi, HubConfig

            files = HubApi(config=HubConfig()).list_repo_files(repository, "model", revision=_REVISION)
            found = {one.path: one for one in files}
        if name not in found:
            raise refusal(_TITLE, 404, repository, name, "MODELSCOPE_API_TOKEN")
        sha256 = (found[name].sha256 or "").lower() or None
        return HubFile(repository, name, _REVISION, sha256 or "", found[name].size or None, sha256)

    def fetch(self, file: HubFile, part: Path, size_bytes: int, report: Callable[[int], object]) -> None:
        """Add to `part` what it lacks of the file."""
        with _translated(file.repository, file.name):
            from modelscope.hub.callback import ProgressCallback
            from modelscope.hub.file_download import get_file_download_url, http_get_model_file
            from modelscope_hub import HubApi, HubConfig

            class Progress(ProgressCallback):  # type: ignore[misc]  # the package has no types
                def update(self, size: int) -> None:
                    report(part.stat().st_size)

            config = HubConfig()
            http_get_model_file(
                get_file_download_url(file.repository, file.name, file.revision, endpoint=config.endpoint),
                str(part.parent),
                part.name,
                size_bytes,
                cookies=HubApi(config=config).get_cookies(),
                headers={"Accept-Encoding": "identity"},
                disable_tqdm=True,
                progress_callbacks=[Progress],
            )

    def place(self, file: HubFile) -> Path:
        """Say where in the cache the file belongs."""
        return _cache() / "models" / file.repository.replace("/", "--") / "snapshots" / file.revision / file.name

    def publish(self, file: HubFile) -> Path:
        """Give the place itself: in this cache a file has no other name."""
        return self.place(file)


def _cache() -> Path:
    """The cache's folder, by the rule of modelscope_hub's config.py, which may not be installed."""
    named = os.environ.get("MODELSCOPE_CACHE")
    return Path(named).expanduser().resolve() if named else Path.home() / ".cache" / "modelscope"


@contextmanager
def _translated(repository: str, name: str) -> Iterator[None]:
    with muted("modelscope", "modelscope_hub", "urllib3"):
        try:
            yield
        except LookonceError:
            raise
        except Exception as error:
            # The package raises its own errors, those of requests and those of urllib3, as it comes; the last hold why
            # all tries failed.
            reason = getattr(error, "reason", None) or error
            status = _status(reason)
            if status is not None and 400 <= status < 500 and status not in _PASSING:
                raise refusal(_TITLE, status, repository, name, "MODELSCOPE_API_TOKEN") from error
            if isinstance(reason, OSError) and reason.errno in _DISK:
                raise DownloadError(
                    f"the disk takes no more ({reason.strerror}): free some space and pull again, "
                    "which goes on from here"
                ) from error
            raise HubUnavailable(f"it answered {status}" if status else _first_line(reason)) from error


def _status(error: Any) -> int | None:
    found = getattr(error, "status_code", None) or getattr(getattr(error, "response", None), "status_code", None)
    return found if isinstance(found, int) else None


def _first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
