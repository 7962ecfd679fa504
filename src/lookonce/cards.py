"""Cards: what is known of a model by its name, from models.toml and the user's own file of the same form.

Knows nothing of what lies on the disk (see `model_files`) nor of hubs (see `download`).
"""

import difflib
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, cast, get_args

import platformdirs

from lookonce.errors import InputError, ModelFileError
from lookonce.pooling import Pooling
from lookonce.sha256_form import is_sha256

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "DEFAULT_REVISION",
    "CardFile",
    "ModelCard",
    "choose_card",
    "find_card",
    "hint",
    "read_cards",
    "readable_cards",
    "split_name",
    "user_file",
]

logger = logging.getLogger(__name__)

Prompt = Literal["chat", "plain"]
_Files = Mapping[str, "CardFile"]

DEFAULT_REVISION: Final = "main"  # of a card that names none

_PACKAGE: Final = Path(__file__).resolve().parent
_SHIPPED: Final = (_PACKAGE / "models.toml", _PACKAGE.parent.parent / "models.toml")  # in a wheel, in the source tree
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]*")
_REPOSITORY: Final = re.compile(r"(?!\.)[\w.-]+/(?!\.)[\w.-]+", re.ASCII)
_REVISION: Final = re.compile(r"(?:(?!\.)[\w.+-]+/)*(?!\.)[\w.+-]+", re.ASCII)  # it stays in its folder too
_FILE_NAME: Final = re.compile(r"(?:(?!\.)[^/\\\x00-\x1f]+/)*(?!\.)[^/\\\x00-\x1f]+\.gguf")  # it stays in its folder
_PART: Final = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_FAMILIES: Final = ("qwen3vl", "qwen2.5vl", "qwen2vl")
_LONGEST_SHOWN: Final = 100  # characters of a wrong value in a message
_DEEPEST: Final = 50  # open brackets, or dots in a key: no card comes near


@dataclass(frozen=True, slots=True)
class CardFile:
    """One file of a model's repository: its name there, and its size and SHA-256 where they are known."""

    name: str
    size_bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One model's entry in models.toml.

    `huggingface` and `modelscope` are repositories, `owner/name`, or None where the model is not on that hub;
    `revision` is that of the Hugging Face one. `folder` is where the files of a card without repositories lie. `text`
    is by quantization and `projector` by type, the default first. The last seven are what holds where the caller gives
    none; None is what holds for any model.
    """

    name: str
    family: str
    licence: str
    text: _Files
    projector: _Files
    huggingface: str | None = None
    modelscope: str | None = None
    revision: str = DEFAULT_REVISION
    folder: Path | None = None
    pooling: Pooling | None = None
    instruction: str | None = None
    prompt: Prompt | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    n_ctx: int | None = None
    mmproj_type: str | None = None

    def text_file(self, quantization: str | None = None) -> CardFile:
        """The text model's file, the default one unless `quantization` is given. Raises InputError for another."""
        return self._chosen(self.text, quantization, "quantization")

    def projector_file(self, kind: str | None = None) -> CardFile:
        """The projector's file, the default one unless its type is given. Raises InputError for another."""
        return self._chosen(self.projector, kind, "projector type")

    def _chosen(self, files: _Files, wanted: str | None, what: str) -> CardFile:
        if wanted is None:
            return next(iter(files.values()))
        for kind, file in files.items():
            if kind.lower() == wanted.lower():
                return file
        raise InputError(f"{self.name} has no {what} {wanted!r}: choose one of {', '.join(files)}")


_FIELDS: Final = sorted(one.name for one in fields(ModelCard) if one.name != "name")


def user_file() -> Path:
    """Where the user's own cards are read from: what LOOKONCE_MODELS names, else the configuration folder."""
    named = os.environ.get("LOOKONCE_MODELS")
    try:
        return Path(named).expanduser() if named else platformdirs.user_config_path("lookonce") / "models.toml"
    except RuntimeError as error:  # a home folder that nobody has
        what = f"LOOKONCE_MODELS is {named!r}" if named else "a file of your own cards has no place"
        raise ModelFileError(f"{what} ({error}): set LOOKONCE_MODELS to its path") from error


def read_cards() -> Mapping[str, ModelCard]:
    """All cards by name, the user's own in place of those of the same name.

    Raises ModelFileError, with the file, its line and the field, for a card that cannot be used.
    """
    own = _own_file()
    cards = _shipped_cards()
    return MappingProxyType(cards if own is None else cards | _read_file(own, folders=own.parent))


def readable_cards() -> Mapping[str, ModelCard]:
    """What `read_cards` gives, without the user's own where they cannot be used, which a warning tells.

    For what does not hang on a name: files given by their path.
    """
    try:
        return read_cards()
    except ModelFileError as error:
        logger.warning("your own cards are left out: %s", error)
        return MappingProxyType(_shipped_cards())


def _shipped_cards() -> dict[str, ModelCard]:
    return _read_file(next(path for path in _SHIPPED if path.exists()), folders=_PACKAGE)


def _own_file() -> Path | None:
    """The user's own file where there is one; not to get at it is an error where it was named."""
    named = os.environ.get("LOOKONCE_MODELS")
    try:
        own = user_file()
        if own.exists():
            return own
    except (ModelFileError, OSError) as error:
        if not named:
            logger.warning("your own cards are not read: %s", error)
            return None
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(
            f"LOOKONCE_MODELS is {named!r}, which cannot be read ({error.strerror}): check path and permissions"
        ) from error
    if named:
        raise ModelFileError(f"LOOKONCE_MODELS is {named!r}, which does not exist: unset it")
    return None


def find_card(name: str) -> ModelCard | None:
    """The card of that name in any case, or None. Raises what `read_cards` raises."""
    return read_cards().get(name.lower()) if _NAME.fullmatch(name.lower()) else None


def split_name(named: str) -> tuple[str, str | None]:
    """A card's name and the quantization that may stand after it, as in `qwen3-vl-2b-instruct:Q8_0`."""
    name, _, quantization = named.partition(":")
    return name, quantization or None


def choose_card(named: str) -> tuple[ModelCard, str | None]:
    """The card of that name, and the quantization where one stands after the name, as the card writes it.

    Raises InputError for a name or quantization that there is not, and what `read_cards` raises.
    """
    name, quantization = split_name(named)
    card = find_card(name)
    if card is None:
        raise InputError(f"{named!r} is no model's name: {hint(named)}")
    if quantization is None:
        return card, None
    file = card.text_file(quantization)
    return card, next(kind for kind, one in card.text.items() if one is file)


def hint(named: str) -> str:
    """What to do where a name is not known: the names that come near, and the command that shows all."""
    name = split_name(named)[0].lower()
    names = list(readable_cards())
    near = difflib.get_close_matches(name, names, n=3) or [one for one in names if len(name) > 2 and name in one][:4]
    perhaps = f"perhaps {' or '.join(near)} is meant, and " if near else ""
    return f"{perhaps}`lookonce models list` shows all"


def _read_file(path: Path, *, folders: Path) -> dict[str, ModelCard]:
    text = _read_text(path)
    try:
        tables = _parse(path, text)
        return {name: _CardReader(path, text, name, table, folders).card() for name, table in tables.items()}
    except RecursionError as error:
        raise ModelFileError(
            f"{path}, line {_deepest_line(text)}: what stands here is nested deeper than any card: write its fields as "
            "the other cards have them"
        ) from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8").removeprefix("\ufeff")  # the mark that some editors put first
    except OSError as error:
        raise ModelFileError(
            f"{path} cannot be read ({error.strerror or error}): check path and permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{path} is not UTF-8: save it as UTF-8 text") from error


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        tables: dict[str, Any] = tomllib.loads(text)
    except ValueError as error:  # which names the line, but for a number of thousands of digits
        raise ModelFileError(f"{path} is not TOML: {error}") from error
    return tables


@dataclass(frozen=True, slots=True)
class _CardReader:
    """Checks one table of a file of cards field by field."""

    path: Path
    source: str
    name: str
    table: Any
    folders: Path

    def card(self) -> ModelCard:
        if not _NAME.fullmatch(self.name):
            raise self._wrong((), "is no name for a card: use small letters, digits, dots and dashes")
        if not isinstance(self.table, dict):
            raise self._wrong(
                (), f"is {_shown(self.table)}, but a table was expected: write [{self.name}] above its fields"
            )
        if any(isinstance(value, dict) and key not in ("text", "projector") for key, value in self.table.items()):
            raise self._wrong((), 'holds another table: a card whose name has a dot is written in quotes, ["a.b"]')
        for key in self.table:  # first: a field that is misspelt is absent under its right name
            if key not in _FIELDS:
                raise self._wrong((key,), f"is not known: expected one of {', '.join(_FIELDS)}")
        card = ModelCard(
            name=self.name,
            family=self._required("family", self._choice("family", _FAMILIES)),
            licence=self._required("licence", self._text("licence")),
            text=self._files("text"),
            projector=self._files("projector"),
            huggingface=self._matching("huggingface", _REPOSITORY, "a repository, owner/name"),
            modelscope=self._matching("modelscope", _REPOSITORY, "a repository, owner/name"),
            revision=self._matching("revision", _REVISION, "a branch, tag or commit") or DEFAULT_REVISION,
            folder=self._folder(),
            pooling=cast("Pooling | None", self._choice("pooling", get_args(Pooling))),
            instruction=self._text("instruction"),
            prompt=cast("Prompt | None", self._choice("prompt", get_args(Prompt))),
            min_pixels=self._count(("min_pixels",)),
            max_pixels=self._count(("max_pixels",)),
            n_ctx=self._count(("n_ctx",)),
            mmproj_type=self._choice("mmproj_type", ("auto", "BF16", "F16", "Q8_0")),
        )
        if card.min_pixels and card.max_pixels and card.min_pixels > card.max_pixels:
            raise self._wrong(("min_pixels",), f"is {card.min_pixels}, more than max_pixels, {card.max_pixels}")
        if not (card.huggingface or card.modelscope or card.folder):
            raise self._wrong((), "has neither huggingface, modelscope nor folder: say where its files are")
        if card.folder and (card.huggingface or card.modelscope):
            raise self._wrong(("folder",), "stands beside a repository: a card's files lie in one or the other")
        return card

    def _take(self, keys: tuple[str, ...]) -> Any:
        found = self.table
        for key in keys:
            found = found.get(key)
        return found

    def _text(self, key: str) -> str | None:
        value = self._take((key,))
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise self._wrong((key,), f"is {_shown(value)}, but a text was expected")
        return value

    def _required(self, key: str, value: str | None) -> str:
        if value is None:
            raise self._wrong((key,), "is absent, but every card has one")
        return value

    def _choice(self, key: str, choices: Sequence[str]) -> str | None:
        value = self._text(key)
        if value is not None and value not in choices:
            raise self._wrong((key,), f"is {_shown(value)}: choose one of {', '.join(choices)}")
        return value

    def _matching(self, key: str, form: re.Pattern[str], what: str) -> str | None:
        value = self._text(key)
        if value is not None and not form.fullmatch(value):
            raise self._wrong((key,), f"is {_shown(value)}, but {what} was expected")
        return value

    def _count(self, keys: tuple[str, ...]) -> int | None:
        value = self._take(keys)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise self._wrong(keys, f"is {_shown(value)}, but a whole number from 1 was expected")
        return value

    def _folder(self) -> Path | None:
        value = self._text("folder")
        return None if value is None else self.folders / Path(value).expanduser()

    def _files(self, key: str) -> _Files:
        table = self._take((key,))
        if not isinstance(table, dict) or not table:
            raise self._wrong((key,), f"is {_shown(table)}, but a table of files was expected")
        return MappingProxyType({kind: self._file((key, kind)) for kind in table})

    def _file(self, keys: tuple[str, str]) -> CardFile:
        table = self._take(keys)
        if not isinstance(table, dict) or not table.keys() <= {"file", "size_bytes", "sha256"}:
            raise self._wrong(keys, f"is {_shown(table)}, but {{ file, size_bytes, sha256 }} was expected")
        name, sha256 = table.get("file"), table.get("sha256")
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise self._wrong((*keys, "file"), f"is {_shown(name)}, but the name of a .gguf file was expected")
        if _PART.search(name):
            raise self._wrong(
                (*keys, "file"), f"is {_shown(name)}, a part of a split model: load that by its first file's path"
            )
        if sha256 is not None and not is_sha256(sha256):
            raise self._wrong((*keys, "sha256"), f"is {_shown(sha256)}, but 64 small hexadecimal digits were expected")
        return CardFile(name, self._count((*keys, "size_bytes")), sha256)

    def _wrong(self, keys: tuple[str, ...], what: str) -> ModelFileError:
        keys = (self.name, *keys)
        return ModelFileError(f"{self.path}, line {_line(self.source, keys)}: {'.'.join(keys)} {what}")


def _shown(value: object) -> str:
    if value is None:
        return "absent"
    shown = repr(value)
    return shown if len(shown) <= _LONGEST_SHOWN else f"{shown[:_LONGEST_SHOWN]}..."


def _deepest_line(source: str) -> int:
    """Number of the line from which on more brackets are open than the deepest card has."""
    depth = 0
    for number, content in enumerate(source.splitlines(), start=1):
        depth += sum(content.count(one) for one in "[{") - sum(content.count(one) for one in "]}")
        if max(depth, content.count("["), content.count("{"), content.count(".")) > _DEEPEST:
            return number
    return 1


_HEADER: Final = re.compile(r"\s*\[([^\[\]]+)\]\s*(#.*)?")
_ASSIGNMENT: Final = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")
_KEY: Final = re.compile(r"""([\w-]+)|"([^"]*)"|'([^']*)'""")


def _line(source: str, keys: Sequence[str]) -> int:
    """Number of the line that says most about `keys`, which tomllib does not tell: theirs, or their table's."""
    best, line = 0, 1
    header: list[str] = []
    for number, content in enumerate(source.splitlines(), start=1):
        if match := _HEADER.fullmatch(content):
            header = _keys(match[1])
            found = header
        elif match := _ASSIGNMENT.match(content):
            found = [*header, *_keys(match[1])]
        else:
            continue
        if list(keys[: len(found)]) == found and len(found) > best:
            best, line = len(found), number
    return line


def _keys(dotted: str) -> list[str]:
    return ["".join(match.groups(default="")) for match in _KEY.finditer(dotted)]
