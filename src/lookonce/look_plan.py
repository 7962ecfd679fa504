"""What `lookonce look` and `lookonce extract` are about to do, found out before any of it is done.

Owns where each picture's look or stages will be saved, and the first opening of every picture. Knows nothing of models.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lookonce.errors import InputError

__all__ = ["PlannedLook", "PlannedStages", "check_file", "check_picture", "plan_looks", "plan_stages"]

_SUFFIXES: Final = (".safetensors", ".pt")


@dataclass(frozen=True, slots=True)
class PlannedLook:
    """A picture, and the file its look will be saved in; None keeps the look in the store alone."""

    picture: str
    target: Path | None


@dataclass(frozen=True, slots=True)
class PlannedStages:
    """Pictures that go into one prompt, and the folder for what becomes of them."""

    pictures: tuple[str, ...]
    folder: Path


def plan_looks(pictures: Sequence[str], output: str | None) -> list[PlannedLook]:
    """Give each picture its file. Nothing is written yet, and no picture opened.

    Raises InputError where two would share a file, or where the output is neither a folder nor a saved look's name.
    """
    if output is None:
        return [PlannedLook(picture, None) for picture in pictures]
    path = Path(output).expanduser()
    if path.is_dir() or output.endswith(("/", "\\")):
        return _plan_folder(pictures, path)
    if len(pictures) > 1:
        raise InputError(f"--output {output!r} is one file for {len(pictures)} pictures: end a folder's name in /")
    check_target(path)
    return [PlannedLook(pictures[0], path)]


def plan_stages(pictures: Sequence[str], outdir: str, *, together: bool) -> list[PlannedStages]:
    """Give each picture, or all of them together, the folder of its name. Nothing is made yet, no picture opened.

    Raises InputError where two would share a folder, where it cannot be made, and for a saved look.
    """
    folder = Path(outdir).expanduser()
    _check_folder(folder, "--outdir")
    for picture in pictures:
        if Path(picture).suffix.lower() in _SUFFIXES:
            raise InputError(f"{picture!r} is a saved look or chat, which holds no stages: give the picture itself")
    groups = [tuple(pictures)] if together else [(picture,) for picture in pictures]
    planned = [PlannedStages(group, folder / Path(group[0]).stem) for group in groups]
    if not together:
        _refuse_same_stems(pictures, [str(one.folder) for one in planned], "extract them one by one")
    for one in planned:
        if one.folder.exists() and not one.folder.is_dir():
            raise InputError(f"{str(one.folder)!r} is a file, and the stages' folder was to be there: give another")
    return planned


def check_target(path: Path) -> None:
    """Refuse a file that a look could not be saved in. Raises InputError."""
    if path.suffix.lower() not in _SUFFIXES:
        raise InputError(f"{str(path)!r} is no name for a saved look: end it in .safetensors or .pt, a folder's in /")
    if path.suffix.lower() == ".pt" and importlib.util.find_spec("torch") is None:
        raise InputError(f"{str(path)!r} needs torch, which is not installed: save a .safetensors file instead")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"{str(path)!r} cannot be written: its folder must exist, and it must be no folder itself")


def check_picture(picture: str) -> None:
    """Open and decode a picture, or a saved look, and forget it again. Raises PictureError and SavedLookError."""
    if Path(picture).suffix.lower() in _SUFFIXES:
        from lookonce.embedding import ImageEmbedding

        ImageEmbedding.load(picture)
        return
    from lookonce import images

    images.open_picture(images.read_source(picture), picture)


def check_file(picture: str) -> None:
    """Read a picture's header, or a saved look's file: its content is decoded once, when it is used.

    Raises PictureError.
    """
    from lookonce import images

    if Path(picture).suffix.lower() in _SUFFIXES:
        images.read_source(picture)
    else:
        images.check_header(picture, picture)


def _plan_folder(pictures: Sequence[str], folder: Path) -> list[PlannedLook]:
    _check_folder(folder, "--output")
    planned = [PlannedLook(picture, folder / f"{Path(picture).stem}{_SUFFIXES[0]}") for picture in pictures]
    _refuse_same_stems(pictures, [str(one.target) for one in planned], "look at them one by one")
    return planned


def _check_folder(folder: Path, option: str) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{option} {str(folder)!r} is a file, and a folder was expected: give another")
    if not folder.exists() and not folder.absolute().parent.is_dir():
        raise InputError(f"{option} {str(folder)!r} cannot be made: the folder around it does not exist")


def _refuse_same_stems(pictures: Sequence[str], targets: Sequence[str], otherwise: str) -> None:
    earlier: dict[str, str] = {}
    for picture, target in zip(pictures, targets, strict=True):
        # Many disks hold Cat.safetensors and cat.safetensors to be one file.
        stem = Path(picture).stem.casefold()
        if stem in earlier:
            raise InputError(
                f"{earlier[stem]!r} and {picture!r} would both be saved as {target}: give them other names, or "
                f"{otherwise}"
            )
        earlier[stem] = picture
