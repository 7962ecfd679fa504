"""From what a user names to the checked files of a model: the text GGUF and its projector.

A name is a card's, and stands for the card's files wherever they lie, if their content is what is published, where
that is known; a path stands for itself. A projector is recognised by its metadata and width, never by its file name.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path

from lookonce import gguf_check, gguf_file, published, remedy, retype
from lookonce.cards import CardFile, ModelCard, find_card, hint, readable_cards, split_name
from lookonce.errors import ModelFileError
from lookonce.fingerprint import Fingerprint
from lookonce.folder_files import FolderFiles, fitting_projector, only_text_model, read_folder, warn_of_names
from lookonce.gguf_file import GgufFile
from lookonce.model_folders import exists, find_named, folder_aside, locate, places, published_name
from lookonce.retype import wanted_type
from lookonce.store import Store

__all__ = ["CardPaths", "Fetch", "ModelFiles", "find_files", "locate_card"]

logger = logging.getLogger(__name__)


Fetch = Callable[[ModelCard, str | None], object]
"""Fetches a card's files, of the quantization asked for or the default one, to where `locate` finds them."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The checked files of one model.

    `chosen` is the projector if the caller named it, also where its type is not the one asked for and so none is used;
    `missing`, where there is none, why. `card` is the model's where it has one, and `verified` are those of the files
    whose content was just found to be what is published.
    """

    text: GgufFile
    projector: GgufFile | None
    chosen: GgufFile | None
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
    retyped: bool = True,
    store: Store | None = None,
    fetch: Fetch | None = None,
) -> ModelFiles:
    """Find and check the files that `model` and `mmproj` stand for.

    model: a card's name, one with a quantization as in `qwen3-vl-2b-instruct:Q8_0`, a text GGUF, or a folder with
        one. A file or folder that is not here is looked for in the folders of models.
    mmproj_type: the type of the projector's file, where a retyped one is to be used: see `retype.in_type`. None is what
        LOOKONCE_MMPROJ_TYPE says, else the card's.
    retyped: False leaves retyped files out, whatever the environment and the card say.
    store: where a file's fingerprint may be noted. That of a card's file is compared with the published one, for which
        the file is read through where it is not noted.
    fetch: fetches what is missing of a card.

    Without `mmproj` the projector is the card's, or the one in the text model's folder whose metadata fit. Where there
    is none, or several fit equally, or none has the type that the environment or the card asks for, the model has no
    projector, which is enough to replay saved looks. Raises ModelFileError for a missing, damaged or mismatched file.
    """
    told = wanted_type(mmproj_type) if retyped else None
    found = _find(model, mmproj, told, store, fetch)
    return _in_type(found, told, store, named=bool(mmproj_type)) if retyped else found


def _find(
    model: str | PathLike[str],
    mmproj: str | PathLike[str] | None,
    told: str | None,
    store: Store | None,
    fetch: Fetch | None,
) -> ModelFiles:
    """The files before any that was retyped; of several projectors rather one of the type that is `told`."""
    name, quantization = split_name(model) if isinstance(model, str) else ("", None)
    if (named := _named_card(name, model)) is not None:
        return _of_card(_CardSearch(named, quantization, told or named.mmproj_type, store), mmproj, fetch)
    path = _place("model", model)
    if not exists(path):
        raise _unknown(model)
    beside = read_folder(path) if path.is_dir() else None
    text = _text_model(path) if beside is None else only_text_model(beside)
    card = _card_of(text, store)
    return replace(_paired(text, mmproj, told or (card.mmproj_type if card else None), beside), card=card)


def _named_card(name: str, model: str | PathLike[str]) -> ModelCard | None:
    try:
        return find_card(name)
    except ModelFileError:  # of the user's cards, which a file has no need of
        if exists(_place("model", model)):
            return None
        raise


def _unknown(model: str | PathLike[str]) -> ModelFileError:
    given = fspath(model)
    if isinstance(model, PathLike) and split_name(given)[0].lower() in readable_cards():
        return ModelFileError(f"{given!r} is a model's name and no file or folder: give it as a str, not as a path")
    return ModelFileError(
        f"{given!r} does not exist{folder_aside()}: give a text model's .gguf file, a folder that holds one, or a "
        f"model's name; {hint(given)}"
    )


def locate_card(card: ModelCard, quantization: str | None = None, mmproj_type: str | None = None) -> CardPaths:
    """Where a card's files lie; the projector of `mmproj_type` goes before the others.

    Raises InputError for a quantization that the card has not.
    """
    texts = card.text.values() if quantization is None else [card.text_file(quantization)]
    kinds = _by_type(card, mmproj_type)
    return CardPaths(_first(card, texts), _first(card, [card.projector[kind] for kind in kinds]))


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
        self._told: set[str] = set()

    def text(self) -> GgufFile | None:
        """The text model. Raises InputError for a quantization that the card has not, and what `_found` raises."""
        card = self.card
        texts = card.text.values() if self.quantization is None else [card.text_file(self.quantization)]

        def read(path: Path) -> GgufFile:
            text = _text_model(path)
            self._check_family(text)
            return text

        return self._found(self._places(texts), read)

    def projector(self, text: GgufFile) -> GgufFile | None:
        """The projector: of the wanted type if there is one, and rather from the text model's own folder.

        Many makers call it the same for every model: `unfit` are files of its name that do not fit. Raises
        ModelFileError where the content of all is known to be wrong.
        """

        def read(path: Path) -> GgufFile:
            projector = gguf_file.read(path)
            gguf_check.check_projector(projector)
            self._check_family(projector)
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
            self._warn(f"no projector file of {self.card.name} is used: {error}")
            self.unfit = [path for path, _ in found]
            return None

    def _places(self, files: Iterable[CardFile]) -> Iterator[tuple[Path, CardFile]]:
        for file in files:
            known = published.complete(self.card, file)
            yield from ((path, known) for path in places(self.card, known, warn=self._warn))

    def _warn(self, said: str) -> None:
        """Warn once, also where what was missing was fetched and all is searched again."""
        if said not in self._told:
            logger.warning("%s", said)
        self._told.add(said)

    def _check_family(self, gguf: GgufFile) -> None:
        found = gguf_check.families(gguf)
        if self.card.family not in found:
            raise ModelFileError(
                f"{gguf.path} is of the family {' or '.join(found)}, but {self.card.name} has {self.card.family} as "
                "family on its card: correct the card, or give the file's path in place of the name"
            )

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
                self._warn(f"passed over for {path}: {reason}")
            if file.sha256 is not None:
                self.verified.append(path)
            return found
        if wrong:
            raise wrong[0]
        return None

    def _differs(self, path: Path, expected: str, actual: str) -> ModelFileError:
        return ModelFileError(
            f"{path} is not the file that {self.card.name} means: its SHA-256 is {actual}, expected {expected}: "
            f"{remedy.replace_damaged(self.card, path)}, or give its path in place of the name to use it all the same"
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
        raise ModelFileError(remedy.none_here(card, quantization))
    if files.projector is None:
        unfit = f" ({', '.join(map(str, search.unfit))} is of another model)" if search.unfit else ""
        missing = remedy.one_missing(card, "projector", files.text.path, aside=unfit)
        files = replace(files, missing=f"{missing}, or use a saved look")
    _warn_of_length(card, files.text)
    return replace(files, card=card, verified=tuple(search.verified))


def _warn_of_length(card: ModelCard, text: GgufFile) -> None:
    trained = text.metadata.get(f"{text.architecture}.context_length")
    if card.n_ctx is not None and isinstance(trained, int) and card.n_ctx > trained:
        logger.warning(
            "%s has %d as n_ctx on its card, but %s was trained for %d, which is taken: correct the card",
            *(card.name, card.n_ctx, text.path.name, trained),
        )


def _on_disk(search: _CardSearch, mmproj: str | PathLike[str] | None) -> ModelFiles | None:
    """The card's files, or its text model with a projector that fits; None where there is no text model."""
    text = search.text()
    if text is None:
        return None
    projector = None if mmproj is not None else search.projector(text)
    search.paired = projector is not None
    if projector is None:
        return _paired(text, mmproj, search.mmproj_type, None)
    if projector.path not in search.verified:
        warn_of_names(text, projector)
    return ModelFiles(text, projector, chosen=None)


def _by_type(card: ModelCard, mmproj_type: str | None) -> list[str]:
    return sorted(card.projector, key=lambda kind: kind.lower() != (mmproj_type or "").lower())


def _first(card: ModelCard, files: Iterable[CardFile]) -> Path | None:
    return next((path for file in files if (path := locate(card, file)) is not None), None)


def _card_of(text: GgufFile, store: Store | None) -> ModelCard | None:
    """The card that a file given by its path belongs to, by the published name and size."""
    for card in readable_cards().values():
        for file in card.text.values() if card.family in gguf_check.families(text) else ():
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


def _in_type(files: ModelFiles, told: str | None, store: Store | None, *, named: bool) -> ModelFiles:
    """The files with the projector in the type wanted: `told` by the caller if `named`, else by the environment.

    Where there is none of it the caller, who named the type, is told; otherwise only those are who bring a picture.
    The environment's word is about models of one's own: beside the one in the package no file can be made.
    """
    if files.projector is None:
        return files
    if not named and retype.is_shipped(files.projector):
        told = None
    wanted = told or (files.card.mmproj_type if files.card else None)
    if wanted is None:
        return files
    found = retype.in_type(files.projector, wanted, store)
    if found is None:
        reason = retype.none_made(files.projector, wanted)
        if named:
            raise ModelFileError(reason)
        who, undo = (retype.TYPE_VARIABLE, "unset it") if told else ("the model's card", "take mmproj_type out of it")
        missing = f"{who} asks for the projector in {wanted}, but {reason}, or {undo}"
        return replace(files, projector=None, missing=missing)
    gguf_check.check_pair(files.text, found)
    return files if found is files.projector else replace(files, projector=found, chosen=None)


def _paired(
    text: GgufFile, mmproj: str | PathLike[str] | None, mmproj_type: str | None, beside: FolderFiles | None
) -> ModelFiles:
    """The text model with the named projector, or with the one `beside` it that fits."""
    if mmproj is None:
        if beside is None:
            beside = read_folder(text.path.parent)
            beside.warn()
        return _with_fitting_projector(text, beside, mmproj_type)
    path = _place("mmproj", mmproj)
    if path.is_dir():
        inside = read_folder(path)
        inside.warn()
        projector, missing = fitting_projector(text, inside, mmproj_type)
        if projector is None:
            raise ModelFileError(f"{missing}: give the projector file itself")
    else:
        projector = gguf_file.read(path)
    gguf_check.check_projector(projector)
    gguf_check.check_pair(text, projector)
    return ModelFiles(text, projector, chosen=projector)


def _with_fitting_projector(text: GgufFile, beside: FolderFiles, mmproj_type: str | None) -> ModelFiles:
    projector, missing = fitting_projector(text, beside, mmproj_type)
    if projector is not None:
        warn_of_names(text, projector)
        return ModelFiles(text, projector, chosen=None)
    missing += ", and looking at a picture needs one: give mmproj= or --mmproj, or use a saved look"
    return ModelFiles(text, None, chosen=None, missing=missing)


def _place(what: str, given: str | PathLike[str]) -> Path:
    """The path that was given; where nothing is there and it is a name alone, the one in the folders of models."""
    path = _path(what, given)
    return path if exists(path) or len(path.parts) != 1 else find_named(path.name) or path


def _path(what: str, given: str | PathLike[str]) -> Path:
    path = fspath(given) if isinstance(given, str | PathLike) else given
    if not isinstance(path, str) or not path or "\0" in path:
        raise ModelFileError(f"{what} is {given!r}: give the path of a .gguf file")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # a home folder that nobody has
        raise ModelFileError(f"{what} is {given!r} ({error}): give the path of a .gguf file") from error
