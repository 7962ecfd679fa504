"""A file of vectors that grows batch by batch, and of which a kill at any instant loses at most the last batch.

While `vectors.npy` is being made, `vectors.npy.part` holds what will be its bytes, and the journal
`vectors.npy.part.jsonl` says how many of them count: first a line with the options of the run, then one line for each
batch, written when the batch's vectors are on the disk. What stands behind the last whole line of the journal, and
behind the bytes that it names, is cut off before the run goes on. A last line says which file is about to become the
target, so that a run which was killed after that is known to be done. Knows nothing of models.
"""

import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

import numpy as np
from typing_extensions import Self

from lookonce.durable import sync_folder, write_durably
from lookonce.embed_input import Row
from lookonce.embed_run import EmbeddedBatch, format_vector, refuse_nothing
from lookonce.errors import InputError

__all__ = ["PartFile", "check_output"]

_FORMAT_VERSION: Final = 1
_SUFFIXES: Final = (".npy", ".jsonl")


def check_output(path: Path) -> None:
    """Refuse a file that vectors could not be saved in. Raises InputError."""
    if path.suffix.lower() not in _SUFFIXES:
        raise InputError(f"{str(path)!r} is no name for a file of vectors: end it in .npy or .jsonl")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"{str(path)!r} cannot be written: its folder must exist, and it must be no folder itself")


@dataclass(frozen=True, slots=True)
class _Mark:
    """How far a run has come: rows read and vectors kept, bytes of the part that hold them, digest of the rows."""

    rows: int
    vectors: int
    dimension: int
    size_bytes: int
    digest: str


_START: Final = _Mark(0, 0, 0, 0, "")


class PartFile:
    """The vectors that go to `target`, a `.npy` or `.jsonl` file; to be used in a `with` block.

    options: everything that the vectors depend on; a part that was begun with others is refused.
    restart: forget a part that is there.

    A `with` block that ends with an error keeps what was done so far, and where that is nothing leaves nothing behind.
    Raises InputError where the part cannot be gone on with, is in use by another process, or cannot be written.
    """

    def __init__(self, target: Path, options: Mapping[str, object], *, restart: bool = False) -> None:
        self.target: Final = target
        self.part: Final = target.with_name(f"{target.name}.part")
        self.skipped_file: Final = target.with_name(f"{target.name}.skipped.jsonl")
        self._journal_path = target.with_name(f"{target.name}.part.jsonl")
        self._is_npy = target.suffix.lower() == ".npy"
        # What JSON makes of the options, to compare them with those that were read.
        self._header: dict[str, Any] = json.loads(json.dumps({"format_version": _FORMAT_VERSION, **options}))
        self._restart = restart
        self._mark = _START
        self._digest = hashlib.sha256()
        self._n_skipped = 0
        self._n_resumed = 0
        self._finished_inode: int | None = None  # of what was about to become the target when the run ended
        self._recalled = False  # whether the part is a finished target to which nothing was added yet

    def __enter__(self) -> Self:
        with self._writing():
            self._journal = _open_locked(self._journal_path)
            try:
                self._data = self._open_data()
            except BaseException:
                if not self._journal_path.stat().st_size:
                    self._journal_path.unlink()
                self._journal.close()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._mark.rows == 0:
            self._remove_part()
        if kind is not None and self._recalled:
            with suppress(OSError):
                self._become_target()
        for file in (self._data, self._journal):
            with suppress(OSError):  # what a full disk did not take is written once more, and counts for nothing
                file.close()

    def resume(self, rows: Iterator[Row]) -> int:
        """Take the rows that were done before from `rows`, and give their number.

        Raises InputError where they are other rows than those that the part was begun with.
        """
        for _ in range(self._mark.rows):
            row = next(rows, None)
            if row is None:
                raise self._refusal("other input: it had more rows than there are now")
            self._digest.update(_digested(row))
        if self._mark.rows and self._digest.hexdigest() != self._mark.digest:
            raise self._refusal(f"other input: its first {self._mark.rows} rows have changed")
        self._n_resumed = self._mark.rows
        return self._mark.rows

    def append(self, batch: EmbeddedBatch) -> None:
        """Put a batch on the disk."""
        self._recalled = False
        for row in batch.rows:
            self._digest.update(_digested(row))
        n_vectors = self._mark.vectors + len(batch.kept)
        dimension = self._mark.dimension or batch.vectors.shape[1]
        with self._writing():
            self._data.write(self._encode(batch))
            _sync(self._data)
            mark = _Mark(
                self._mark.rows + len(batch.rows), n_vectors, dimension, self._data.tell(), self._digest.hexdigest()
            )
            self._write_journal({**asdict(mark), "skipped": [asdict(one) for one in batch.skipped]})
        self._mark = mark
        self._n_skipped += len(batch.skipped)

    def finish(self) -> None:
        """Turn the part into the target, and remove what was needed to go on.

        Beside a `.npy` file, which has no room for names, the rows that were passed over are listed in a file of their
        own. Raises InputError where there is no vector at all.
        """
        mark = self._mark
        if not mark.vectors:
            self._remove_part()
            refuse_nothing(mark.rows, mark.vectors)
        with self._writing():
            if self._is_npy:
                self._data.seek(0)
                self._data.write(_npy_header(mark.vectors, mark.dimension))
                _sync(self._data)
            self._data.close()
            if self._is_npy and self._n_skipped:
                write_durably(self.skipped_file, self._skipped_lines())
            elif self._is_npy:
                self.skipped_file.unlink(missing_ok=True)
            self._become_target()
            self._journal_path.unlink()

    def summary(self) -> str:
        """A line about the finished file."""
        facts = [f"{_counted(self._mark.vectors, 'vector')} of {self._mark.dimension} values"]
        if self._n_resumed:
            facts.append(f"{_counted(self._n_resumed, 'row')} done before")
        if self._n_skipped:
            listed = f" ({self.skipped_file})" if self._is_npy else ""
            facts.append(f"{_counted(self._n_skipped, 'row')} passed over{listed}")
        return f"{self.target}: {', '.join(facts)}\n"

    def _encode(self, batch: EmbeddedBatch) -> bytes:
        if not self._is_npy:
            pairs = zip(batch.kept, batch.vectors, strict=True)
            return "".join(format_vector(row, vector) for row, vector in pairs).encode()
        if not len(batch.vectors):
            return b""
        head = b"" if self._mark.size_bytes else _npy_header(0, batch.vectors.shape[1])
        return head + np.ascontiguousarray(batch.vectors, dtype="<f4").tobytes()

    def _open_data(self) -> BinaryIO:
        """The part, cut back to what the journal says; both made anew where there is nothing to go on with."""
        header, end = self._read_journal()
        if header == self._header and not self._restart and self._is_done():
            self.target.replace(self.part)
            self._recalled = True
        exists = self.part.exists()
        if exists and header is None and not self._restart:
            raise InputError(f"{self.part} exists, but nothing says what it holds: delete it, or give --restart")
        if self._restart or not exists or not self._mark.rows:
            self._mark, self._n_skipped = _START, 0
            self.part.unlink(missing_ok=True)
            self._journal.truncate(0)
            self._write_journal(self._header)
            data: BinaryIO = self.part.open("xb")
            sync_folder(self.part.absolute().parent)
            return data
        if changed := [name for name in self._header if (header or {}).get(name) != self._header[name]]:
            raise self._refusal(f"another {', '.join(changed)}")
        if self.part.stat().st_size < self._mark.size_bytes:
            raise self._refusal("more in it than there is now")
        self._journal.truncate(end)
        data = self.part.open("r+b")
        data.truncate(self._mark.size_bytes)
        data.seek(self._mark.size_bytes)
        return data

    def _become_target(self) -> None:
        self._write_journal({"finished": self.part.stat().st_ino})
        self._recalled = False
        self.part.replace(self.target)
        sync_folder(self.target.absolute().parent)

    def _is_done(self) -> bool:
        """Whether the target is what the journal's run made of its part, and only the journal was left to remove."""
        if self._finished_inode is None or self.part.exists() or not self.target.is_file():
            return False
        status = self.target.stat()
        return (status.st_ino, status.st_size) == (self._finished_inode, self._mark.size_bytes)

    def _read_journal(self) -> tuple[dict[str, Any] | None, int]:
        """The header, and where the last whole line ends; what the lines say is taken over."""
        self._journal.seek(0)
        header: dict[str, Any] | None = None
        end = 0
        for line in self._journal:
            try:
                values = json.loads(line) if line.endswith(b"\n") else None
                if not isinstance(values, dict):
                    break
                if header is None:
                    header = values
                elif "finished" in values:
                    self._finished_inode = values["finished"]
                    break
                else:
                    skipped = values.pop("skipped")
                    self._mark = _Mark(**values)
                    self._n_skipped += len(skipped)
            except (ValueError, KeyError, TypeError):  # torn by a power cut
                break
            end += len(line)
        return header, end

    def _write_journal(self, values: Mapping[str, object]) -> None:
        self._journal.write(json.dumps(values).encode() + b"\n")
        _sync(self._journal)

    def _skipped_lines(self) -> bytes:
        self._journal.seek(0)
        next(self._journal)
        found = (one for line in self._journal for one in json.loads(line).get("skipped", ()))
        told = ({name: value for name, value in one.items() if value is not None} for one in found)
        return b"".join(json.dumps(one).encode() + b"\n" for one in told)

    def _remove_part(self) -> None:
        self.part.unlink(missing_ok=True)
        self._journal_path.unlink(missing_ok=True)

    def _refusal(self, difference: str) -> InputError:
        return InputError(f"{self.part} was begun with {difference}: delete it, or give --restart")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"{str(self.target)!r} cannot be written: {error.strerror or error}") from error


def _open_locked(path: Path) -> BinaryIO:
    """Open a journal that no other process uses: two would write into each other's vectors."""
    journal: BinaryIO = path.open("a+b")
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            journal.close()
            raise InputError(f"{path} is in use by another process: wait until it has ended") from error
        if os.fstat(journal.fileno()).st_nlink == 0:  # the other ended in this very moment, and removed it
            journal.close()
            return _open_locked(path)
    return journal


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _digested(row: Row) -> bytes:
    return len(row.source).to_bytes(8, "big") + row.source


def _npy_header(n: int, dimension: int) -> bytes:
    """The header of a `.npy` file, of one length whatever `n` is: numpy leaves room for the first axis to grow."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (n, dimension)})
    return header.getvalue()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
