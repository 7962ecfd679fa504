"""What to tell someone whose model is not on this disk, or only in part, or damaged: which command fetches what.

Knows cards and where their files may lie, and nothing of what is in a file.
"""

import shlex
from pathlib import Path
from typing import Final, Literal

from lookonce.byte_size import format_size
from lookonce.cards import CardFile, ModelCard
from lookonce.model_folders import folder_aside, published_name, repository_folders

__all__ = ["Kind", "none_here", "one_missing", "pull_command", "replace_damaged", "type_of"]

Kind = Literal["text", "projector"]

_CALLED: Final = {"text": "text model", "projector": "projector"}


def pull_command(
    card: ModelCard, quantization: str | None = None, projector_type: str | None = None, folder: Path | None = None
) -> str:
    """The command that fetches a card's files, of the given types where these are not the card's first."""
    words = ["lookonce", "pull", card.name]
    for option, wanted, files in (
        ("--quant", quantization, card.text),
        ("--mmproj-type", projector_type, card.projector),
    ):
        if wanted is not None and wanted.lower() != next(iter(files)).lower():
            words += [option, wanted]
    if folder is not None:
        words += ["--to", str(folder)]
    return f"`{shlex.join(words)}`"


def none_here(card: ModelCard, quantization: str | None = None) -> str:
    """The sentence for a card of which there is nothing on this disk."""
    what = card.name if quantization is None else f"{card.name}:{quantization}"
    if card.folder is not None:
        return f"the files of {what} are not in {card.folder}: put them back, or install again"
    much = _size([card.text_file(quantization), card.projector_file()])
    command = pull_command(card, quantization)
    return f"the files of {what} are not on this disk{folder_aside()}: {command} fetches them{much}"


def one_missing(card: ModelCard, kind: Kind, other: Path, *, quantization: str | None = None, aside: str = "") -> str:
    """The sentence for a card of whose two files only `other` is here, and the one of `kind` is not.

    `quantization` is that of a missing text model, where one was asked for; `aside` stands after the fact.
    """
    file = card.text_file(quantization) if kind == "text" else card.projector_file()
    fact = f"{file.name}, the {_CALLED[kind]} of {card.name}, is not"
    if card.folder is not None:
        return f"{fact} in {card.folder}{aside}: put it back, or install again"
    if kind == "text":
        command = pull_command(card, quantization, type_of(card, "projector", other))
    else:
        command = pull_command(card, type_of(card, "text", other))
    return f"{fact} on this disk{aside}: {command} fetches it{_size([file])}"


def replace_damaged(card: ModelCard, path: Path) -> str:
    """What to do about a card's file that is not what it should be."""
    if card.folder is not None:
        return "install again"
    real, linked = path, ""
    if path.is_symlink():  # as in Hugging Face's cache: without its content the link is set right by the next pull
        real, linked = path.resolve(), ", which it links to"
    in_cache = any(path.is_relative_to(folder) for folder in repository_folders(card))
    types = (type_of(card, "text", path), type_of(card, "projector", path))
    return (
        f"delete {real}{linked}, then {pull_command(card, *types, None if in_cache else path.parent)} fetches it again"
    )


def type_of(card: ModelCard, kind: Kind, path: Path) -> str | None:
    """Which of a card's files one of that name is, by quantization or type; None where it is none."""
    files = card.text if kind == "text" else card.projector
    return next((one for one, file in files.items() if published_name(card, file, path.name)), None)


def _size(files: list[CardFile]) -> str:
    sizes = [file.size_bytes for file in files]
    known = format_size(sum(size for size in sizes if size))
    return f", {known}" if all(sizes) else f", more than {known}" if any(sizes) else ""
