"""The commands about models known by name: `lookonce models list|show|verify|where|retype`.

Only the last loads the native library.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, cast

import typer

from lookonce.byte_size import format_size
from lookonce.cli_option import JsonFlag, StoreFolder, gather, open_store
from lookonce.cli_retype import RETYPE_EPILOG, retype
from lookonce.errors import InputError, ModelFileError
from lookonce.terminal import FAILURE, one_line, status, write, write_error, write_json

if TYPE_CHECKING:
    from lookonce.cards import CardFile, ModelCard
    from lookonce.model_files import CardPaths
    from lookonce.remedy import Kind

__all__ = ["models_app"]

_KINDS: Final = ("text", "projector")

models_app = typer.Typer(help="See the models known by name, where they are, and whether they are whole.")

_Name = Annotated[str, typer.Argument(metavar="NAME", help="A card's name, or NAME:QUANT for that quantization.")]
_Names = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME...]", help="Cards, or NAME:QUANT, or .gguf files. Default: all.")
]


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
    """List the cards: name, size of the pair, licence, and which are on this disk.

    The size is that on this disk where the pair is there, else the default pair's.
    """
    from lookonce.cards import read_cards, user_file
    from lookonce.model_files import locate_card

    rows = [(card, locate_card(card)) for card in read_cards().values()]
    if json_:
        names = ("name", "size_bytes", "licence", "folder")
        facts = [(card.name, _pair_size(card, at), card.licence, _pair_folder(at)) for card, at in rows]
        write_json([dict(zip(names, one, strict=True)) for one in facts])
        return
    widths = [max(map(len, column)) for column in zip(*((card.name, card.licence) for card, _ in rows), strict=True)]
    for card, at in rows:
        size_bytes = _pair_size(card, at)
        size = "-" if size_bytes is None else format_size(size_bytes)
        write(f"{card.name:<{widths[0]}}  {size:>8}  {card.licence:<{widths[1]}}  {_presence(at)}\n")
    write("\n`lookonce pull NAME` fetches one, `lookonce models where NAME` tells its paths.\n")
    write(f"Your own cards: {user_file()}\n")


@models_app.command()
@gather
def show(*, name: _Name, json_: JsonFlag = False) -> None:
    """Show a card: its repositories, options, and files with sizes and hashes."""
    card, quantization = _card(name)
    found = list(_files(card, quantization))
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
    """Print the paths of a card's files on this disk.

    Status 1 where a text model and a projector are not both there, with the
    command that fetches what is missing.
    """
    card, quantization = _card(name)
    found = [one for one in _files(card, quantization) if one.path is not None]
    if json_:
        write_json([one.facts() for one in found])
    else:
        write("".join(f"{one.path}\n" for one in found))
    if missing := _missing(card, quantization, found):
        write_error(f"lookonce: {one_line(missing)}")
        raise typer.Exit(FAILURE)


def _missing(card: "ModelCard", quantization: str | None, found: list["_FoundFile"]) -> str:
    """What a card lacks on this disk and what fetches it; nothing where it has a pair."""
    from lookonce import remedy

    paths = {one.kind: one.path for one in reversed(found) if one.path is not None}
    if not paths:
        return remedy.none_here(card, quantization)
    for kind, other in (("text", "projector"), ("projector", "text")):
        if kind not in paths:
            return remedy.one_missing(card, cast("Kind", kind), paths[other], quantization=quantization)
    return ""


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
            cure = _cure(one) if verdict == "damaged" else None
            results.append({**one.facts(), "actual_sha256": actual, "verdict": verdict, "remedy": cure})
            if not json_:
                _print_verdict(one, actual, verdict, cure)
    absent = _absent(wanted)
    if json_:
        write_json(results)
    elif not results:
        write(f"none of these models is on this disk{_folder_aside()}\n")
    elif names:
        write("".join(f"{name}: not on this disk{_folder_aside()}\n" for name in absent))
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


def _cure(one: _FoundFile) -> str:
    from lookonce.cards import read_cards
    from lookonce.remedy import replace_damaged

    return "" if one.path is None else replace_damaged(read_cards()[one.card], one.path)


def _print_verdict(one: _FoundFile, actual: str, verdict: str, cure: str | None) -> None:
    said = {
        "whole": "whole",
        "unknown": f"sha256 {actual}, which no card tells",
        "damaged": f"DAMAGED: sha256 is {actual}, but {one.file.sha256 or 'another size'} was expected: {cure}",
    }
    write(f"{one.path}: {said[verdict]}\n")


def _wanted(names: list[str] | None) -> list[_FoundFile]:
    from lookonce.cards import find_card, read_cards, split_name

    if not names:
        return [one for card in read_cards().values() for one in _files(card, None, any_size=True)]
    wanted: list[_FoundFile] = []
    for name in names:
        if find_card(split_name(name)[0]) is None and name.endswith(".gguf"):
            wanted += _named_file(Path(name))
        else:
            wanted += _files(*_card(name), any_size=True)
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


def _files(card: "ModelCard", quantization: str | None, *, any_size: bool = False) -> Iterator[_FoundFile]:
    """A card's files, of the text models only that of a quantization where one is given."""
    from lookonce import published
    from lookonce.model_folders import locate

    for kind in _KINDS:
        for type_, file in getattr(card, kind).items():
            if kind == "projector" or quantization in (None, type_):
                known = published.complete(card, file)
                yield _FoundFile(card.name, kind, type_, known, locate(card, known, any_size=any_size))


def _card(name: str) -> "tuple[ModelCard, str | None]":
    from lookonce.cards import choose_card

    return choose_card(name)


def _folder_aside() -> str:
    from lookonce.model_folders import folder_aside

    return folder_aside()


def _pair_size(card: "ModelCard", at: "CardPaths") -> int | None:
    """The bytes of the pair on this disk, else those that are known of the card's default pair."""
    from lookonce import published

    if at.text is not None and at.projector is not None:
        return at.text.stat().st_size + at.projector.stat().st_size
    sizes = [published.complete(card, file).size_bytes for file in (card.text_file(), card.projector_file())]
    return None if sizes[0] is None or sizes[1] is None else sizes[0] + sizes[1]


def _pair_folder(at: "CardPaths") -> Path | None:
    return None if at.text is None or at.projector is None else at.text.parent


def _presence(at: "CardPaths") -> str:
    count = sum(path is not None for path in (at.text, at.projector))
    return ("not on this disk", "half on this disk", "on this disk")[count]
