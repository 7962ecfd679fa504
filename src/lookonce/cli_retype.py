"""The command that writes a projector file anew in another type: `lookonce models retype`.

Loads the native library only to measure and compare.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lookonce.byte_size import format_size
from lookonce.cli_option import JsonFlag, gather
from lookonce.errors import InputError, ModelFileError
from lookonce.terminal import bar, status, write, write_json

if TYPE_CHECKING:
    from lookonce.gguf_file import GgufFile
    from lookonce.projector_choice import Choice
    from lookonce.retype import Retyped

__all__ = ["RETYPE_EPILOG", "retype"]

logger = logging.getLogger(__name__)

RETYPE_EPILOG = """[dim]lookonce models retype models/mmproj-F16.gguf --type auto

lookonce ask "What is this?" -i cat.jpg --model models --mmproj-type auto[/dim]"""


@gather
def retype(
    *,
    mmproj: Annotated[str, typer.Argument(metavar="MMPROJ", help="A projector file, or a model's name or folder.")],
    type_: Annotated[
        str,
        typer.Option("--type", metavar="TYPE", help="BF16, F16, Q8_0, or auto: the fastest here.", show_default=True),
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="CPU threads to measure with. Default: the physical cores.")
    ] = None,
    json_: JsonFlag = False,
) -> None:
    """Write a projector file in another type beside the original.

    auto measures which type is the fastest on this CPU, and writes nothing
    where that is the file's own. The new file is used only where --mmproj-type,
    LOOKONCE_MMPROJ_TYPE or the model's card says so.
    """
    from lookonce import retype as retype_

    wanted = retype_.checked_type(type_, auto=True)
    original = retype_.read_original(_find_projector(mmproj))
    if threads is None:
        from lookonce.engine import physical_cores

        threads = physical_cores()
    choice = None
    if wanted == "auto":
        from lookonce.projector_choice import choose_type

        with bar(total=100, what="Measuring") as advance:
            choice = choose_type(original, threads=threads, advance=_Percent(advance))
        wanted = choice.type
    if choice is not None and choice.type == choice.own:
        _print_kept(original.path, choice, json_)
        _warn_of_another(original, original.path)
        return
    if retype_.is_shipped(original):
        raise InputError(retype_.copy_first(original))
    with bar(total=100, what="Writing") as advance:
        made = retype_.retype(original.path, wanted, advance=_Percent(advance))
    from lookonce.projector_choice import compare

    with status("Comparing both on a test picture"):
        cosine = compare(made.original, made.path, threads=threads)
    _print_made(made, cosine, choice, json_)
    if choice is not None:
        _warn_of_another(original, made.path)


def _warn_of_another(original: "GgufFile", chosen: Path) -> None:
    """Tell where `--mmproj-type auto` takes another file than was chosen: the newest that was retyped."""
    from lookonce.retype import in_type

    taken = in_type(original, "auto")
    if taken is not None and taken.path != chosen:
        logger.warning("--mmproj-type auto takes %s, which was retyped earlier: delete it, or name a type", taken.path)


class _Percent:
    """Moves a bar of a hundred parts."""

    def __init__(self, advance: Any) -> None:
        self._advance = advance
        self._shown = 0

    def __call__(self, done: int, total: int) -> None:
        percent = done * 100 // max(1, total)
        self._advance(percent - self._shown)
        self._shown = percent


def _find_projector(named: str) -> Path:
    from lookonce.cards import find_card, split_name
    from lookonce.model_files import find_files

    if find_card(split_name(named)[0]) is None and not Path(named).expanduser().is_dir():
        return Path(named).expanduser()
    found = find_files(named, retyped=False)
    if found.projector is None:
        raise ModelFileError(found.missing)
    return found.projector.path


def _print_kept(path: Path, choice: "Choice", as_json: bool) -> None:
    if as_json:
        write_json({"path": None, "type": choice.type, "original": path, "original_type": choice.own, **_told(choice)})
    else:
        write(f"{path} stays as it is: {choice.reason}\n")


def _print_made(made: "Retyped", cosine: float, choice: "Choice | None", as_json: bool) -> None:
    if as_json:
        facts = {name: getattr(made, name) for name in ("path", "type", "original", "original_type", "existed")}
        write_json({**facts, "lowest_row_cosine": cosine, **(_told(choice) if choice else {})})
        return
    if choice is not None:
        write(f"{choice.reason}\n")
    how = "was retyped before" if made.existed else "retyped"
    write(f"{made.path}: {made.type}, {format_size(made.path.stat().st_size)}, {how} from {made.original.name}\n")
    write(f"lowest cosine between a row of the two files' looks: {cosine:.7f}\n")
    write(f"to use it: --mmproj-type {made.type}, or LOOKONCE_MMPROJ_TYPE={made.type}\n")


def _told(choice: "Choice") -> dict[str, Any]:
    return {"reason": choice.reason, "times_s": dict(choice.times_s), "features": choice.features}
