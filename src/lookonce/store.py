"""The disk store: a folder that keeps payloads by key and kind, within one limit on its size.

Knows nothing about what it keeps: a payload is bytes. The entry files are the truth and each verifies itself,
so `get` needs no index; the SQLite index holds the order of use, the sizes and the notes, and is made again
from the files if it is damaged. Whatever is damaged is a logged miss.

A put writes a temporary file and flushes it, adds its row, evicting what must go, and then, holding the index's
write lock, renames the file and flushes its folder. A kill leaves a temporary (swept after an hour) or a row without
a file (a miss that counts and ages out). Only a power cut can leave a file without a row, since the index is not
flushed: `get` finds it and adopts it, as do `check` with repair and `prune`. Eviction unlinks before it forgets, under
the same lock, so no file is lost to the count and no fresh put to eviction. The files rank above the index because
readers then wait for nobody: SQLite is no part of an answer.
"""

import logging
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from sqlite3 import Connection
from types import MappingProxyType, TracebackType
from typing import TypeVar

from lookonce import store_index, store_place
from lookonce.durable import Data, make_folder
from lookonce.entry_file import HEADER_BYTES, EntryDamage, EntryName, EntryOutdated, iterate_entries, read_label
from lookonce.entry_folder import EntryFolder
from lookonce.errors import ClosedError, InputError, StoreError
from lookonce.store_index import IndexDamage, IndexUnavailable, StoreIndex
from lookonce.store_report import KindStats, StoreEntry, StoreReport, StoreStats

__all__ = ["KindStats", "Store", "StoreEntry", "StoreReport", "StoreStats"]

_logger = logging.getLogger(__name__)

_WRITE_TIMEOUT_S = 30.0
_NOTE_TIMEOUT_S = 0.25
_MAX_PENDING = 10_000
_INDEX_ROOM_BYTES = 4 << 20  # SQLite's log is at most this large

_Result = TypeVar("_Result")


class Store:
    """A folder of payloads, for any number of threads and processes.

    The folder is `folder`, else `LOOKONCE_STORE`, else in the user's cache directory, and is made at the
    first write. The limit is `limit_bytes`, else `LOOKONCE_STORE_LIMIT` (5GB, say), else 20 GiB. The disk's
    faults never raise out of `get`, `put`, `recall` and `remember`; `StoreError` means that a newer lookonce
    made the folder, or that it is no folder. It must lie on a disk of this machine where several processes
    share it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, Store(folder) as store:
    ...     store.put("ab" * 32, "look", b"rows", label="cat.jpg")
    ...     bytes(store.get("ab" * 32, "look"))
    True
    b'rows'
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, limit_bytes: int | None = None) -> None:
        self.folder = store_place.folder_of(folder)
        self.limit_bytes = store_place.limit_of(limit_bytes)
        self._files = EntryFolder(self.folder)
        # Two connections, so that a note is read while another thread waits to write.
        self._reading = StoreIndex(self.folder)
        self._writing = StoreIndex(self.folder)
        self._used: deque[EntryName] = deque(maxlen=_MAX_PENDING)
        self._told: set[EntryName] = set()  # whose damage was told
        self._settled = False
        self._closed = False

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Record what was used and close the index; may be called twice."""
        if not self._closed:
            with suppress(StoreError):
                self._record_use()
            self._closed = True
            for index in (self._reading, self._writing):
                index.close()

    def get(self, key: str, kind: str) -> memoryview | None:
        """Give a payload, verified by its length and checksum and read-only, or None; waits for nobody."""
        name = self._name(key, kind)
        try:
            payload = self._files.read(name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, EntryDamage) as error:
            # One question may ask more than once, until the entry is made again.
            level = logging.DEBUG if name in self._told else logging.WARNING
            _logger.log(level, "entry %s in the store %s counts as missing: %s", name, self.folder, error)
            self._told.add(name)
            return None
        self._used.append(name)
        self._record_use()
        return payload

    def put(self, key: str, kind: str, payload: Data | tuple[Data, ...], *, label: str = "") -> bool:
        """Keep a payload, evicting what was used least recently; True once no kill or power cut can lose it.

        False, with one warning in the log, where it could not be kept. A tuple is one payload in parts.
        """
        name = self._name(key, kind)
        parts = [_bytes_of(part) for part in (payload if isinstance(payload, tuple) else (payload,))]
        label = label.encode(errors="replace").decode()  # a file's name may hold half a surrogate pair
        size_bytes = HEADER_BYTES + sum(part.nbytes for part in parts)
        if size_bytes > self.limit_bytes:
            _logger.warning(
                "entry %s was not kept: its %d bytes are more than the limit of %d of the store %s",
                *(name, size_bytes, self.limit_bytes, self.folder),
            )
            return False
        try:
            if not self._settled:
                self._files.sweep()
            with self._files.staged(name, parts, label) as temporary:
                self._place(temporary, name, size_bytes, label)
        except (OSError, IndexUnavailable, IndexDamage) as error:
            _logger.warning("entry %s was not kept in the store %s: %s", name, self.folder, error)
            return False
        self._told.discard(name)
        return True

    def touch(self, key: str, kind: str) -> None:
        """Count an entry as used now, as `get` does."""
        self._used.append(self._name(key, kind))

    def recall(self, kind: str, digest: str) -> str | None:
        """Give what was remembered, or None; waits for nobody."""
        self._check_open()
        try:
            with self._reading.read() as connection:
                return store_index.read_note(connection, kind, digest)
        except IndexDamage as error:
            _logger.warning("a note in the store %s counts as missing: %s", self.folder, error)
        except (IndexUnavailable, OSError) as error:
            _logger.debug("the notes of the store %s cannot be read: %s", self.folder, error)
        return None

    def remember(self, kind: str, digest: str, value: str) -> None:
        """Keep a small note if that is easily done; the oldest of many are forgotten."""
        if self.recall(kind, digest) == value:
            return
        try:
            make_folder(self.folder, root=self.folder)
            self._write(lambda c: store_index.put_note(c, kind, digest, value), timeout_s=_NOTE_TIMEOUT_S)
        except (OSError, IndexUnavailable, IndexDamage) as error:
            _logger.debug("a note was not kept in the store %s: %s", self.folder, error)

    def holds(self, kind: str) -> bool:
        """Whether there is any entry of that kind, as far as the index says; waits for nobody."""
        self._check_open()
        try:
            with self._reading.read() as connection:
                return store_index.has_kind(connection, kind)
        except (OSError, IndexUnavailable, IndexDamage) as error:
            _logger.debug("the index of the store %s cannot be read: %s", self.folder, error)
        return False

    def entries(self) -> Iterator[StoreEntry]:
        """Give the entries of this moment, the one used last first."""
        for name, size_bytes, created_s, label in self._rows():
            yield StoreEntry(name.key, name.kind, size_bytes, created_s, label)

    def stats(self) -> StoreStats:
        """Count the entries and their size by kind."""
        counts: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for name, size_bytes, _, _ in self._rows():
            counts[name.kind] += 1
            sizes[name.kind] += size_bytes
        kinds = {kind: KindStats(counts[kind], sizes[kind]) for kind in sorted(counts)}
        return StoreStats(self.folder, self.limit_bytes, MappingProxyType(kinds))

    def check(self, *, repair: bool = False) -> StoreReport:
        """Read every file and compare it with its row; a damaged index is made again in any case.

        With `repair`, corrupt and outdated entries and old temporaries are deleted, orphans adopted, missing rows
        forgotten. Raises StoreError where a file cannot be read for another reason than damage.
        """
        damaged = self._is_index_damaged()
        rows = {row[0] for row in self._rows()}
        files = self._files.names()
        found = {name: damage for name in files if (damage := self._files.damage(name))}
        outdated = [str(name) for name, damage in found.items() if isinstance(damage, EntryOutdated)]
        corrupt = [str(name) for name, damage in found.items() if not isinstance(damage, EntryOutdated)]
        missing = sorted(rows - set(files))
        # Others go on working, so what seems amiss is looked at once more.
        now = {row[0] for row in self._rows()}
        known = rows | now
        orphans = [name for name in files if name not in known and self._files.path(name).exists()]
        missing = [name for name in missing if name in now and not self._files.path(name).exists()]
        temporaries = self._files.old_temporaries()
        if repair:
            self._repair([*found])
        return StoreReport(
            checked=len(files),
            corrupt=tuple(corrupt),
            outdated=tuple(outdated),
            missing=tuple(map(str, missing)),
            orphans=tuple(map(str, orphans)),
            temporaries=tuple(path.name for path in temporaries),
            index_damaged=damaged,
            repaired=repair,
        )

    def prune(self, limit_bytes: int | None = None) -> int:
        """Evict down to `limit_bytes` (default: the store's own limit); give the bytes freed.

        Counts the files themselves, adopting those that a kill left without a row.
        """
        limit_bytes = self.limit_bytes if limit_bytes is None else store_place.limit_of(limit_bytes)
        return self._administer(lambda connection: self._evict(connection, limit_bytes), shrink_to_bytes=limit_bytes)

    def clear(self) -> int:
        """Delete every entry and note; give the bytes freed."""

        def clear(connection: Connection) -> int:
            connection.execute("DELETE FROM notes")
            return self._evict(connection, 0)

        return self._administer(clear, shrink_to_bytes=0)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the store {self.folder} was used after close(): open it again")

    def _name(self, key: str, kind: str) -> EntryName:
        self._check_open()
        return EntryName(key, kind)

    def _write(self, work: Callable[[Connection], _Result], *, timeout_s: float = _WRITE_TIMEOUT_S) -> _Result:
        """Do `work` in a write transaction; once more on a new index where this one is damaged."""

        def once() -> _Result:
            with self._writing.write(timeout_s=timeout_s, create=True) as connection:
                self._flush_use(connection)
                return work(connection)

        try:
            return once()
        except IndexDamage as error:
            _logger.warning("the index of the store %s is damaged: %s", self.folder, error)
            self._writing.mend()
        return once()

    def _place(self, temporary: Path, name: EntryName, size_bytes: int, label: str) -> None:
        renamed = known = False

        def add(connection: Connection) -> None:
            store_index.put_row(connection, name, size_bytes, time.time(), label)
            self._evict(connection, self.limit_bytes, keep=name)

        def reserve(connection: Connection) -> None:
            nonlocal known
            self._check_total(connection)
            known = store_index.has_row(connection, name)
            if not known:
                add(connection)

        def place(connection: Connection) -> None:
            nonlocal renamed
            if not renamed:
                self._files.place(temporary, name)
                renamed = True
                self._files.sync(name)
            add(connection)

        try:
            # The row comes first, so that a kill between cannot leave a file that the limit does not count.
            self._write(reserve)
            self._write(place)
        except BaseException:
            if not known:
                self._withdraw(name, placed=renamed)
            raise

    def _check_total(self, connection: Connection) -> None:
        if not self._settled:
            store_index.recount(connection)
            self._settled = True
        if store_index.total_bytes(connection) > self.limit_bytes:
            # Only a damaged index or a lower limit leaves it so: before anything goes, the files are asked.
            store_index.reconcile(connection, self._files.objects)

    def _withdraw(self, name: EntryName, *, placed: bool) -> None:
        """Undo a put that failed, as far as the disk allows."""

        def forget(connection: Connection) -> None:
            if not self._files.path(name).exists():
                store_index.delete_row(connection, name)

        with suppress(OSError, IndexUnavailable, IndexDamage):
            if placed:
                self._files.path(name).unlink(missing_ok=True)
            self._write(forget, timeout_s=_NOTE_TIMEOUT_S)

    def _evict(self, connection: Connection, limit_bytes: int, *, keep: EntryName | None = None) -> int:
        freed_bytes = skipped = 0
        while store_index.total_bytes(connection) > limit_bytes:
            rows = store_index.oldest_rows(connection, skip=skipped)
            if not rows:
                break
            for name, size_bytes in rows:
                if name == keep or store_index.total_bytes(connection) <= limit_bytes:
                    return freed_bytes
                try:
                    self._files.path(name).unlink(missing_ok=True)
                except OSError:
                    skipped += 1  # Windows keeps a file that is being read
                    continue
                if not store_index.delete_row(connection, name):
                    raise IndexDamage("it lists an entry that it does not hold")
                freed_bytes += size_bytes
        return freed_bytes

    def _record_use(self) -> None:
        """Note the reads so far in the index if that needs no waiting; else the next write does it."""
        if self._used:
            with (
                suppress(IndexUnavailable, IndexDamage, OSError),
                self._writing.write(timeout_s=0.0, create=False) as connection,
            ):
                self._flush_use(connection)

    def _flush_use(self, connection: Connection) -> None:
        names: dict[EntryName, None] = {}
        with suppress(IndexError):
            while True:
                name = self._used.popleft()
                names.pop(name, None)
                names[name] = None
        for name in names:
            if not store_index.is_newest(connection, name) and not store_index.mark_used(connection, name):
                self._adopt(connection, name)

    def _adopt(self, connection: Connection, name: EntryName) -> None:
        """Give a file that a kill left without a row its row; the write lock keeps eviction off."""
        with suppress(OSError, EntryDamage):
            stat = self._files.path(name).stat()
            label = read_label(self._files.path(name), name)
            store_index.put_row(connection, name, stat.st_size, stat.st_mtime, label)

    def _exists(self) -> bool:
        self._check_open()
        return self._files.objects.is_dir() or self._reading.path.exists()

    def _read(self, work: Callable[[Connection], _Result]) -> _Result:
        """Do `work` on the index, made anew from the files if it is damaged or gone."""
        try:
            with self._reading.read(create=True) as connection:
                return work(connection)
        except IndexDamage:
            self._reading.mend()
        with self._reading.read(create=True) as connection:
            return work(connection)

    def _rows(self) -> list[store_index.Row]:
        if not self._exists():
            return []
        self._record_use()
        try:
            return self._read(store_index.read_rows)
        except (OSError, IndexUnavailable, IndexDamage) as error:
            _logger.warning("the index of the store %s cannot be read: %s", self.folder, error)
        files = iterate_entries(self._files.objects)
        return [(name, stat.st_size, stat.st_mtime, "") for name, stat in files]

    def _is_index_damaged(self) -> bool:
        if not self._exists():
            return False
        try:
            with self._reading.read(create=True) as connection:
                if connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]:
                    return False
        except (OSError, IndexUnavailable):
            return False
        except IndexDamage:
            pass
        with suppress(OSError, IndexUnavailable):
            self._reading.mend()
        return True

    def _repair(self, damaged: list[EntryName]) -> None:
        def delete(connection: Connection) -> int:
            for name in damaged:
                if self._files.damage(name):
                    self._files.path(name).unlink()
                    store_index.delete_row(connection, name)
            return 0

        self._administer(delete)

    def _administer(self, work: Callable[[Connection], int], *, shrink_to_bytes: int | None = None) -> int:
        """Do `work`, on an index that agrees with the files; give the bytes freed.

        With `shrink_to_bytes`, a disk too full for the index itself first gets room from the oldest files.
        """
        if not self._exists():
            return 0

        def reconciled(connection: Connection) -> int:
            store_index.reconcile(connection, self._files.objects)
            return work(connection)

        try:
            self._files.sweep()
            try:
                return self._write(reconciled)
            except (OSError, IndexUnavailable):
                if shrink_to_bytes is None or shutil.disk_usage(self.folder).free >= _INDEX_ROOM_BYTES:
                    raise
            return self._files.delete_oldest(shrink_to_bytes) + self._write(reconciled)
        except (OSError, IndexUnavailable, IndexDamage) as error:
            raise StoreError(f"the store {self.folder} cannot be changed: {error}") from error


def _bytes_of(part: Data) -> memoryview:
    try:
        return memoryview(part).cast("B")
    except (TypeError, ValueError) as error:
        raise InputError(f"a payload is {type(part).__name__}: give bytes, or contiguous memory") from error
