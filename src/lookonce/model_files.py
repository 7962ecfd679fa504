"""From what a user names to the two files of a model: the text GGUF and its projector.

A projector is recognised by its metadata and width, never by its file name.
"""

import logging
import re
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Final

from lookonce import gguf_check, gguf_file
from lookonce.errors import ModelFileError
from lookonce.gguf_file import GgufFile

logger = logging.getLogger(__name__)

PROJECTOR: Final = "clip"  # general.architecture of every projector file
_EMBEDDING: Final = "token_embd.weight"  # what every text model has
_LATER_PART: Final = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The checked files of one model.

    `chosen` says whether the caller named the projector; `missing`, where there is none, why.
    """

    text: GgufFile
    projector: GgufFile | None
    chosen: bool
    missing: str = ""


def find_files(model: str | PathLike[str], mmproj: str | PathLike[str] | None = None) -> ModelFiles:
    """Find and check the files that `model`, a text GGUF or a folder with one, and `mmproj` stand for.

    Without `mmproj` the folder is searched for the one projector whose metadata fit. Where there is none, or several,
    the model has no projector, which is enough to replay saved looks. Raises ModelFileError for a missing, damaged or
    mismatched file.
    """
    path = _path("model", model)
    if path.is_dir():
        text = _only_text_model(path)
    elif path.exists():
        text = gguf_file.read(path)
        gguf_check.check_text_model(text)
    else:
        raise ModelFileError(
            f"{fspath(model)!r} does not exist: give a text model's .gguf file or a folder that holds one"
        )
    if mmproj is None:
        return _with_fitting_projector(text)
    projector = gguf_file.read(_path("mmproj", mmproj))
    gguf_check.check_projector(projector)
    gguf_check.check_pair(text, projector)
    return ModelFiles(text, projector, chosen=True)


def _only_text_model(folder: Path) -> GgufFile:
    # An adapter or an importance matrix has a text model's architecture too.
    found = [gguf for gguf in _sound_files(folder) if gguf.architecture != PROJECTOR and _EMBEDDING in gguf.tensors]
    if len(found) == 1:
        gguf_check.check_text_model(found[0])
        return found[0]
    if not found:
        raise ModelFileError(f"{folder} holds no text model: give the folder of a .gguf file, or the file itself")
    names = ", ".join(sorted(gguf.path.name for gguf in found))
    raise ModelFileError(f"{folder} holds several text models ({names}): give one of these files")


def _with_fitting_projector(text: GgufFile) -> ModelFiles:
    found = [gguf for gguf in _sound_files(text.path.parent) if gguf.architecture == PROJECTOR and _fits(text, gguf)]
    if len(found) == 1:
        return ModelFiles(text, found[0], chosen=False)
    missing = f"no projector file fits {text.path.name} in its folder"
    if found:
        names = ", ".join(sorted(gguf.path.name for gguf in found))
        missing = f"several projector files fit {text.path.name} ({names})"
    missing += ", and looking at a picture needs one: give mmproj= or --mmproj, or use a saved look"
    return ModelFiles(text, None, chosen=False, missing=missing)


def _path(what: str, given: str | PathLike[str]) -> Path:
    path = fspath(given) if isinstance(given, str | PathLike) else given
    if not isinstance(path, str) or not path or "\0" in path:
        raise ModelFileError(f"{what} is {given!r}: give the path of a .gguf file")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # a home folder that nobody has
        raise ModelFileError(f"{what} is {given!r} ({error}): give the path of a .gguf file") from error


def _fits(text: GgufFile, projector: GgufFile) -> bool:
    try:
        gguf_check.check_projector(projector)
        gguf_check.check_pair(text, projector)
    except ModelFileError:
        return False
    return True


def _sound_files(folder: Path) -> list[GgufFile]:
    """The folder's GGUF files that can be read; a damaged one that nobody named is passed over."""
    found = []
    for path in sorted(folder.glob("*.gguf")):
        if _LATER_PART.search(path.name):  # its first part stands for it
            continue
        try:
            found.append(gguf_file.read(path))
        except ModelFileError as error:
            logger.warning("passed over in search of a model's files: %s", error)
    return found
