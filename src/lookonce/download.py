"""A card's files, fetched from Hugging Face or ModelScope and verified before they get their names.

Without a folder they go to the hub's own cache, which other tools share. What is on the disk already and right is not
fetched, and nothing but a partial file of our own is ever deleted.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Final, Literal, get_args

from lookonce import published
from lookonce.byte_size import format_size
from lookonce.cards import CardFile, ModelCard, user_file
from lookonce.errors import DownloadError, InputError, ModelFileError, StoreError
from lookonce.fingerprint import fingerprint_of, hash_files, remember_fingerprint
from lookonce.hub import Hub, HubFile, HubUnavailable, Source
from lookonce.hub_huggingface import HuggingFace
from lookonce.hub_modelscope import INSTALL, ModelScope
from lookonce.model_folders import candidates
from lookonce.partial_file import PartialFile
from lookonce.store import Store

__all__ = ["PullStep", "PulledFile", "PulledFiles", "SourceChoice", "pull"]

SourceChoice = Literal["auto", "huggingface", "modelscope"]

_PAUSE_S: Final = 1.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PullStep:
    """How far one file has come; `waiting` is for another process that fetches it."""

    file: str
    doing: Literal["fetching", "checking", "waiting"]
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class PulledFile:
    """A verified file on the disk; `source` is where it was fetched from, None where it was there."""

    path: Path
    size_bytes: int
    sha256: str | None
    source: Source | None


@dataclass(frozen=True, slots=True)
class PulledFiles:
    """A model's two files."""

    text_file: PulledFile
    projector_file: PulledFile

    @property
    def text(self) -> Path:
        """The text model."""
        return self.text_file.path

    @property
    def projector(self) -> Path:
        """Its projector file."""
        return self.projector_file.path


def pull(
    card: ModelCard,
    *,
    quant: str | None = None,
    projector_type: str | None = None,
    source: SourceChoice = "auto",
    folder: str | PathLike[str] | None = None,
    progress: Callable[[PullStep], object] | None = None,
) -> PulledFiles:
    """Have a card's two files on the disk, verified by size and SHA-256.

    quant, projector_type: which files; by default those that stand first on the card.
    source: "auto" asks Hugging Face, and ModelScope where that cannot be reached.
    folder: where the files go; by default the cache of the hub that they come from. None for a card whose files lie
        in a folder that it names.
    progress: is told of every step, from the thread that called.

    What was cut off before is gone on with. Safe with several processes. Raises InputError for options that the card
    cannot meet, and DownloadError, with what to do, for everything that happens on the way.
    """
    if source not in get_args(SourceChoice):
        raise InputError(f"source is {source!r}: choose one of {', '.join(get_args(SourceChoice))}")
    wanted = (card.text_file(quant), card.projector_file(projector_type))
    tell = progress or (lambda _: None)
    if card.folder is not None:
        if folder is not None:
            raise InputError(
                f"the files of {card.name} lie in {card.folder} already: leave out the folder {fspath(folder)!r}"
            )
        with _open_notes() as notes:
            return PulledFiles(*(_beside(card, card.folder / file.name, file, tell, notes) for file in wanted))
    hubs = _choose_hubs(card, source)
    chosen = None if folder is None else _check_folder(folder)
    with _open_notes() as notes:
        return PulledFiles(*_Pull(card, hubs, chosen, tell, notes).run(wanted))


def _check_folder(folder: str | PathLike[str]) -> Path:
    if not fspath(folder):
        raise InputError("the folder for the model's files is '': give its path, a dot for the present one")
    try:
        found = Path(folder).expanduser().absolute()
    except RuntimeError as error:  # a home folder that nobody has
        raise InputError(f"{fspath(folder)!r} ({error}): give the path of a folder") from error
    if found.exists() and not found.is_dir():
        raise InputError(f"{folder} is a file: give a folder for the model's files")
    return found


@contextmanager
def _open_notes() -> Iterator[Store | None]:
    """The user's store, where fingerprints are noted; None where it cannot be used, which only costs time."""
    with ExitStack() as stack:
        notes = None
        with suppress(StoreError, InputError):
            notes = stack.enter_context(Store())
        yield notes


def _beside(
    card: ModelCard, path: Path, file: CardFile, progress: Callable[[PullStep], object], notes: Store | None
) -> PulledFile:
    """A file of a card that has no repository, held to what the card tells of it."""
    if not path.is_file():
        raise InputError(f"{path} does not exist, and {card.name} has no repository to fetch it from: put it there")
    size_bytes = path.stat().st_size
    _check_agreement(str(path), card, file, size_bytes=size_bytes)
    if file.sha256 is not None:
        progress(PullStep(file.name, "checking", 0, size_bytes))
        _check_agreement(str(path), card, file, sha256=fingerprint_of(path, notes))
    return PulledFile(path, size_bytes, file.sha256, None)


def _check_agreement(
    what: str, card: ModelCard, file: CardFile, *, size_bytes: int | None = None, sha256: str | None = None
) -> None:
    """Raise DownloadError where the size or hash of `what` is known and not the card's."""
    for name, theirs, ours in (("SHA-256", sha256, file.sha256), ("size in bytes", size_bytes, file.size_bytes)):
        if theirs is not None and ours is not None and theirs != ours:
            raise DownloadError(
                f"{what} is not the file that {card.name} means: its {name} is {theirs}, expected {ours}: "
                f"update lookonce, or correct the card in {user_file()}"
            )


def _choose_hubs(card: ModelCard, source: SourceChoice) -> Sequence[tuple[Hub, str]]:
    """The hubs to ask, in order, each with the card's repository there."""
    hubs: list[tuple[Hub, str]] = []
    if card.huggingface and source != "modelscope":
        hubs.append((HuggingFace(card.revision), card.huggingface))
    if card.modelscope and source != "huggingface":
        hub = ModelScope()
        if source == "modelscope" and not hub.is_installed():
            raise InputError(f"fetching from ModelScope needs its package: {INSTALL}")
        hubs.append((hub, card.modelscope))
    if not hubs:
        raise InputError(f"{card.name} is not on {source}: leave --source out")
    return hubs


class _Pull:
    """One call of `pull`."""

    def __init__(
        self,
        card: ModelCard,
        hubs: Sequence[tuple[Hub, str]],
        folder: Path | None,
        progress: Callable[[PullStep], object],
        notes: Store | None,
    ) -> None:
        self._card: Final = card
        self._hubs: Final = hubs
        self._folder: Final = folder
        self._progress: Final = progress
        self._notes: Final = notes

    def run(self, wanted: Sequence[CardFile]) -> list[PulledFile]:
        found = {file.name: present for file in wanted if (present := self._present(file))}
        missing = [file for file in wanted if file.name not in found]
        if missing:
            self._refuse_offline(missing)
            self._fetch_all(missing, found)
        return [found[file.name] for file in wanted]

    def _present(self, file: CardFile) -> PulledFile | None:
        """The file where it is on the disk already, whole and known to be right; asks no hub."""
        known = published.complete(self._card, file)
        places = [self._folder / Path(file.name).name] if self._folder else candidates(self._card, file)
        for path in places:
            if known.sha256 and self._is(path, known):
                return PulledFile(path, path.stat().st_size, known.sha256, None)
        return None

    def _is(self, path: Path, known: CardFile) -> bool:
        """Whether a file is the one that is known; what was read of it before is not read again."""
        try:
            size_bytes = path.stat().st_size
            if known.size_bytes not in (None, size_bytes):
                return False
            self._tell(known.name, "checking", 0, size_bytes)
            return fingerprint_of(path, self._notes) == known.sha256
        except (OSError, ModelFileError):
            return False

    def _refuse_offline(self, missing: Sequence[CardFile]) -> None:
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            names = " and ".join(file.name for file in missing)
            raise DownloadError(
                f"{names} of {self._card.name} cannot be fetched while HF_HUB_OFFLINE is set, and no verified copy is "
                "on the disk: unset it and pull again"
            )

    def _fetch_all(self, missing: Sequence[CardFile], found: dict[str, PulledFile]) -> None:
        """Add to `found` what is missing, from the first hub that can be reached."""
        reasons: list[str] = []
        for number, (hub, repository) in enumerate(self._hubs):
            try:
                self._fetch_from(hub, repository, missing, found)
            except HubUnavailable as error:
                reasons.append(f"{hub.title} cannot be reached ({error})")
                if number + 1 < len(self._hubs):
                    _logger.warning("%s: trying %s", reasons[-1], self._hubs[number + 1][0].title)
            else:
                return
        raise DownloadError(f"{'; '.join(reasons)}: check the network and pull again, which goes on from here")

    def _fetch_from(self, hub: Hub, repository: str, missing: Sequence[CardFile], found: dict[str, PulledFile]) -> None:
        wanted = [(file, self._describe(hub, repository, file)) for file in missing if file.name not in found]
        with _disk_errors(self._partial(hub, wanted[0][1]).target.parent):
            self._check_room(hub, wanted)
        for file, described in wanted:
            found[file.name] = self._fetch(hub, file, described)

    def _describe(self, hub: Hub, repository: str, file: CardFile) -> HubFile:
        """The file as the hub has it, with a size and a hash that agree with the card's."""
        found = hub.describe(repository, file.name)
        what = f"{file.name} on {hub.title}"
        _check_agreement(what, self._card, file, size_bytes=found.size_bytes, sha256=found.sha256)
        sha256, size_bytes = file.sha256 or found.sha256, file.size_bytes or found.size_bytes
        if sha256 is None or size_bytes is None:
            raise DownloadError(
                f"{hub.title} publishes no SHA-256 or size of {file.name}, which could not be verified: "
                f"write them on a card of your own in {user_file()}"
            )
        return HubFile(found.repository, found.name, found.revision, found.label, size_bytes, sha256)

    def _check_room(self, hub: Hub, wanted: Sequence[tuple[CardFile, HubFile]]) -> None:
        """Refuse before the first byte what the disk has no room for."""
        parts = [self._partial(hub, described) for _, described in wanted]
        needed = sum(described.size_bytes or 0 for _, described in wanted)
        needed -= sum(part.target.stat().st_size if part.target.exists() else part.size_bytes for part in parts)
        folder = next(one for one in parts[0].target.parents if one.exists())
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise DownloadError(
                f"{self._card.name} needs {format_size(needed)} more and {folder} has {format_size(free)} free: "
                "free some space, or give a folder on another disk with --to"
            )

    def _partial(self, hub: Hub, file: HubFile) -> PartialFile:
        target = self._folder / Path(file.name).name if self._folder else hub.place(file)
        total = file.size_bytes or 0
        return PartialFile(
            target, file.sha256 or "", waiting=lambda done: self._tell(file.name, "waiting", done, total)
        )

    def _fetch(self, hub: Hub, file: CardFile, described: HubFile) -> PulledFile:
        part = self._partial(hub, described)
        verified = CardFile(file.name, described.size_bytes, described.sha256)
        fetched = False
        with _disk_errors(part.target.parent):
            if not self._settled(part.target, verified):
                with part:
                    # Another process may have finished it while this one waited.
                    if not self._settled(part.target, verified):
                        self._transfer(hub, described, part)
                        fetched = self._finish(part, verified)
            path = part.target if self._folder else hub.publish(described)
            if part.is_at(path):
                if self._notes is not None:
                    remember_fingerprint(path, verified.sha256 or "", self._notes)
            elif not self._settled(path, verified):  # in the cache, a file under the name that others know
                raise DownloadError(f"{path} was deleted while it was fetched: pull again")
        if file.sha256 is None:
            _keep(hub, described.repository, verified)
        return PulledFile(path, described.size_bytes or 0, described.sha256, hub.source if fetched else None)

    def _finish(self, part: PartialFile, verified: CardFile) -> bool:
        """Give the file its name. False where another process has done so; raises where the name is another file's."""
        try:
            part.finish()
        except FileExistsError:
            if not self._settled(part.target, verified):
                raise
            part.discard()
            return False
        return True

    def _settled(self, target: Path, verified: CardFile) -> bool:
        """Whether the file has its name already. Raises DownloadError where another file has it."""
        if not target.exists():
            return False
        if self._is(target, verified):
            return True
        raise DownloadError(
            f"{target} exists and is not {verified.name}: its SHA-256 is {hash_files([target])}, expected "
            f"{verified.sha256}: move or delete it, and pull again"
        )

    def _transfer(self, hub: Hub, file: HubFile, part: PartialFile) -> None:
        """Fill the partial file and verify it; what is wrong is deleted."""
        was_begun = part.size_bytes > 0
        self._complete(hub, file, part)
        actual = self._read_hash(file, part)
        if actual != file.sha256 and (was_begun or part.size_bytes != file.size_bytes):
            # What came now may be right and what it was added to not, as after a power cut: once more, all of it.
            _logger.warning("%s does not fit what was fetched of it before: fetching all of it again", file.name)
            part.clear()
            self._complete(hub, file, part)
            actual = self._read_hash(file, part)
        if actual != file.sha256:
            part.discard()
            raise DownloadError(
                f"{file.name} came damaged from {hub.title} and was deleted: its SHA-256 is {actual}, expected "
                f"{file.sha256}: pull again, or give another --source"
            )

    def _complete(self, hub: Hub, file: HubFile, part: PartialFile) -> None:
        """Fetch what is lacking. A transfer that is cut off goes on, until two in a row have brought nothing."""
        total = file.size_bytes or 0
        if part.size_bytes > total:
            part.clear()
        was_idle = False
        while (before := part.size_bytes) < total:
            self._tell(file.name, "fetching", before, total)
            failure = HubUnavailable("it sends nothing")
            try:
                hub.fetch(file, part.path, total, lambda done: self._tell(file.name, "fetching", done, total))
            except HubUnavailable as error:
                failure = error
            is_idle = part.size_bytes <= before
            if is_idle and was_idle:
                raise failure
            if is_idle:
                time.sleep(_PAUSE_S)
            was_idle = is_idle
        self._tell(file.name, "fetching", part.size_bytes, total)

    def _read_hash(self, file: HubFile, part: PartialFile) -> str:
        total = file.size_bytes or 0
        return part.fingerprint(lambda done: self._tell(file.name, "checking", done, total))

    def _tell(self, name: str, doing: Literal["fetching", "checking", "waiting"], done: int, total: int) -> None:
        self._progress(PullStep(name, doing, done, total))


def _keep(hub: Hub, repository: str, verified: CardFile) -> None:
    try:
        published.remember(repository, verified, revision=hub.revision, source=hub.source)
    except OSError as error:  # the file itself is right
        _logger.warning("the hash of %s is not kept (%s): the next pull asks the hub", verified.name, error)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DownloadError(
            f"{folder} cannot be written to ({error.strerror or error}): free some space or check its permissions, "
            "or give another folder with --to"
        ) from error
