"""Reads a file's head piece by piece, each length checked against the file and against what may be kept.

It knows little-endian numbers and GGUF's strings; it knows nothing of what they mean (see `gguf_file`).
"""

import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lookonce.errors import ModelFileError

__all__ = ["Cursor", "open_file"]

_CHUNK_BYTES = 1 << 20
# The largest real vocabularies have some 800,000 strings with their merges, the largest templates 100 KB.
_MAX_STRINGS = 1 << 22
_MAX_KEPT_BYTES = 32 << 20
_U64 = struct.Struct("<Q")


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading, unbuffered.

    Raises:
        ModelFileError: it is missing, is something else or may not be read.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            return path.open("rb", buffering=0)
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist: check the path, or download the model") from None
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path} cannot be opened ({error}): check path and permissions") from error
    kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
    raise ModelFileError(f"{path} is {kind}, but a .gguf file was expected: give the file itself")


class Cursor:
    """A position in a file, with one chunk of it in memory. Not thread-safe."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.path = path
        self.size = file.seek(0, 2)
        self._file = file
        self._chunk = b""
        self._start = 0
        self._at = 0
        self._strings_left = _MAX_STRINGS
        self._kept_bytes_left = _MAX_KEPT_BYTES

    @property
    def position(self) -> int:
        """Where the next byte is read, from the start of the file."""
        return self._start + self._at

    def seek(self, position: int) -> None:
        """Go to `position`."""
        self._start, self._at, self._chunk = position, 0, b""

    def damaged(self, what: str) -> ModelFileError:
        """Return the error that says of the file `what` is wrong with it."""
        return ModelFileError(f"{self.path} {what}: the file is damaged or cut short, download it again")

    def cut_short(self, what: str) -> ModelFileError:
        """Return the error that says where the file ended."""
        return self.damaged(f"ends inside {what}, after {self.size:,} bytes")

    def take(self, size: int, what: str) -> bytes:
        """Read `size` bytes."""
        if self._at + size > len(self._chunk):
            if size > self.size - self.position:
                raise self.cut_short(what)
            self._fill(size, what)
        piece = self._chunk[self._at : self._at + size]
        self._at += size
        return piece

    def u32(self, what: str) -> int:
        """Read an unsigned number of 4 bytes."""
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        """Read an unsigned number of 8 bytes."""
        return int.from_bytes(self.take(8, what), "little")

    def count(self, limit: int, what: str) -> int:
        """Read an unsigned number of 8 bytes that may be at most `limit`."""
        value = self.u64(what)
        if value > limit:
            raise self.damaged(f"gives {value:,} as {what}, more than {limit:,}")
        return value

    def string(self, limit: int, what: str) -> str:
        """Read a string of at most `limit` bytes that is kept."""
        data = self.take(self.count(limit, f"the length of {what}"), what)
        self.keep(len(data), what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self.damaged(f"has as {what} {data[:40]!r}, which is not UTF-8") from None

    def keep(self, size: int, what: str) -> None:
        """Count `size` bytes against what one file may hold in memory."""
        self._kept_bytes_left -= size
        if self._kept_bytes_left < 0:
            raise self.damaged(f"has more than {_MAX_KEPT_BYTES:,} bytes of metadata, with {what}")

    def skip(self, size: int, what: str) -> None:
        """Pass over `size` bytes."""
        if size > self.size - self.position:
            raise self.cut_short(what)
        self._at += size

    def skip_strings(self, length: int, what: str) -> None:
        """Pass over `length` strings without building them, some 0.1 microseconds each."""
        self._strings_left -= length
        if self._strings_left < 0:
            raise self.damaged(f"has {length:,} strings in {what}, more than {_MAX_STRINGS:,} in all")
        unpack = _U64.unpack_from
        while length:
            if len(self._chunk) - self._at < 8:
                if self.size - self.position < 8:
                    raise self.cut_short(what)
                self._fill(8, what)
            chunk, at, last = self._chunk, self._at, len(self._chunk) - 8
            while length and at <= last:
                at += 8 + unpack(chunk, at)[0]
                length -= 1
            self._at = at
        if self.position > self.size:
            raise self.cut_short(what)

    def strings(self, length: int, limit: int, what: str) -> Iterator[bytes]:
        """Yield `length` strings of at most `limit` bytes each, undecoded, some 0.2 microseconds each."""
        unpack = _U64.unpack_from
        while length:
            chunk, at, last = self._chunk, self._at, len(self._chunk)
            while length and at + 8 <= last and (end := at + 8 + unpack(chunk, at)[0]) <= last:
                yield chunk[at + 8 : end]
                at, length = end, length - 1
            self._at = at
            if length:
                # The next string straddles the chunk's end: read it whole, and a chunk after it.
                yield self.take(self.count(limit, f"the length of a string in {what}"), what)
                length -= 1

    def _fill(self, size: int, what: str) -> None:
        """Hold at least `size` bytes from the cursor on."""
        self._start, self._at = self.position, 0
        wanted, pieces = max(size, _CHUNK_BYTES), []
        try:
            self._file.seek(self._start)
            while wanted > 0 and (piece := self._file.read(wanted)):
                pieces.append(piece)
                wanted -= len(piece)
        except OSError as error:
            raise ModelFileError(f"{self.path} cannot be read ({error}): check the disk") from error
        self._chunk = b"".join(pieces)
        if len(self._chunk) < size:
            raise self.cut_short(what)
