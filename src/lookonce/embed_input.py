"""What `lookonce embed` is given: texts and pictures, or lines of JSON, as rows in their order.

Owns the form of an input line, and the checks that come before any work. Knows nothing of models.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from lookonce.errors import InputError
from lookonce.look_plan import check_file

if TYPE_CHECKING:
    from lookonce.item import Item

__all__ = ["Row", "Source", "read_rows", "refuse"]

_MAX_LINE_BYTES: Final = 64 << 20
_KEYS: Final = frozenset(("id", "text", "image", "images", "instruction"))


@dataclass(frozen=True, slots=True)
class Row:
    """One thing to embed, or the problem that forbids it.

    `index` counts the rows from 0, bad ones too; `label` says to people which it is; `source` is what it was made of.
    """

    index: int
    label: str
    source: bytes
    item: "Item | None"
    id: str | int | None = None
    problem: str = ""

    @property
    def pictures(self) -> tuple[str, ...]:
        """The picture files and saved looks of the row."""
        item: Any = self.item or {}
        return (*([item["image"]] if "image" in item else ()), *item.get("images", ()))


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from: texts and pictures on the command line, or a file of JSON lines; `-` is stdin."""

    texts: tuple[str, ...]
    pictures: tuple[str, ...]
    lines: str | None

    def check(self, output: Path | None, *, skip_errors: bool) -> int | None:
        """Read all that can be read twice, and count the rows; None where they cannot be known beforehand.

        Raises InputError for wrong use, and for a bad row unless such are to be skipped: before a model is loaded.
        """
        if self.lines is None:
            return self._check_given(skip_errors)
        if self.texts or self.pictures:
            raise InputError("--input was given beside texts or pictures: give one or the other")
        path = Path(self.lines).expanduser()
        if output is not None and output.exists() and path.exists() and output.samefile(path):
            raise InputError(f"--output {str(output)!r} is the input itself: give another file")
        if self.lines == "-" or (path.exists() and not path.is_file() and not path.is_dir()):
            return None
        with self.rows() as rows:
            count = _count(rows, skip_errors)
        if not count:
            raise InputError(f"--input {self.lines!r} has no rows, there is nothing to embed: give lines of JSON")
        return count

    def _check_given(self, skip_errors: bool) -> int:
        if not self.texts and not self.pictures:
            raise InputError("there is nothing to embed: give texts, -i IMAGE, or --input FILE")
        if "-" in self.texts:
            raise InputError("'-' is no text to embed: give --input - to read JSON lines from stdin")
        if not skip_errors:
            for row in self._given():
                refuse(row)
                for picture in row.pictures:
                    check_file(picture)
        return len(self.texts) + len(self.pictures)

    def _given(self) -> list[Row]:
        items: list[tuple[str, dict[str, str]]] = [
            *((f"text {number}", {"text": text}) for number, text in enumerate(self.texts, 1)),
            *((f"picture {number}", {"image": picture}) for number, picture in enumerate(self.pictures, 1)),
        ]
        return [_row(index, label, json.dumps(item).encode()) for index, (label, item) in enumerate(items)]

    @contextmanager
    def rows(self) -> Iterator[Iterator[Row]]:
        """The rows, one at a time. Raises InputError where they cannot be read."""
        if self.lines is None:
            yield iter(self._given())
        elif self.lines == "-":
            yield read_rows(sys.stdin.buffer)
        else:
            path = Path(self.lines).expanduser()
            try:
                file = path.open("rb")
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                raise InputError(f"--input {self.lines!r} cannot be read: {reason}") from error
            with file:
                yield read_rows(file)


def _count(rows: Iterator[Row], skip_errors: bool) -> int:
    count = 0
    for row in rows:
        if not skip_errors:
            refuse(row)
        count += 1
    return count


def read_rows(lines: IO[bytes]) -> Iterator[Row]:
    """Rows of JSON lines, one at a time; an empty line is none. Raises InputError for a line beyond all measure."""
    index = number = 0
    while line := lines.readline(_MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > _MAX_LINE_BYTES:
            raise InputError(f"line {number} is longer than {_MAX_LINE_BYTES >> 20} MiB: is it a file of JSON lines?")
        line = line.strip()
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line:
            yield _row(index, f"line {number}", line)
            index += 1


def refuse(row: Row) -> None:
    """Raise InputError for a row that cannot be embedded."""
    if row.problem:
        raise InputError(f"{row.label} cannot be embedded: {row.problem}")


def _row(index: int, label: str, source: bytes) -> Row:
    own_id: str | int | None = None
    try:
        values = _parse(source)
        own_id = _checked_id(values.pop("id", None))
        return Row(index, label, source, _checked_item(values), own_id)
    except InputError as error:
        return Row(index, label, source, None, own_id, str(error))


def _parse(source: bytes) -> dict[str, Any]:
    try:
        values = json.loads(source.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError("it is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise InputError(f"it is not JSON ({error.msg} at character {error.pos + 1})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets a thousand deep
        raise InputError("it is JSON beyond all measure") from error
    if not isinstance(values, dict):
        raise InputError(f"it is {_kind(values)}, and an object with text, image or images was expected")
    if unknown := set(values) - _KEYS:
        raise InputError(f"it has the key {min(unknown)!r}: use {', '.join(sorted(_KEYS))}")
    return {key: value for key, value in values.items() if value is not None}


def _checked_id(value: object) -> str | int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
        raise InputError(f"its id is {_kind(value)}: give a text or a whole number")
    return value


def _checked_item(values: dict[str, Any]) -> "Item":
    for key in ("text", "image", "instruction"):
        if key in values:
            _check_text(f"its {key}", values[key])
    pictures = values.get("images", [])
    if not isinstance(pictures, list):
        raise InputError(f"its images are {_kind(pictures)}: give a list of file names, or use the key image")
    for picture in pictures:
        _check_text("one of its images", picture)
    if "text" not in values and "image" not in values and not pictures:
        raise InputError("it has neither a text nor a picture: give one of them")
    item: Item = {}
    item.update(values)  # type: ignore[typeddict-item]
    return item


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise InputError(f"{name} is {_kind(value)}: give a text")
    if not value.strip():
        raise InputError(f"{name} is empty: write something, or leave it out")
    if not value.isascii() and any("\ud800" <= one <= "\udfff" for one in value):
        raise InputError(f"{name} holds half a surrogate pair: give whole characters")


def _kind(value: object) -> str:
    """What JSON calls a value's kind."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    for kind, name in ((str, "a text"), (list, "a list"), (dict, "an object")):
        if isinstance(value, kind):
            return name
    return "a number"
