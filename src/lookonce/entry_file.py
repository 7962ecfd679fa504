"""One entry of the store as a file: a header that says whose payload follows, and the payload.

Knows nothing about the index or the limit. A file is believed only after its header, its length and its
checksum agree with its name, so whatever befalls a disk shows as `EntryDamage` and never as another payload.

The header is 256 bytes: magic (8), kind (16, NUL-padded), key (32), payload length (8, little-endian),
payload's XXH3-128 (16), zeros (16), label (128, UTF-8, NUL-padded) and the SHA-256 of the 224 bytes so far. XXH3, as
RocksDB's blocks have it, because a state is tens of megabytes and is verified before each use: of 29 MB it takes 2 ms,
BLAKE3 7 ms. Neither would stop somebody who may write here, since he could write the checksum too.
"""

import hashlib
import mmap
import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from xxhash import xxh3_128

from lookonce.errors import InputError

__all__ = [
    "HEADER_BYTES",
    "EntryDamage",
    "EntryName",
    "EntryOutdated",
    "iterate_entries",
    "make_header",
    "read_label",
    "read_payload",
]

HEADER_BYTES = 256

_MAGIC = b"LOOKSTO3"
_HEADER = struct.Struct("<8s16s32sQ16s16x128s")
_KEY = re.compile(r"[0-9a-f]{64}")
_KIND = re.compile(r"[a-z][a-z0-9_]{0,15}")
_PIECE_BYTES = 1 << 18  # is verified while the CPU's cache holds it
_MALLOC_BYTES = 1 << 18  # more than this gets pages of its own; a process may have some 65,000 such mappings


class EntryDamage(Exception):  # noqa: N818  (it never leaves the store)
    """A file is not the entry that its name says."""


class EntryOutdated(EntryDamage):
    """A file is an entry, sound maybe, in the format of another version of lookonce."""


@dataclass(frozen=True, slots=True, order=True)
class EntryName:
    """The two words that name an entry: a key of 64 hexadecimal digits, and a kind."""

    key: str
    kind: str

    def __post_init__(self) -> None:
        if not isinstance(self.key, str) or not _KEY.fullmatch(self.key):
            raise InputError(f"key {self.key!r} is not 64 hexadecimal digits in lower case")
        if not isinstance(self.kind, str) or not _KIND.fullmatch(self.kind):
            raise InputError(f"kind {self.kind!r} is not 1 to 16 of a-z, 0-9 and _, a letter first")

    def __str__(self) -> str:
        return f"{self.key}.{self.kind}"

    def path(self, objects: Path) -> Path:
        """Give the entry's place; two levels keep every folder small."""
        return objects / self.key[:2] / self.key[2:4] / str(self)


def make_header(name: EntryName, parts: Sequence[memoryview], label: str) -> bytes:
    """Give the 256 bytes that go before the payload, which is all `parts`, of bytes; a long label is cut."""
    short = label.encode()[:128].decode(errors="ignore").encode()
    digest = xxh3_128()
    for part in parts:
        digest.update(part)
    length = sum(part.nbytes for part in parts)
    head = _HEADER.pack(_MAGIC, name.kind.encode(), bytes.fromhex(name.key), length, digest.digest(), short)
    return head + hashlib.sha256(head).digest()


def read_payload(path: Path, name: EntryName) -> memoryview:
    """Read and verify an entry; OSError where it cannot be read, `EntryDamage` where it is wrong.

    The bytes cannot be written to.
    """
    with path.open("rb") as file:
        length, digest, _ = _read_header(file, name)
        # Before reading, so that a damaged file never costs more memory than it has bytes.
        if os.fstat(file.fileno()).st_size != HEADER_BYTES + length:
            raise EntryDamage("its length is wrong")
        payload = _make_memory(length)
        found = xxh3_128()
        for start in range(0, length, _PIECE_BYTES):
            piece = payload[start : start + _PIECE_BYTES]
            found.update(piece[: file.readinto(piece)])
    if found.digest() != digest:
        raise EntryDamage("its checksum is wrong")
    return payload.toreadonly()


def _make_memory(size_bytes: int) -> memoryview:
    """Memory to read into; a large one with all its pages at once, where one by one they take longer than the reading.

    Not with huge pages: where the system has none at hand, they were measured to take several times as long.
    """
    if size_bytes <= _MALLOC_BYTES or not hasattr(mmap, "MAP_POPULATE"):  # which Linux has
        return memoryview(bytearray(size_bytes))
    return memoryview(mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_POPULATE))


def read_label(path: Path, name: EntryName) -> str:
    """Read an entry's label from its header; raise as `read_payload` does."""
    with path.open("rb") as file:
        return _read_header(file, name)[2]


def iterate_entries(objects: Path) -> Iterator[tuple[EntryName, os.stat_result]]:
    """Give every file that is named as an entry; files of other names are passed over."""
    for first in _scan(objects):
        for second in _scan(Path(first.path)):
            for file in _scan(Path(second.path)):
                key, _, kind = file.name.partition(".")
                try:
                    name = EntryName(key, kind)
                    if Path(file.path) == name.path(objects):
                        yield name, file.stat(follow_symlinks=False)
                except (InputError, FileNotFoundError):
                    continue


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read_header(file: BinaryIO, name: EntryName) -> tuple[int, bytes, str]:
    header = file.read(HEADER_BYTES)
    head = header[: _HEADER.size]
    if len(header) != HEADER_BYTES or hashlib.sha256(head).digest() != header[_HEADER.size :]:
        raise EntryDamage("its header is damaged")
    magic, kind, key, length, digest, label = _HEADER.unpack(head)
    if magic != _MAGIC:
        raise EntryOutdated("it is of another version")
    if (key.hex(), kind.rstrip(b"\0").decode(errors="replace")) != (name.key, name.kind):
        raise EntryDamage("it holds another entry")
    return length, digest, label.rstrip(b"\0").decode(errors="replace")
