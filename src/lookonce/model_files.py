"""From what a user names to the checked files of a model: the text GGUF and its projector.

A name is a card's, and stands for the card's files wherever they lie, if their content is what is published, where
that is known; a path stands for itself. A projector is recognised by its metadata and width, never by its file name.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Final

from lookonce import gguf_check, gguf_file, published, retype
from lookonce.byte_size import format_size
from lookonce.cards import CardFile, ModelCard, find_card, read_cards
from lookonce.errors import ModelFileError
from lookonce.fingerprint import Fingerprint
from lookonce.gguf_file import GgufFile, plain_name
from lookonce.model_folders import exists, find_named, locate, places, published_name
from lookonce.store import Store

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
    where it has one, and `verified` are those of the files whose content was just found to be what is published.
    """

    text: GgufFile
    projector: GgufFile | None
    chosen: bool
    missing: str = ""
    card: ModelCard | None = None
    verified: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class CardPaths:
    """Where a card's files lie; None for one that is not on this disk. Several quantizations: the card's first."""

    text: Path | None
    projector: Path | None


def find_files(
    model: str | PathLike[str],
    mmproj: str | PathLike[str] | None = None,
    *,
    mmproj_type: str | None = None,
    store: Store | None = None,
    fetch: Fetch | None = None,
) -> ModelFiles:
    """Find and check the files that `model` and `mmproj` stand for.

    model: a card's name, one with a quantization as in `qwen3-vl-2b-instruct:Q8_0`, a text GGUF, or a folder with
        one. A file or folder that is not here is looked for in the folders of models.
    mmproj_type: the type of the projector's file, where a retyped one is to be used: see `retype.in_type`. None is the
        card's.
    store: where a file's fingerprint may be noted. That of a card's file is compared with the published one, for which
        the file is read through where it is not noted.
    fetch: fetches what is missing of a card.

    Without `mmproj` the projector is the card's, or the one in the text model's folder whose metadata fit. Where there
    is none, or several fit equally, the model has no projector, which is enough to replay saved looks. Raises
    ModelFileError for a missing, damaged or mismatched file.
    """
    card, _, quantization = model.partition(":") if isinstance(model, str) else ("", "", "")
    if (named := find_card(card)) is not None:
        search = _CardSearch(named, quantization or None, mmproj_type or named.mmproj_type, store)
        return _in_type(_of_card(search, mmproj, fetch), mmproj_type, store)
    path = _path("model", model)
    if not exists(path) and len(path.parts) == 1:
        path = find_named(path.name) or path
    if exists(path):
        text = _only_text_model(path) if path.is_dir() else _text_model(path)
    else:
        raise ModelFileError(
            f"{fspath(model)!r} does not exist: give a text model's .gguf file, a folder that holds one, or one of "
            f"{', '.join(read_cards())}"
        )
    card_of_file = _card_of(text, store)
    kind = mmproj_type or (card_of_file.mmproj_type if card_of_file else None)
    return _in_type(replace(_paired(text, mmproj, kind), card=card_of_file), mmproj_type, store)


def locate_card(card: ModelCard, quantization: str | None = None, mmproj_type: str | None = None) -> CardPaths:
    """Where a card's files lie; the projector of `mmproj_type` goes before the others.

    Raises InputError for a quantization that the card has not.
    """
    texts = card.text.values() if quantization is None else [card.text_file(quantization)]
    kinds = _by_type(card, mmproj_type)
    return CardPaths(_first(card, texts), _first(card, [card.projector[kind] for kind in kinds]))


def pull_command(card: ModelCard, quantization: str | None = None) -> str:
    """The command that fetches a card's files, and how much it fetches."""
    quant = "" if quantization is None else f" --quant {quantization}"
    sizes = [card.text_file(quantization).size_bytes, card.projector_file().size_bytes]
    known = format_size(sum(size for size in sizes if size))
    much = f", {known}" if all(sizes) else f", more than {known}" if any(sizes) else ""
    return f"`lookonce pull {card.name}{quant}` fetches them{much}"


class _CardSearch:
    """One search for a card's files: the first places whose content is right, as far as that is known."""

    def __init__(self, card: ModelCard, quantization: str | None, mmproj_type: str | None, store: Store | None) -> None:
        self.card = card
        self.quantization = quantization
        self.mmproj_type = mmproj_type
        self.verified: list[Path] = []
        self.unfit: list[Path] = []
        self.paired = False  # whether both files of the card were found
        self._store = store

    def text(self) -> GgufFile | None:
        """The text model. Raises InputError for a quantization that the card has not, and what `_found` raises."""
        card = self.card
        texts = card.text.values() if self.quantization is None else [card.text_file(self.quantization)]
        return self._found(self._places(texts), _text_model)

    def projector(self, text: GgufFile) -> GgufFile | None:
        """The projector: of the wanted type if there is one, and rather from the text model's own folder.

        Many makers call it the same for every model: `unfit` are files of its name that do not fit. Raises
        ModelFileError where the content of all is known to be wrong.
        """

        def read(path: Path) -> GgufFile:
            projector = gguf_file.read(path)
            gguf_check.check_projector(projector)
            gguf_check.check_pair(text, projector)
            return projector

        kinds = _by_type(self.card, self.mmproj_type)
        found = list(self._places([self.card.projector[kind] for kind in kinds]))
        wanted = [self.card.projector[kind].name for kind in kinds if kind.lower() == (self.mmproj_type or "").lower()]
        found.sort(key=lambda one: (one[1].name not in wanted, one[0].parent != text.path.parent))
        try:
            return self._found(found, read)
        except ModelFileError as error:
            if any(file.sha256 for _, file in found):
                raise
            logger.warning("no projector file of %s is used: %s", self.card.name, error)
            self.unfit = [path for path, _ in found]
            return None

    def _places(self, files: Iterable[CardFile]) -> Iterator[tuple[Path, CardFile]]:
        for file in files:
            known = published.complete(self.card, file)
            yield from ((path, known) for path in places(self.card, known))

    def _found(self, where: Iterable[tuple[Path, CardFile]], read: Callable[[Path], GgufFile]) -> GgufFile | None:
        """The first file whose content is right and that can be read.

        Raises ModelFileError where there are files and none is right.
        """
        wrong: list[ModelFileError] = []
        for path, file in where:
            try:
                content = Fingerprint(path, self._store)
                if file.sha256 is not None and (actual := content.value()) != file.sha256:
                    raise self._differs(path, file.sha256, actual)
                found = read(path)
                content.check_unchanged()
            except ModelFileError as error:
                wrong.append(error)
                continue
            for reason in wrong:
                logger.warning("passed over for %s: %s", path, reason)
            if file.sha256 is not None:
                self.verified.append(path)
            return found
        if wrong:
            raise wrong[0]
        return None

    def _differs(self, path: Path, expected: str, actual: str) -> ModelFileError:
        remedy = "install again"
        if self.card.folder is None:
            remedy = f"{pull_command(self.card, self.quantization)}; delete this one"
        return ModelFileError(
            f"{path} is not the file that {self.card.name} means: its SHA-256 is {actual}, expected {expected}: "
            f"{remedy}, or give its path in place of the name to use it all the same"
        )


def _of_card(search: _CardSearch, mmproj: str | PathLike[str] | None, fetch: Fetch | None) -> ModelFiles:
    card, quantization = search.card, search.quantization
    try:
        files = _on_disk(search, mmproj)
    except ModelFileError:
        if fetch is None or card.folder is not None:
            raise
        files = None  # what lies here is wrong
    whole = files is not None and (mmproj is not None or search.paired)
    if fetch is not None and card.folder is None and not whole:
        fetch(card, quantization)
        files = _on_disk(search, mmproj)
    if files is None:
        what = card.name if quantization is None else f"{card.name}:{quantization}"
        if card.folder is not None:
            raise ModelFileError(f"the files of {what} are not in {card.folder}: put them back, or install again")
        raise ModelFileError(f"the files of {what} are not on this disk: {pull_command(card, quantization)}")
    if files.projector is None and card.folder is None:
        unfit = f" ({', '.join(map(str, search.unfit))} is of another model)" if search.unfit else ""
        missing = f"the projector of {card.name} is not on this disk{unfit}: {pull_command(card)}, or use a saved look"
        files = replace(files, missing=missing)
    return replace(files, card=card, verified=tuple(search.verified))


def _on_disk(search: _CardSearch, mmproj: str | PathLike[str] | None) -> ModelFiles | None:
    """The card's files, or its text model with a projector that fits; None where there is no text model."""
    text = search.text()
    if text is None:
        return None
    projector = None if mmproj is not None else search.projector(text)
    search.paired = projector is not None
    if projector is None:
        return _paired(text, mmproj, search.mmproj_type)
    if projector.path not in search.verified:
        _warn_of_names(text, projector)
    return ModelFiles(text, projector, chosen=False)


def _by_type(card: ModelCard, mmproj_type: str | None) -> list[str]:
    return sorted(card.projector, key=lambda kind: kind.lower() != (mmproj_type or "").lower())


def _first(card: ModelCard, files: Iterable[CardFile]) -> Path | None:
    return next((path for file in files if (path := locate(card, file)) is not None), None)


def _card_of(text: GgufFile, store: Store | None) -> ModelCard | None:
    """The card that a file given by its path belongs to, by the published name and size."""
    for card in read_cards().values():
        for file in card.text.values():
            if published_name(card, file, text.path.name) and file.size_bytes in (None, text.statuses[0].st_size):
                _warn_of_content(card, published.complete(card, file), text, store)
                return card
    return None


def _warn_of_content(card: ModelCard, file: CardFile, text: GgufFile, store: Store | None) -> None:
    if file.sha256 is None or len(text.parts) > 1:
        return
    content = Fingerprint(text, store)
    actual = content.known() if store is None else content.value()
    if actual not in (None, file.sha256):
        logger.warning(
            "%s has the name and size of a file of %s, and is another: its SHA-256 is %s, expected %s: if you did not "
            "make it yourself, it is damaged: fetch it again",
            *(text.path, card.name, actual, file.sha256),
        )


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


def _in_type(files: ModelFiles, mmproj_type: str | None, store: Store | None) -> ModelFiles:
    """The files with the projector in the type that the caller or the card wants."""
    wanted = mmproj_type or (files.card.mmproj_type if files.card else None)
    if wanted is None:
        return files
    retype.checked_type(wanted, auto=True)
    if files.projector is None:
        return files
    found = retype.in_type(files.projector, wanted, store)
    if found is files.projector:
        return files
    gguf_check.check_pair(files.text, found)
    return replace(files, projector=found, chosen=False)


def _paired(text: GgufFile, mmproj: str | PathLike[str] | None, mmproj_type: str | None) -> ModelFiles:
    if mmproj is None:
        return _with_fitting_projector(text, mmproj_type)
    path = _path("mmproj", mmproj)
    if not exists(path) and len(path.parts) == 1:
        path = find_named(path.name) or path
    projector = gguf_file.read(path)
    gguf_check.check_projector(projector)
    gguf_check.check_pair(text, projector)
    return ModelFiles(text, projector, chosen=True)


def _with_fitting_projector(text: GgufFile, mmproj_type: str | None) -> ModelFiles:
    projectors = [gguf for gguf in _sound_files(text.path.parent) if gguf.architecture == PROJECTOR]
    fitting = [gguf for gguf in projectors if _fits(text, gguf)]
    found = [gguf for gguf in fitting if retype.origin(gguf) is None]
    if len(found) > 1:  # those of other models of the same family and width fit too
        found = [gguf for gguf in found if _same_model(text, gguf)] or found
    if len(found) > 1 and mmproj_type is not None:
        found = [gguf for gguf in found if retype.projector_type(gguf).lower() == mmproj_type.lower()] or found
    if len(found) == 1:
        _warn_of_names(text, found[0])
        return ModelFiles(text, found[0], chosen=False)
    others = ", ".join(sorted(gguf.path.name for gguf in projectors if gguf not in fitting))
    missing = f"no projector file fits {text.path.name} in its folder"
    if others:
        missing += f", not {others}"
    if fitting and not found:
        names = ", ".join(sorted(gguf.path.name for gguf in fitting))
        missing += f" but what was retyped from one that is gone ({names})"
    if found:
        names = ", ".join(sorted(gguf.path.name for gguf in found))
        missing = f"several projector files fit {text.path.name} ({names})"
    missing += ", and looking at a picture needs one: give mmproj= or --mmproj, or use a saved look"
    return ModelFiles(text, None, chosen=False, missing=missing)


def _same_model(text: GgufFile, projector: GgufFile) -> bool:
    """Whether both files say that they are of one model, in their names or in what a name is made of."""
    names = [gguf.metadata.get("general.name") for gguf in (text, projector)]
    if _named(names) and plain_name(str(names[0])) == plain_name(str(names[1])):
        return True
    ours, theirs = ([plain_name(str(gguf.metadata.get(key, ""))) for key in _IDENTITY] for gguf in (text, projector))
    return bool(ours[0]) and ours == theirs


def _named(names: Sequence[object]) -> bool:
    return all(isinstance(name, str) and name for name in names)


def _warn_of_names(text: GgufFile, projector: GgufFile) -> None:
    # No more than a warning: makers of pairs that belong together have named the two differently.
    names = [gguf.metadata.get("general.name") for gguf in (text, projector)]
    if _named(names) and not _same_model(text, projector):
        logger.warning(
            "the projector %s calls itself %r and the text model %s %r: if they are of different models, answers are "
            "wrong, so give the right one as mmproj",
            *(projector.path, names[1], text.path, names[0]),
        )


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
