"""A folder's GGUF files, and which of them belong together: told by their metadata and widths, never by their names.

Knows nothing of cards.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lookonce import gguf_check, gguf_file, retype
from lookonce.errors import ModelFileError
from lookonce.gguf_file import GgufFile, plain_name

__all__ = ["FolderFiles", "fitting_projector", "only_text_model", "read_folder", "warn_of_names"]

logger = logging.getLogger(__name__)

_PROJECTOR: Final = "clip"  # general.architecture of every projector file
_EMBEDDING: Final = "token_embd.weight"  # what every text model has
_LATER_PART: Final = re.compile(r"-(?!00001)\d{5}-of-(\d{5})\.gguf$")
_IDENTITY: Final = ("general.basename", "general.size_label", "general.finetune", "general.version")


@dataclass(frozen=True, slots=True)
class FolderFiles:
    """A folder's GGUF files that can be read, and of the others why they cannot."""

    folder: Path
    sound: tuple[GgufFile, ...]
    reasons: tuple[str, ...]

    def warn(self) -> None:
        """Say that damaged files, which nobody named, are passed over."""
        for reason in self.reasons:
            logger.warning("passed over in search of a model's files: %s", reason)


def read_folder(folder: Path) -> FolderFiles:
    """Read the headers of a folder's GGUF files; what is damaged is left out, without a word yet."""
    sound, reasons = [], []
    for path in _ggufs(folder):
        if _LATER_PART.search(path.name):  # its first part stands for it
            continue
        try:
            sound.append(gguf_file.read(path))
        except ModelFileError as error:
            reasons.append(str(error))
    return FolderFiles(folder, tuple(sound), tuple(reasons))


def _ggufs(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.gguf"))


def only_text_model(files: FolderFiles) -> GgufFile:
    """The one text model among a folder's files, checked. Raises ModelFileError for none, several or a damaged one."""
    # An adapter or an importance matrix has a text model's architecture too.
    found = [gguf for gguf in files.sound if gguf.architecture != _PROJECTOR and _EMBEDDING in gguf.tensors]
    if not found:
        raise _no_text_model(files)
    files.warn()
    if len(found) == 1:
        gguf_check.check_text_model(found[0])
        return found[0]
    names = ", ".join(sorted(gguf.path.name for gguf in found))
    raise ModelFileError(f"{files.folder} holds several text models ({names}): give one of these files")


def _no_text_model(files: FolderFiles) -> ModelFileError:
    folder = files.folder
    if files.reasons:
        return ModelFileError(f"{folder} holds no text model that can be used: {'; '.join(files.reasons[:3])}")
    if part := next((path for path in _ggufs(folder) if _LATER_PART.search(path.name)), None):
        first = _LATER_PART.sub(r"-00001-of-\1.gguf", part.name)
        return ModelFileError(
            f"{folder} holds {part.name}, but not the first part, {first}: download it into the folder"
        )
    return ModelFileError(f"{folder} holds no text model: give the folder of a .gguf file, or the file itself")


def fitting_projector(text: GgufFile, files: FolderFiles, mmproj_type: str | None) -> tuple[GgufFile | None, str]:
    """The one projector that fits, or None and why there is none."""
    projectors = [gguf for gguf in files.sound if gguf.architecture == _PROJECTOR]
    fitting = [gguf for gguf in projectors if _fits(text, gguf)]
    found = [gguf for gguf in fitting if retype.origin(gguf) is None]
    if len(found) > 1:  # those of other models of the same family and width fit too
        found = [gguf for gguf in found if _same_model(text, gguf)] or found
    if len(found) > 1 and mmproj_type is not None:
        found = [gguf for gguf in found if retype.projector_type(gguf).lower() == mmproj_type.lower()] or found
    if len(found) == 1:
        return found[0], ""
    if found:
        return None, f"several projector files fit {text.path.name} ({_names(found)})"
    missing = f"no projector file fits {text.path.name} in "
    missing += "its folder" if files.folder == text.path.parent else str(files.folder)
    if others := [gguf for gguf in projectors if gguf not in fitting]:
        missing += f", not {_names(others)}"
    if fitting:
        missing += f" but what was retyped from one that is gone ({_names(fitting)})"
    return None, missing


def _names(files: Iterable[GgufFile]) -> str:
    return ", ".join(sorted(gguf.path.name for gguf in files))


def _fits(text: GgufFile, projector: GgufFile) -> bool:
    try:
        gguf_check.check_projector(projector)
        gguf_check.check_pair(text, projector)
    except ModelFileError:
        return False
    return True


def _same_model(text: GgufFile, projector: GgufFile) -> bool:
    """Whether both files say that they are of one model, in their names or in what a name is made of."""
    names = [gguf.metadata.get("general.name") for gguf in (text, projector)]
    if _named(names) and plain_name(str(names[0])) == plain_name(str(names[1])):
        return True
    ours, theirs = ([plain_name(str(gguf.metadata.get(key, ""))) for key in _IDENTITY] for gguf in (text, projector))
    return bool(ours[0]) and ours == theirs


def _named(names: Sequence[object]) -> bool:
    return all(isinstance(name, str) and name for name in names)


def warn_of_names(text: GgufFile, projector: GgufFile) -> None:
    """Warn where both files have names and these are of different models."""
    # No more than a warning: makers of pairs that belong together have named the two differently.
    names = [gguf.metadata.get("general.name") for gguf in (text, projector)]
    if _named(names) and not _same_model(text, projector):
        logger.warning(
            "the projector %s calls itself %r and the text model %s %r: if they are of different models, answers are "
            "wrong, so give the right one as mmproj",
            *(projector.path, names[1], text.path, names[0]),
        )
