"""Where model files lie on this machine: the folders of models, and the caches of the two hubs.

Knows how those are laid out, and nothing of what is in a file.
"""

import glob
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Final

import platformdirs

from lookonce.cards import DEFAULT_REVISION, CardFile, ModelCard
from lookonce.errors import ModelFileError
from lookonce.hub_cache import huggingface_folder, modelscope_cache

__all__ = [
    "candidates",
    "exists",
    "find_named",
    "folder_aside",
    "folder_problem",
    "folders",
    "locate",
    "places",
    "published_name",
    "repository_folders",
    "user_folder",
]

logger = logging.getLogger(__name__)

_SHARED: Final = Path("/models")  # where containers mount them
_MOST_SHOWN: Final = 4


def folders() -> tuple[Path, ...]:
    """The folders of models, the first to be searched first: `LOOKONCE_MODELS_DIR`, /models, the user's own."""
    own = []
    with suppress(RuntimeError):  # without a home folder there is none in it
        own.append(user_folder())
    return (*_named_folder(), _SHARED, *own)


def _named_folder() -> Iterator[Path]:
    if named := os.environ.get("LOOKONCE_MODELS_DIR"):
        try:
            yield Path(named).expanduser()
        except RuntimeError as error:  # a home folder that nobody has
            raise ModelFileError(f"LOOKONCE_MODELS_DIR is {named!r} ({error}): set it to a folder of models") from error


def user_folder() -> Path:
    """The user's own folder of models, in their data folder."""
    return platformdirs.user_data_path("lookonce") / "models"


def folder_problem() -> str:
    """What is wrong with `LOOKONCE_MODELS_DIR`; else nothing."""
    found = next(_named_folder(), None)
    if found is None or found.is_dir():
        return ""
    what = "is no folder" if exists(found) else "does not exist"
    return f"LOOKONCE_MODELS_DIR is {str(found)!r}, which {what}"


def folder_aside() -> str:
    """The same in brackets, to stand after what was not found."""
    problem = folder_problem()
    return f" ({problem})" if problem else ""


def find_named(name: str) -> Path | None:
    """A file or folder of that name in the folders of models, or up to two folders deeper, as owner/repository is.

    Raises ModelFileError where several lie deeper: one could be of another model.
    """
    pattern = glob.escape(name)
    for folder in folders():
        if exists(path := folder / name):
            return path
        for deep in ("*", "*/*"):
            found = _matches(folder, f"{deep}/{pattern}")
            if len(found) > 1:
                shown = ", ".join(map(str, found[:_MOST_SHOWN])) + (", ..." if len(found) > _MOST_SHOWN else "")
                raise ModelFileError(
                    f"{name!r} is in several folders ({shown}): give the path of the one that is meant"
                )
            if found:
                return found[0]
    return None


def exists(path: Path) -> bool:
    """Whether there is something; False where a folder on the way may not be entered."""
    try:
        return path.exists()
    except OSError:
        return False


def locate(card: ModelCard, file: CardFile, *, any_size: bool = False) -> Path | None:
    """The first of the places where a card's file lies; with `any_size`, one of another size where no other is."""
    if not any_size:
        return next(places(card, file), None)
    found = list(_existing(card, file))
    return next((path for path, size_bytes in found if size_bytes == file.size_bytes), found[0][0] if found else None)


def places(
    card: ModelCard, file: CardFile, *, warn: Callable[[str], object] = lambda said: logger.warning("%s", said)
) -> Iterator[Path]:
    """Where a card's file lies. One of another size than the card says is passed over, which `warn` is told."""
    for path, size_bytes in _existing(card, file):
        if file.size_bytes in (None, size_bytes):
            yield path
        else:
            said = f"{path} has {size_bytes} bytes where the card {card.name} says {file.size_bytes}: it is not used"
            warn(said)


def _existing(card: ModelCard, file: CardFile) -> Iterator[tuple[Path, int]]:
    for path in candidates(card, file):
        with suppress(OSError):
            if path.is_file():
                yield path, path.stat().st_size


def published_name(card: ModelCard, file: CardFile, name: str) -> bool:
    """Whether a file's name is the card's, alone or after its repository as tools for flat folders write it."""
    return name in (_base(file), *_flat(card, file))


def candidates(card: ModelCard, file: CardFile) -> Iterator[Path]:
    """Every place where a card's file could lie, the first to be taken first."""
    if card.folder is not None:
        yield card.folder / file.name
        return
    name = _base(file)
    for folder in folders():
        yield folder / card.name / name
        yield folder / name
        yield from (folder / flat for flat in _flat(card, file))
        pattern = glob.escape(name)
        yield from (path for deep in ("*", "*/*") for path in _matches(folder, f"{deep}/{pattern}"))
    yield from (folder / file.name for folder in repository_folders(card))


def repository_folders(card: ModelCard) -> Iterator[Path]:
    """The folders in the hubs' caches in which a card's files could lie."""
    with suppress(RuntimeError):  # there is no home folder, and so no cache in it
        if card.huggingface:
            yield from _huggingface(card.huggingface, card.revision)
        if card.modelscope:
            yield from _modelscope(card.modelscope)


def _matches(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:  # it may not be read
        return []


def _base(file: CardFile) -> str:
    return PurePosixPath(file.name).name


def _flat(card: ModelCard, file: CardFile) -> list[str]:
    repositories = dict.fromkeys(one for one in (card.huggingface, card.modelscope) if one)
    return [f"{repository.replace('/', '_')}_{_base(file)}" for repository in repositories]


def _huggingface(repository: str, revision: str) -> Iterator[Path]:
    """The snapshots of a repository in Hugging Face's cache that `revision` may mean, the first to be taken first.

    Any will do for a card that names none, after the one that is main; of a revision that a card names, only its own.
    """
    folder = huggingface_folder(repository)
    try:
        current = (folder / "refs" / revision).read_text("utf-8").strip()
    except (OSError, ValueError):
        current = revision  # which may be a commit's own name
    yield folder / "snapshots" / current
    if revision == DEFAULT_REVISION:
        yield from (one for one in _matches(folder, "snapshots/*") if one.name != current)


def _modelscope(repository: str) -> Iterator[Path]:
    """The folders that the versions of modelscope have used for a repository (modelscope, hub/utils/utils.py)."""
    cache = modelscope_cache()
    owner, _, name = repository.partition("/")
    yield from _matches(cache / "models" / f"{owner}--{name}", "snapshots/*")
    for root in (cache / "models", cache / "hub" / "models", cache / "hub", cache):
        yield from (root / owner / one for one in dict.fromkeys((name.replace(".", "___"), name)))
