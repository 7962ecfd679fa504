"""A projector file written anew in another type, beside the original, and found there again.

A retyped file says in its metadata whose content it was made from: `lookonce.retyped_from` is the original's SHA-256.
Knows nothing of native code (see `projector_choice` for which type is the fastest here).
"""

import errno
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

from lookonce import gguf_check, gguf_file
from lookonce.byte_size import format_size
from lookonce.durable import sync_folder
from lookonce.errors import InputError, ModelFileError
from lookonce.fingerprint import fingerprint_of, identity
from lookonce.gguf_file import GgufFile, TensorInfo
from lookonce.store import Store

if TYPE_CHECKING:
    from lookonce.gguf_rewrite import NewTensor

__all__ = [
    "TYPES",
    "TYPE_VARIABLE",
    "Retyped",
    "checked_type",
    "copy_first",
    "in_type",
    "is_shipped",
    "none_made",
    "origin",
    "projector_type",
    "read_original",
    "retype",
    "retyped_name",
    "wanted_type",
]

TYPES: Final = ("BF16", "F16", "Q8_0")  # what can be asked for
TYPE_VARIABLE: Final = "LOOKONCE_MMPROJ_TYPE"
ORIGIN_KEY: Final = "lookonce.retyped_from"
_FAMILIES: Final = ("qwen3vl", "qwen2.5vl", "qwen2vl")
_TYPE_IN_NAME: Final = re.compile(
    r"(?<![a-z0-9])(?:bf16|f16|f32|fp16|fp32|q[2-8]_(?:[01]|k(?:_[sml])?))(?![a-z0-9_])", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Retyped:
    """A retyped file, its type and the original's. `existed` says that it had been made before."""

    path: Path
    type: str
    original: Path
    original_type: str
    existed: bool


def checked_type(type: str, *, auto: bool = False) -> str:
    """The type in capitals. Raises InputError for one that projectors are not retyped to."""
    known = (*TYPES, "auto") if auto else TYPES
    for one in known:
        if isinstance(type, str) and one.lower() == type.lower():
            return one
    raise InputError(f"{type!r} is no type of a projector here: choose one of {', '.join(known)}")


def wanted_type(given: str | None) -> str | None:
    """The type given, else what LOOKONCE_MMPROJ_TYPE says; None where neither does. Raises InputError for another."""
    if given:
        return checked_type(given, auto=True)
    said = os.environ.get(TYPE_VARIABLE)
    try:
        return checked_type(said, auto=True) if said else None
    except InputError as error:
        raise InputError(f"{TYPE_VARIABLE} is {said!r}: set it to {', '.join(TYPES)} or auto, or unset it") from error


def is_shipped(gguf: GgufFile) -> bool:
    """Whether a file is part of the package, where nothing is written."""
    return Path(__file__).resolve().parent in gguf.path.resolve().parents


def copy_first(gguf: GgufFile) -> str:
    """What to do to have a file of the package in another type."""
    return (
        f"{gguf.path.name} is part of the package, where nothing is written: copy both files of the model to a folder "
        "of your own, and retype it there"
    )


def origin(gguf: GgufFile) -> str | None:
    """The SHA-256 of the file that this one was retyped from; None for a file that was not retyped."""
    value = gguf.metadata.get(ORIGIN_KEY)
    return value if isinstance(value, str) and value else None


def projector_type(gguf: GgufFile) -> str:
    """The type that most of a projector's matrices have."""
    counts: Counter[str] = Counter()
    for info in gguf.tensors.values():
        if _is_matrix(info):
            counts[info.type] += prod(info.shape)
    return counts.most_common(1)[0][0] if counts else "F32"


def retyped_name(path: Path, type: str) -> Path:
    """What the retyped file is called: the type in the original's name replaced, or else added."""
    matches = list(_TYPE_IN_NAME.finditer(path.stem))
    if not matches:
        return path.with_name(f"{path.stem}-{type}{path.suffix}")
    last = matches[-1]
    word = type.lower() if last[0].islower() else type
    return path.with_name(f"{path.stem[: last.start()]}{word}{path.stem[last.end() :]}{path.suffix}")


def read_original(path: str | Path) -> GgufFile:
    """Read and check a projector file that is to be retyped. Raises ModelFileError for any other."""
    gguf = gguf_file.read(path)
    gguf_check.check_projector(gguf)
    if gguf_check.family(gguf) not in _FAMILIES:
        raise ModelFileError(
            f"{gguf.path} is a projector of the family {gguf_check.family(gguf)!r}: only {', '.join(_FAMILIES)} can be "
            "retyped"
        )
    if origin(gguf) is not None:
        raise ModelFileError(f"{gguf.path} was itself retyped from another file: give the original")
    if len(gguf.parts) > 1:
        raise ModelFileError(f"{gguf.path} is in {len(gguf.parts)} parts: join them with llama-gguf-split first")
    return gguf


def in_type(projector: GgufFile, type: str, store: Store | None = None) -> GgufFile | None:
    """The projector in the type asked for: the file itself, or one beside it that was retyped from it; None without.

    type: one of `TYPES`, or `auto` for the retyped file if there is one (of several the newest), else the file itself.
    store: where the original's fingerprint may be noted.

    Raises ModelFileError where the original cannot be read.
    """
    wanted = checked_type(type, auto=True)
    if wanted == projector_type(projector) or (wanted == "auto" and origin(projector) is not None):
        return projector
    if found := _retyped_beside(projector, wanted):
        original = fingerprint_of(projector, store)
        current = [one for one in found if origin(one) == original]
        if current:
            return max(current, key=lambda one: one.path.stat().st_mtime_ns)
    return projector if wanted == "auto" else None


def none_made(projector: GgufFile, type: str) -> str:
    """Why `in_type` gives None, with what makes the file."""
    wanted = checked_type(type)
    if is_shipped(projector):
        return copy_first(projector)
    stale = [f" ({one.path.name} was made from another file: delete it)" for one in _retyped_beside(projector, wanted)]
    return (
        f"{projector.path} has no {wanted} file beside it{''.join(stale[:1])}: make one with "
        f"`lookonce models retype {shlex.quote(str(projector.path))} --type {wanted}`"
    )


def _retyped_beside(projector: GgufFile, wanted: str) -> list[GgufFile]:
    """The retyped files of that type, or of any for `auto`, whatever they were made from."""
    found = []
    for path in sorted(projector.path.parent.glob("*.gguf")):
        with suppress(ModelFileError):
            gguf = gguf_file.read(path)
            if origin(gguf) is not None and wanted in ("auto", projector_type(gguf)):
                gguf_check.check_projector(gguf)
                found.append(gguf)
    return found


def retype(path: str | Path, type: str, *, advance: Callable[[int, int], object] = lambda *_: None) -> Retyped:
    """Write a projector file in another type beside the original; what was there before stays.

    type: `BF16`, `F16` or `Q8_0`. Its matrices become that type; vectors, positions and what the converter leaves
        alone keep theirs.
    advance: told the bytes written so far and how many there will be.

    Raises ModelFileError for a file that is no projector, InputError for a type that it has already or that its values
    do not fit, for another file of the new name, and where the folder cannot be written to.
    """
    from lookonce.gguf_rewrite import rewrite, size_bytes, text, u32
    from lookonce.gguf_type import FILE_TYPES

    wanted = checked_type(type)
    source = read_original(path)
    own = projector_type(source)
    if own == wanted:
        raise InputError(f"{source.path} is {wanted} already: there is nothing to do")
    target = retyped_name(source.path, wanted)
    before = identity(source.parts)
    original = fingerprint_of(source, None)
    if os.path.lexists(target):
        _refuse_another(target, source.path, original, wanted)
        return Retyped(target, wanted, source.path, own, existed=True)
    tensors = _new_tensors(source, wanted)
    total = sum(tensor.n_bytes for tensor in tensors)
    _refuse_full_disk(target, size_bytes(source, tensors))
    written = 0

    def count(n: int) -> None:
        nonlocal written
        written += n
        advance(written, total)

    values = {"general.file_type": u32(FILE_TYPES[wanted][0].value), ORIGIN_KEY: text(original)}
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        _remove_left_parts(target)
        with part.open("xb") as file:
            rewrite(source, file, values, tensors, count)
            file.flush()
            os.fsync(file.fileno())
        if identity(source.parts) != before:
            raise ModelFileError(f"{source.path} was changed while it was read: do it again")
        gguf_check.check_projector(gguf_file.read(part))
        part.replace(target)
        sync_folder(target.absolute().parent)
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return Retyped(target, wanted, source.path, own, existed=False)


def _is_matrix(info: TensorInfo) -> bool:
    return len(info.shape) == 2 and "position_embd" not in info.name


def _new_tensors(source: GgufFile, type: str) -> "list[NewTensor]":
    from gguf import GGMLQuantizationType as GgmlType

    from lookonce.gguf_rewrite import NewTensor
    from lookonce.gguf_type import converter_type

    tensors = []
    for info in source.tensors.values():
        kind = GgmlType[info.type]
        if len(info.shape) > 1:
            kind = converter_type(info.name, len(info.shape), info.shape[0], type)
        tensors.append(NewTensor(info, info.name, kind))
    return tensors


def _refuse_another(target: Path, original: Path, sha256: str, type: str) -> None:
    try:
        found = gguf_file.read(target)
        gguf_check.check_projector(found)
        same = origin(found) == sha256 and projector_type(found) == type
    except ModelFileError:
        same = False
    if not same:
        raise InputError(
            f"{target} exists and was not retyped from {original.name} as it is: move it away, or delete it"
        )


def _refuse_full_disk(target: Path, size_bytes: int) -> None:
    try:
        free = shutil.disk_usage(target.absolute().parent).free
    except OSError as error:
        raise _unwritable(target, error) from error
    if free < size_bytes:
        raise InputError(
            f"{target} needs {format_size(size_bytes)}, but {format_size(free)} are free on its disk: make room there"
        )


def _unwritable(target: Path, error: OSError) -> InputError:
    remedy = "make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "check the folder"
    return InputError(f"{target} cannot be written ({error.strerror or error}): {remedy}")


def _remove_left_parts(target: Path) -> None:
    """Delete what runs that were killed have left."""
    for path in target.parent.iterdir():
        match = re.fullmatch(rf"\.{re.escape(target.name)}\.(\d+)\.part", path.name)
        if match and not psutil.pid_exists(int(match[1])):
            path.unlink(missing_ok=True)
