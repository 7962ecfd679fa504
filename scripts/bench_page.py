"""The page of Markdown that a benchmark's results go into, between its marks, and the command line that it shows.

Knows nothing of what is measured.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lookonce.durable import write_durably
from lookonce.errors import InputError

__all__ = ["END", "begin", "read_page", "shown_command", "write_page"]

END: Final = "<!-- end of results -->"
_ANY: Final = "<!-- results:"  # what every script's first mark begins with


def begin(script: str) -> str:
    """The line before the results of a script."""
    return f"<!-- results: written by scripts/{script} -->"


def read_page(path: Path, script: str) -> tuple[str, str]:
    """What stands before a script's results and after them. Raises InputError for a page that cannot take results."""
    try:
        with path.open("r+", encoding="utf-8") as file:  # as one that can be written to as well
            page = file.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--markdown {str(path)!r} cannot be used ({reason}): give a page that is there") from error
    mark = begin(script)
    before, found, rest = page.partition(mark)
    old, end, after = rest.partition(END)
    if not found or not end:
        raise InputError(f"--markdown {str(path)!r} has not the lines {mark} and {END}: write them where results go")
    if _ANY in old:  # that END is another block's, and what lies between would be lost
        raise InputError(
            f"--markdown {str(path)!r} has no line {END} between {mark} and the next {_ANY}: write it where they end"
        )
    return f"{before}{found}", f"{end}{after}"


def write_page(path: Path, script: str, text: str) -> None:
    """Put the results between the page's marks, all of them or none. Raises what `read_page` raises, and OSError."""
    before, after = read_page(path, script)
    write_durably(path.resolve(), f"{before}\n\n{text}\n{after}".encode())


def shown_command(script: str, options: argparse.Namespace, arguments: Sequence[str]) -> str:
    """The command line as a page shows it: where files lie on this machine is nobody's business."""
    paths = {value for value in vars(options).values() if isinstance(value, Path)}

    def shown(argument: str) -> str:
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        path = Path(value)
        return f"{option}{equals}{path.name if path.is_absolute() and path in paths else value}"

    return f"python scripts/{script} {shlex.join(map(shown, arguments))}".rstrip()
