"""From what a user names to the checked files of a model: the text GGUF and its projector.

A name is a card's, and stands for the card's files wherever they lie; a path stands for itself. A projector is
recognised by its metadata and width, never by its file name.
"""

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Final

from lookonce import gguf_check, gguf_file
from lookonce.byte_size import format_size
from lookonce.cards import CardFile, ModelCard, find_card, read_cards
from lookonce.errors import ModelFileError
from lookonce.gguf_file import GgufFile
from lookonce.model_folders import find_named, locate, published_name

__all__ = ["CardPaths", "Fetch", "ModelFiles", "find_files", "locate_card", "pull_command"]

logger = logging.getLogger(__name__)

PROJECTOR: Final = "clip"  # general.architecture of every projector file
_EMBEDDING: Final = "token_embd.weight"  # what every text model has
_LATER_PART: Final = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
_IDENTITY: Final = ("general.basename", "general.size_label", "general.finetune", "general.version")

Fetch = Callable[[ModelCard, str | None], object]
"""Fetches a card's files, of the quantization asked for or the default one, to where `locate` finds them."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The checked files of one model.

    `chosen` says whether the caller named the projector; `missing`, where there is none, why. `card` is the model's
    where it has one.
    """

    text: GgufFile
    projector: GgufFile | None
    chosen: bool
    missing: str = ""
    card: ModelCard | None = None


@dataclass(frozen=True, slots=True)
class CardPaths:
    """Where a card's files lie; None for one that is not on this disk. Several quantizations: the card's first."""

    text: Path | None
    projector: Path | None


def find_files(
    model: str | PathLike[str], mmproj: str | PathLike[str] | None = None, *, fetch: Fetch | None = None
) -> ModelFiles:
    """Find and check the files that `model` and `mmproj` stand for.

    model: a card's name, one with a quantization as in `qwen3-vl-2b-instruct:Q8_0`, a text GGUF, or a folder with
        one. A file or folder that is not here is looked for in the folders of models.
    fetch: fetches what is missing of a card.

    Without `mmproj` the projector is the card's, or the one in the text model's folder whose metadata fit. Where there
    is none, or several fit equally, the model has no projector, which is enough to replay saved looks. Raises
    ModelFileError for a missing, damaged or mismatched file.
    """
    card, _, quantization = model.partition(":") if isinstance(model, str) else ("", "", "")
    if (named := find_card(card)) is not None:
        return _of_card(named, quantization or None, mmproj, fetch)
    path = _path("model", model)
    if not path.exists() and len(path.parts) == 1:
        path = find_named(path.name) or path
    if path.is_dir():
        text = _only_text_model(path)
    elif path.exists():
        text = _text_model(path)
    else:
        raise ModelFileError(
            f"{fspath(model)!r} does not exist: give a text model's .gguf file, a folder that holds one, or one of "
            f"{', '.join(read_cards())}"
        )
    return replace(_paired(text, mmproj), card=_card_of(text.path))


def locate_card(card: ModelCard, quantization: str | None = None) -> CardPaths:
    """Where a card's files lie. Raises InputError for a quantization that the card has not."""
    texts = card.text.values() if quantization is None else [card.text_file(quantization)]
    return CardPaths(_first(card, texts), _first(card, card.projector.values()))


def pull_command(card: ModelCard, quantization: str | None = None) -> str:
    """The command that fetches a card's files, and how much it fetches."""
    quant = "" if quantization is None else f" --quant {quantization}"
    sizes = [card.text_file(quantization).size_bytes, card.projector_file().size_bytes]
    known = format_size(sum(size for size in sizes if size))
    much = f", {known}" if all(sizes) else f", more than {known}" if any(sizes) else ""
    return f"`lookonce pull {card.name}{quant}` fetches them{much}"


def _of_card(
    card: ModelCard, quantization: str | None, mmproj: str | PathLike[str] | None, fetch: Fetch | None
) -> ModelFiles:
    paths = locate_card(card, quantization)
    if fetch is not None and card.folder is None and (paths.text is None or (paths.projector or mmproj) is None):
        fetch(card, quantization)
        paths = locate_card(card, quantization)
    if paths.text is None:
        what = card.name if quantization is None else f"{card.name}:{quantization}"
        if card.folder is not None:
            raise ModelFileError(f"the files of {what} are not in {card.folder}: put them back, or install again")
        raise ModelFileError(f"the files of {what} are not on this disk: {pull_command(card, quantization)}")
    text = _text_model(paths.text)
    if mmproj is None and paths.projector is not None:
        return replace(_paired(text, paths.projector), chosen=False, card=card)
    found = _paired(text, mmproj)
    if found.projector is None and card.folder is None:
        missing = f"the projector of {card.name} is not on this disk: {pull_command(card)}, or use a saved look"
        return replace(found, missing=missing, card=card)
    return replace(found, card=card)


def _first(card: ModelCard, files: Iterable[CardFile]) -> Path | None:
    return next((path for file in files if (path := locate(card, file)) is not None), None)


def _card_of(path: Path) -> ModelCard | None:
    """The card that a file given by its path belongs to, by the published name and size."""
    size_bytes = path.stat().st_size
    for card in read_cards().values():
        for file in card.text.values():
            if published_name(card, file, path.name) and file.size_bytes in (None, size_bytes):
                return card
    return None


def _text_model(path: Path) -> GgufFile:
    text = gguf_file.read(path)
    gguf_check.check_text_model(text)
    return text


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


def _paired(text: GgufFile, mmproj: str | PathLike[str] | None) -> ModelFiles:
    if mmproj is None:
        return _with_fitting_projector(text)
    path = _path("mmproj", mmproj)
    if not path.exists() and len(path.parts) == 1:
        path = find_named(path.name) or path
    projector = gguf_file.read(path)
    gguf_check.check_projector(projector)
    gguf_check.check_pair(text, projector)
    return ModelFiles(text, projector, chosen=True)


def _with_fitting_projector(text: GgufFile) -> ModelFiles:
    found = [gguf for gguf in _sound_files(text.path.parent) if gguf.architecture == PROJECTOR and _fits(text, gguf)]
    if len(found) > 1:  # those of other models of the same family and width fit too
        found = [gguf for gguf in found if _same_model(text, gguf)] or found
    if len(found) == 1:
        return ModelFiles(text, found[0], chosen=False)
    missing = f"no projector file fits {text.path.name} in its folder"
    if found:
        names = ", ".join(sorted(gguf.path.name for gguf in found))
        missing = f"several projector files fit {text.path.name} ({names})"
    missing += ", and looking at a picture needs one: give mmproj= or --mmproj, or use a saved look"
    return ModelFiles(text, None, chosen=False, missing=missing)


def _same_model(text: GgufFile, projector: GgufFile) -> bool:
    """Whether both files say that they are of one model, in their names or in what a name is made of."""
    names = [gguf.metadata.get("general.name") for gguf in (text, projector)]
    if all(isinstance(name, str) and name for name in names) and _plain(str(names[0])) == _plain(str(names[1])):
        return True
    ours, theirs = ([_plain(str(gguf.metadata.get(key, ""))) for key in _IDENTITY] for gguf in (text, projector))
    return bool(ours[0]) and ours == theirs


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


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
