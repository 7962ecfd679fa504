"""A conversation as one file: what was said and seen, and the state of its evaluation.

The file is a safetensors file of bytes: `chat` (JSON), `look.0`, `look.1` ... (each a saved look) and, where there was
one, `state`, what `lookonce.native.cache` read out. Its metadata holds the format version and a BLAKE3 over all of
them. Knows nothing of native code; whoever uses the state checks what the native library would believe.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from blake3 import blake3

from lookonce.durable import Data, write_durably
from lookonce.embedding import ImageEmbedding
from lookonce.errors import InputError, SavedLookError
from lookonce.held import Held
from lookonce.item import kind_of
from lookonce.kept_state import KeptState
from lookonce.looker import LookOptions
from lookonce.prompt import Message, Part, RowRun, Unit
from lookonce.saved_file import Saved, read_saved
from lookonce.tensor_file import Array, array_bytes, head, unpack

FORMAT_VERSION: Final = 1
SUFFIX: Final = ".safetensors"
_WHAT: Final[Saved] = "saved chat"
_ROLES: Final = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class SavedChat:
    """All that a conversation is.

    `waiting` are the pictures that no turn has shown yet; `facts` tell how the context was made that `state` came from.
    """

    model_name: str
    fingerprint: str
    messages: tuple[Message, ...]
    known: Mapping[str, ImageEmbedding]
    waiting: tuple[ImageEmbedding, ...]
    look_options: LookOptions
    facts: Mapping[str, str] = field(default_factory=dict)
    state: KeptState | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; it appears complete or not at all. Raises SavedLookError where it cannot be written."""
        path = _checked_name(path, f"end it in {SUFFIX}")
        try:
            write_durably(path, *_pack(self))
        except OSError as error:
            raise SavedLookError(f"{path} cannot be written: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SavedChat":
        """Read a file, checked to the last byte. Raises SavedLookError where anything is wrong with it."""
        path = _checked_name(path, f"give a {SUFFIX} file that chat.save wrote")
        return _unpack(read_saved(path, None, _WHAT), path.name)


def _checked_name(path: str | os.PathLike[str], otherwise: str) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise SavedLookError(f"a chat is saved in a file, not in {kind_of(path)}: give its path")
    path = Path(path)
    if path.suffix.lower() != SUFFIX:
        raise SavedLookError(f"{path} is not a saved chat's name: {otherwise}")
    return path


class _Looks:
    """Gives looks numbers, each object once."""

    def __init__(self) -> None:
        self.found: list[ImageEmbedding] = []

    def number(self, look: ImageEmbedding) -> int:
        for number, known in enumerate(self.found):
            if known is look:
                return number
        self.found.append(look)
        return len(self.found) - 1


def _pack(chat: SavedChat) -> list[Data]:
    looks = _Looks()

    def part(one: Part) -> Any:
        return str(one) if not isinstance(one, ImageEmbedding) else {"look": looks.number(one)}

    facts: dict[str, Any] = {
        "model_name": chat.model_name,
        "fingerprint": chat.fingerprint,
        "messages": [{"role": one.role, "parts": [part(each) for each in one.parts]} for one in chat.messages],
        "known": {alias: looks.number(look) for alias, look in chat.known.items()},
        "waiting": [looks.number(look) for look in chat.waiting],
        "look_options": asdict(chat.look_options),
        "facts": dict(chat.facts),
        "held": None if chat.state is None else _pack_held(chat.state, looks),
    }
    facts["aliases"] = [look.alias for look in looks.found]
    tensors = {"chat": _bytes(json.dumps(facts).encode())}
    tensors |= {f"look.{number}": _bytes(look.to_bytes()) for number, look in enumerate(looks.found)}
    if chat.state is not None:
        tensors["state"] = chat.state.state.reshape(1, -1)
    metadata = {"format_version": str(FORMAT_VERSION), "kind": "chat", "blake3": _checksum(tensors)}
    return [head(metadata, tensors), *map(array_bytes, tensors.values())]


def _pack_held(state: KeptState, looks: _Looks) -> dict[str, Any]:
    held = state.held
    units = [
        unit if isinstance(unit, int) else [looks.number(unit.look), unit.start, unit.stop, unit.advance, unit.causal]
        for unit in held.units
    ]
    ends = [[mark.n_units, mark.generated] for mark in held.marks[1:]]
    return {"units": units, "ends": ends, "last": state.last}


def _bytes(data: bytes) -> Array:
    return np.frombuffer(data, dtype=np.uint8).reshape(1, -1)


def _checksum(tensors: Mapping[str, Array]) -> str:
    digest = blake3(str(FORMAT_VERSION).encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.nbytes}\n".encode())
        digest.update(array_bytes(tensor))
    return str(digest.hexdigest())


def _unpack(data: bytes, name: str) -> SavedChat:
    metadata, tensors = unpack(data, None, name=name, what=_WHAT)
    if metadata.get("kind") != "chat":
        raise SavedLookError(f"{name} is not a {_WHAT}: give a file that chat.save wrote")
    version = metadata.get("format_version", "")
    if version.isdecimal() and int(version[:9]) > FORMAT_VERSION:
        raise SavedLookError(
            f"{name} has format version {version}, and this lookonce reads {FORMAT_VERSION}: update lookonce"
        )
    if version != str(FORMAT_VERSION) or metadata.keys() != {"format_version", "kind", "blake3"}:
        raise SavedLookError(f"{name} is damaged: its metadata cannot be read")
    if any(tensor.dtype != np.uint8 for tensor in tensors.values()) or metadata.get("blake3") != _checksum(tensors):
        raise SavedLookError(f"{name} is damaged: its checksum differs from the one saved in it")
    try:
        return _assemble(tensors, name)
    except SavedLookError:
        raise
    except (InputError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise SavedLookError(f"{name} is damaged: what it says cannot be read ({error})") from error


def _assemble(tensors: Mapping[str, Array], name: str) -> SavedChat:
    facts = json.loads(tensors["chat"].tobytes())
    looks = [
        ImageEmbedding.from_bytes(array_bytes(tensors[f"look.{number}"]), name=f"look {number} of {name}").with_alias(
            alias
        )
        for number, alias in enumerate(facts["aliases"])
    ]
    return SavedChat(
        model_name=_text(facts["model_name"]),
        fingerprint=_text(facts["fingerprint"]),
        messages=tuple(_read_message(one, looks) for one in facts["messages"]),
        known={_text(alias): _pick(looks, number) for alias, number in facts["known"].items()},
        waiting=tuple(_pick(looks, number) for number in facts["waiting"]),
        look_options=LookOptions(**facts["look_options"]),
        facts={_text(fact): _text(value) for fact, value in facts["facts"].items()},
        state=_read_state(facts["held"], tensors, looks),
    )


def _read_message(entry: Mapping[str, Any], looks: list[ImageEmbedding]) -> Message:
    if entry["role"] not in _ROLES:
        raise ValueError(f"a message of {entry['role']!r}")
    parts = [_pick(looks, one["look"]) if isinstance(one, dict) else _text(one) for one in entry["parts"]]
    return Message(entry["role"], tuple(parts))


def _read_state(
    entry: Mapping[str, Any] | None, tensors: Mapping[str, Array], looks: list[ImageEmbedding]
) -> KeptState | None:
    if entry is None:
        return None
    units = [_read_unit(one, looks) for one in entry["units"]]
    held = Held.rebuilt(units, [(int(end), bool(generated)) for end, generated in entry["ends"]])
    return KeptState(held, tensors["state"][0], int(entry["last"]), origin="file")


def _read_unit(entry: Any, looks: list[ImageEmbedding]) -> Unit:
    if isinstance(entry, int):
        return entry
    number, start, stop, advance, causal = entry
    look = _pick(looks, number)
    if not 0 <= start < stop <= look.n_rows or not 0 <= advance <= look.n_positions:
        raise ValueError("rows that a look has not")
    return RowRun(look, start, stop, advance, bool(causal))


def _pick(looks: list[ImageEmbedding], number: object) -> ImageEmbedding:
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(looks):
        raise ValueError(f"look {number!r} is not in it")
    return looks[number]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
