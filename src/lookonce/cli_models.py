"""The commands about models known by name: `lookonce models list|show|verify|where|retype`.

Only the last loads the native library.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from lookonce.byte_size import format_size
from lookonce.cli_option import JsonFlag, StoreFolder, gather, open_store
from lookonce.cli_retype import RETYPE_EPILOG, retype
from lookonce.errors import InputError, ModelFileError
from lookonce.terminal import FAILURE, status, write, write_json

if TYPE_CHECKING:
    from lookonce.cards import CardFile, ModelCard

__all__ = ["models_app"]

_KINDS: Final = ("text", "projector")

models_app = typer.Typer(help="See the models known by name, where they are, and whether they are whole.")

_Name = Annotated[str, typer.Argument(metavar="NAME", help="A card's name.")]
_Names = Annotated[list[str] | None, typer.Argument(metavar="[NAME...]", help="Cards. Default: all.")]


@dataclass(frozen=True, slots=True)
class _FoundFile:
    """A card's file; `path` is where it lies, None where it is not on this disk."""

    card: str
    kind: str
    type: str
    file: "CardFile"
    path: Path | None

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind, "type": self.type, **asdict(self.file), "path": self.path}


@models_app.callback(invoke_without_command=True)
def models(context: typer.Context) -> None:
    """See the models known by name, where they are, and whether they are whole."""
    if context.invoked_subcommand is None:
        write(context.get_help() + "\n")


@models_app.command("list")
@gather
def list_(json_: JsonFlag = False) -> None:
    """List the cards: name, size of the pair, licence, and where it is on this disk."""
    from lookonce.cards import read_cards, user_file
    from lookonce.model_files import locate_card

    rows = []
    for card in read_cards().values():
        found = locate_card(card)
        folder = None if found.text is None or found.projector is None else found.text.parent
        rows.append((card, _pair_size(card), folder))
    if json_:
        names = ("name", "size_bytes", "licence", "folder")
        write_json([dict(zip(names, (card.name, size, card.licence, at), strict=True)) for card, size, at in rows])
        return
    width = max(len(card.name) for card, _, _ in rows)
    for card, size_bytes, folder in rows:
        size = "-" if size_bytes is None else format_size(size_bytes)
        write(f"{card.name:<{width}}  {size:>8}  {card.licence:<20}  {folder or 'not on this disk'}\n")
    write(f"\n`lookonce pull NAME` fetches one. Your own cards: {user_file()}\n")


@models_app.command()
@gather
def show(*, name: _Name, json_: JsonFlag = False) -> None:
    """Show a card: its repositories, options, and files with sizes and hashes."""
    card = _card(name)
    found = list(_files(card))
    facts = {field: getattr(card, field) for field in type(card).__slots__ if field not in _KINDS}
    if json_:
        write_json({**facts, "files": [one.facts() for one in found]})
        return
    write("".join(f"{field:<12} {value}\n" for field, value in facts.items() if value is not None))
    for one in found:
        size = "size not known" if one.file.size_bytes is None else format_size(one.file.size_bytes)
        write(f"\n{one.kind} {one.type}: {one.file.name}, {size}\n")
        write(f"  sha256 {one.file.sha256 or 'not known'}\n  {one.path or 'not on this disk'}\n")


@models_app.command()
@gather
def where(*, name: _Name, json_: JsonFlag = False) -> None:
    """Print the paths of a card's files on this disk; status 1 where there are none."""
    found = [one for one in _files(_card(name)) if one.path is not None]
    if json_:
        write_json([one.facts() for one in found])
    else:
        write("".join(f"{one.path}\n" for one in found))
    if not found:
        raise typer.Exit(FAILURE)


@models_app.command()
@gather
def verify(*, names: _Names = None, store: StoreFolder = None, json_: JsonFlag = False) -> None:
    """Read the files of cards on this disk and compare their size and SHA-256.

    Status 1 where one differs, and where nothing of a card that was named is on
    this disk. Without a known hash a file is reported as not known. NAME may
    also be the path of a .gguf file: it is checked against the cards of its name.
    """
    wanted = _wanted(names)
    bad = False
    results = []
    with open_store(store) as notes:
        from lookonce.fingerprint import Fingerprint

        for path, meant in _by_path(wanted).items():
            with status(f"Reading {path}"):
                actual = Fingerprint(path, notes).read()
            one, verdict = _judge(meant, actual, path.stat().st_size)
            bad |= verdict == "damaged"
            results.append({**one.facts(), "actual_sha256": actual, "verdict": verdict})
            if not json_:
                _print_verdict(one, actual, verdict)
    absent = _absent(wanted)
    if json_:
        write_json(results)
    elif not results:
        write("none of these models is on this disk\n")
    elif names:
        write("".join(f"{name}: not on this disk\n" for name in absent))
    if bad or (names and absent):
        raise typer.Exit(FAILURE)


models_app.command(epilog=RETYPE_EPILOG)(retype)


def _by_path(found: list[_FoundFile]) -> dict[Path, list[_FoundFile]]:
    """What lies on this disk, each file with all that it may be: on many cards files have the same name."""
    meant: dict[Path, list[_FoundFile]] = {}
    for one in found:
        if one.path is not None:
            meant.setdefault(one.path, []).append(one)
    return meant


def _absent(found: list[_FoundFile]) -> list[str]:
    """The cards of which there is nothing on this disk."""
    here = {one.card for one in found if one.path is not None}
    return [name for name in dict.fromkeys(one.card for one in found) if name not in here]


def _judge(meant: list[_FoundFile], actual: str, size_bytes: int) -> tuple[_FoundFile, str]:
    """A file is whole if it is what one card means, and damaged if it has a card's size but not its content."""
    verdicts = [(one, _verdict(one, actual, size_bytes)) for one in meant]
    ranks = {"whole": 0, "damaged": 1, "unknown": 2}
    return min(verdicts, key=lambda found: ranks[found[1]] + 3 * (found[0].file.size_bytes not in (None, size_bytes)))


def _verdict(one: _FoundFile, actual: str, size_bytes: int) -> str:
    if one.file.size_bytes not in (None, size_bytes) or one.file.sha256 not in (None, actual):
        return "damaged"
    return "unknown" if one.file.sha256 is None else "whole"


def _print_verdict(one: _FoundFile, actual: str, verdict: str) -> None:
    said = {
        "whole": "whole",
        "unknown": f"sha256 {actual}, which no card tells",
        "damaged": f"DAMAGED: sha256 is {actual}, but {one.file.sha256 or 'another size'} was expected: fetch it again",
    }
    write(f"{one.path}: {said[verdict]}\n")


def _wanted(names: list[str] | None) -> list[_FoundFile]:
    from lookonce.cards import find_card, read_cards

    if not names:
        return [one for card in read_cards().values() for one in _files(card, any_size=True)]
    wanted: list[_FoundFile] = []
    for name in names:
        card = find_card(name)
        if card is None and name.endswith(".gguf"):
            wanted += _named_file(Path(name))
        else:
            wanted += _files(_card(name), any_size=True)
    return wanted


def _named_file(path: Path) -> Iterator[_FoundFile]:
    from lookonce import published
    from lookonce.cards import read_cards
    from lookonce.model_folders import published_name

    if not path.exists():
        raise ModelFileError(f"{path} does not exist: check the path")
    known = [
        _FoundFile(card.name, kind, type_, published.complete(card, file), path)
        for card in read_cards().values()
        for kind in _KINDS
        for type_, file in getattr(card, kind).items()
        if published_name(card, file, path.name)
    ]
    if not known:
        raise InputError(f"no card has a file {path.name!r}: give a card's name, or a file as it is published")
    yield from known


def _files(card: "ModelCard", *, any_size: bool = False) -> Iterator[_FoundFile]:
    from lookonce import published
    from lookonce.model_folders import locate

    for kind in _KINDS:
        for type_, file in getattr(card, kind).items():
            known = published.complete(card, file)
            path = locate(card, known)
            if path is None and any_size:
                path = locate(card, known, any_size=True)
            yield _FoundFile(card.name, kind, type_, known, path)


def _card(name: str) -> "ModelCard":
    from lookonce.cards import choose_card

    return choose_card(name)


def _pair_size(card: "ModelCard") -> int | None:
    text, projector = card.text_file().size_bytes, card.projector_file().size_bytes
    return None if text is None or projector is None else text + projector
