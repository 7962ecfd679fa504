"""The store's index: which entries there are, how large, in which order they were used, and small notes.

Knows nothing about what entries hold. The entry files are the truth and the index can be made again from
them, so a damaged one is set aside, never believed: `IndexDamage` says so, `IndexUnavailable` that the disk
or another process stands in the way.

SQLite with a write-ahead log, so that readers and the one writer do not wait for one another. `synchronous`
is NORMAL: a power cut may undo the last transactions, which costs their order of use but no entry, and saves
a disk flush for every read that is recorded.
"""

import hashlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lookonce.entry_file import EntryDamage, EntryName, iterate_entries, read_label
from lookonce.errors import InputError, StoreError

__all__ = [
    "IndexDamage",
    "IndexUnavailable",
    "Row",
    "StoreIndex",
    "delete_row",
    "has_row",
    "is_newest",
    "mark_used",
    "oldest_rows",
    "put_note",
    "put_row",
    "read_note",
    "read_rows",
    "reconcile",
    "recount",
    "total_bytes",
]

_logger = logging.getLogger(__name__)

_SCHEMA = 1
_MAX_NOTES = 50_000
_ALONE_TIMEOUT_S = 60.0
_READ_TIMEOUT_S = 0.1
_TABLES = """
CREATE TABLE entries (
  key TEXT NOT NULL, kind TEXT NOT NULL, size_bytes INTEGER NOT NULL, used INTEGER NOT NULL,
  created_s REAL NOT NULL, label TEXT NOT NULL, PRIMARY KEY (key, kind)) WITHOUT ROWID;
CREATE INDEX entries_by_use ON entries (used);
CREATE TABLE notes (
  kind TEXT NOT NULL, digest TEXT NOT NULL, value TEXT NOT NULL, seal BLOB NOT NULL, made INTEGER NOT NULL,
  PRIMARY KEY (kind, digest)) WITHOUT ROWID;
CREATE INDEX notes_by_age ON notes (made);
CREATE TABLE total (size_bytes INTEGER NOT NULL);
INSERT INTO total VALUES (0);
"""
# What SQLite says where the disk, its rights or another process is at fault; everything else is a damaged
# index, because the statements here are fixed. The codes themselves are not to be had before Python 3.11.
_OUTSIDE_CAUSES = (
    "locked",
    "busy",
    "full",
    "readonly",
    "disk I/O",
    "unable to open",
    "locking protocol",
    "interrupted",
    "access permission",
    "authorization",
)

Row = tuple[EntryName, int, float, str]
"""Name, size in bytes, time of making, label."""


class IndexDamage(Exception):  # noqa: N818  (it never leaves the store)
    """The index holds what it cannot hold: set it aside and make it again."""


class IndexUnavailable(Exception):  # noqa: N818  (it never leaves the store)
    """The index cannot be used at the moment, through no fault in it."""


class StoreIndex:
    """One connection to the index, for any thread, reopened after a fork and after the index was made anew.

    A write waits for other writers up to the time it is given; a read waits for nobody.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "index.sqlite"
        self._objects = folder / "objects"
        self._alone_path = folder / "repair.lock"
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._inherited: list[sqlite3.Connection] = []

    @contextmanager
    def write(self, *, timeout_s: float, create: bool) -> Iterator[sqlite3.Connection]:
        """Hold a write transaction; it is undone if the block raises."""
        with self._held(timeout_s), _translated():
            connection = self._connect(timeout_s, create=create)
            connection.execute(f"PRAGMA busy_timeout={int(timeout_s * 1000)}")
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                raise

    @contextmanager
    def read(self, *, create: bool = False) -> Iterator[sqlite3.Connection]:
        """Hold the connection for reading, also where the folder cannot be written to."""
        with self._held(_READ_TIMEOUT_S), _translated():
            try:
                connection = self._connect(_READ_TIMEOUT_S, create=create)
            except (IndexUnavailable, sqlite3.OperationalError, OSError):
                if not self.path.exists() or os.access(self.path.parent, os.W_OK):
                    raise
                # A folder that cannot be written to has no room for what SQLite shares between processes.
                connection = self._open("immutable=1", 0.0)
                self._identity = None  # so that it is opened afresh the next time
            yield connection

    def mend(self) -> None:
        """Set the index that this connection found damaged aside; the next write makes another."""
        with self._held(_ALONE_TIMEOUT_S), _translated(), self._alone():
            self._disconnect()
            if self._identity is None or self._identity != _identify(self.path):
                return  # another process was quicker
            for old in self.path.parent.glob(f"{self.path.name}*.corrupt-*"):
                old.unlink(missing_ok=True)
            aside = f".corrupt-{time.strftime('%Y%m%d-%H%M%S')}"
            # The log goes first: left alone beside a new index it would be played into that one.
            for suffix in ("-wal", "-shm", ""):
                with suppress(FileNotFoundError):
                    source = self.path.with_name(self.path.name + suffix)
                    source.replace(source.with_name(source.name + aside))
            _logger.warning("%s was damaged: it is set aside as *%s and made again from the files", self.path, aside)

    def close(self) -> None:
        """Close the connection; it opens again when it is used again."""
        with self._held(_ALONE_TIMEOUT_S):
            self._disconnect()

    @contextmanager
    def _held(self, timeout_s: float) -> Iterator[None]:
        if os.getpid() != self._pid:
            # SQLite forbids use and close of a connection after a fork; the lock may be held by a thread
            # that does not exist here.
            self._lock = threading.RLock()
            if self._connection is not None:
                self._inherited.append(self._connection)
            self._connection, self._pid = None, os.getpid()
        lock = self._lock
        if not lock.acquire(timeout=timeout_s):
            raise IndexUnavailable("another thread holds it")
        try:
            yield
        finally:
            lock.release()

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self, timeout_s: float, *, create: bool) -> sqlite3.Connection:
        if self._connection is not None and self._identity == _identify(self.path):
            return self._connection
        self._disconnect()
        if create:
            self.path.touch()
        self._identity = _identify(self.path)
        if self._identity is None:
            raise IndexUnavailable("there is none")
        connection = self._open("mode=rw", timeout_s)
        try:
            self._make_ready(connection, create=create)
        except BaseException:
            self._disconnect()
            raise
        return connection

    def _open(self, options: str, timeout_s: float) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?{options}",
            uri=True,
            timeout=timeout_s,
            isolation_level=None,
            check_same_thread=False,
        )
        self._connection = connection
        try:
            connection.execute("PRAGMA synchronous=NORMAL")
            version = _version(connection)
        except BaseException:
            self._disconnect()
            raise
        if version > _SCHEMA:
            self._disconnect()
            raise StoreError(
                f"the store {self.path.parent} has schema {version} and this lookonce knows {_SCHEMA}: "
                "update lookonce, or give another folder"
            )
        return connection

    def _make_ready(self, connection: sqlite3.Connection, *, create: bool) -> None:
        if _version(connection) == 0:
            if not create:
                raise IndexUnavailable("it is empty")
            self._create(connection)
        if self._identity != _identify(self.path):
            raise IndexDamage("another process set it aside at this moment")

    def _create(self, connection: sqlite3.Connection) -> None:
        # Changing to the write-ahead log answers "locked" at once where two do it together.
        with self._alone():
            if _version(connection):
                return
            # Where the file system cannot have one, SQLite keeps its rollback journal, which is right but
            # slower.
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("BEGIN IMMEDIATE")
            try:
                for statement in _TABLES.split(";"):
                    connection.execute(statement)
                reconcile(connection, self._objects)
                connection.execute(f"PRAGMA user_version={_SCHEMA * 0x01010101}")
                connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from making or setting aside the index; an ended process lets go by itself."""
        lock = sqlite3.connect(self._alone_path, timeout=_ALONE_TIMEOUT_S, isolation_level=None)
        try:
            lock.execute("BEGIN EXCLUSIVE")
            yield
        finally:
            lock.close()


def has_kind(connection: sqlite3.Connection, kind: str) -> bool:
    """Tell whether any entry of that kind is in the index."""
    return connection.execute("SELECT 1 FROM entries WHERE kind=? LIMIT 1", (kind,)).fetchone() is not None


def has_row(connection: sqlite3.Connection, name: EntryName) -> bool:
    """Tell whether the entry is in the index."""
    found = connection.execute("SELECT 1 FROM entries WHERE key=? AND kind=?", (name.key, name.kind))
    return found.fetchone() is not None


def is_newest(connection: sqlite3.Connection, name: EntryName) -> bool:
    """Tell whether the entry is the one used last."""
    newest = connection.execute("SELECT key, kind FROM entries ORDER BY used DESC LIMIT 1").fetchone()
    return bool(newest == (name.key, name.kind))


def mark_used(connection: sqlite3.Connection, name: EntryName) -> bool:
    """Make the entry the one used last; False where it is not in the index.

    Order is a counter in the index, because clocks differ between processes and jump.
    """
    changed = connection.execute(
        "UPDATE entries SET used=(SELECT max(used) + 1 FROM entries) WHERE key=? AND kind=?",
        (name.key, name.kind),
    )
    return changed.rowcount == 1


def put_row(connection: sqlite3.Connection, name: EntryName, size_bytes: int, created_s: float, label: str) -> None:
    """Add or change an entry, as the one used last."""
    delete_row(connection, name)
    connection.execute(
        "INSERT INTO entries SELECT ?, ?, ?, coalesce(max(used), 0) + 1, ?, ? FROM entries",
        (name.key, name.kind, size_bytes, created_s, label),
    )
    connection.execute("UPDATE total SET size_bytes = size_bytes + ?", (size_bytes,))


def delete_row(connection: sqlite3.Connection, name: EntryName) -> bool:
    """Forget an entry (its file is the caller's affair); False where there is none."""
    return _delete_raw(connection, name.key, name.kind)


def oldest_rows(connection: sqlite3.Connection, *, skip: int) -> list[tuple[EntryName, int]]:
    """Give up to 64 entries and their sizes in the order they were used, after `skip` of them."""
    rows = connection.execute("SELECT key, kind, size_bytes FROM entries ORDER BY used LIMIT 64 OFFSET ?", (skip,))
    return [(_name(key, kind), size) for key, kind, size in rows.fetchall()]


def read_rows(connection: sqlite3.Connection) -> list[Row]:
    """Give every entry, the one used last first."""
    rows = connection.execute("SELECT key, kind, size_bytes, created_s, label FROM entries ORDER BY used DESC")
    return [(_name(key, kind), size, created, label) for key, kind, size, created, label in rows.fetchall()]


def total_bytes(connection: sqlite3.Connection) -> int:
    """Give the size of all entries together, at no cost."""
    found = connection.execute("SELECT size_bytes FROM total").fetchall()
    if len(found) != 1 or not isinstance(found[0][0], int) or found[0][0] < 0:
        raise IndexDamage("its total is wrong")
    return int(found[0][0])


def recount(connection: sqlite3.Connection) -> None:
    """Add up the total anew; the cost grows with the number of entries."""
    connection.execute("UPDATE total SET size_bytes = (SELECT coalesce(sum(size_bytes), 0) FROM entries)")


def reconcile(connection: sqlite3.Connection, objects: Path) -> None:
    """Make the index agree with the files: adopt what it lacks, oldest first, and forget what is gone.

    Damaged files are adopted too: they take room, so they must count, and in time they go.
    """
    rows = {(key, kind): size for key, kind, size in connection.execute("SELECT key, kind, size_bytes FROM entries")}
    for name, stat in sorted(iterate_entries(objects), key=lambda item: item[1].st_mtime_ns):
        known = rows.pop((name.key, name.kind), None)
        if known is None:
            label = ""
            with suppress(OSError, EntryDamage):
                label = read_label(name.path(objects), name)
            put_row(connection, name, stat.st_size, stat.st_mtime, label)
        elif known != stat.st_size:
            connection.execute(
                "UPDATE entries SET size_bytes=? WHERE key=? AND kind=?", (stat.st_size, name.key, name.kind)
            )
    for key, kind in rows:
        _delete_raw(connection, key, kind)
    recount(connection)


def put_note(connection: sqlite3.Connection, kind: str, digest: str, value: str) -> None:
    """Keep a note; of more than 50,000 the oldest go."""
    connection.execute("DELETE FROM notes WHERE kind=? AND digest=?", (kind, digest))
    connection.execute(
        "INSERT INTO notes SELECT ?, ?, ?, ?, coalesce(max(made), 0) + 1 FROM notes",
        (kind, digest, value, _seal(kind, digest, value)),
    )
    connection.execute("DELETE FROM notes WHERE made <= (SELECT max(made) FROM notes) - ?", (_MAX_NOTES,))


def read_note(connection: sqlite3.Connection, kind: str, digest: str) -> str | None:
    """Give a note's value; `IndexDamage` where it is not the one that was kept.

    A note may lead to an entry, so a changed byte in it would be a wrong entry that verifies.
    """
    found = connection.execute("SELECT value, seal FROM notes WHERE kind=? AND digest=?", (kind, digest)).fetchone()
    if found is None:
        return None
    value, seal = found
    if not isinstance(value, str) or seal != _seal(kind, digest, value):
        raise IndexDamage("a note differs from its SHA-256")
    return value


def _seal(kind: str, digest: str, value: str) -> bytes:
    return hashlib.sha256("\0".join((kind, digest, value)).encode()).digest()


def _delete_raw(connection: sqlite3.Connection, key: object, kind: object) -> bool:
    place = (key, kind)
    connection.execute(
        "UPDATE total SET size_bytes = size_bytes - "
        "coalesce((SELECT size_bytes FROM entries WHERE key=? AND kind=?), 0)",
        place,
    )
    return connection.execute("DELETE FROM entries WHERE key=? AND kind=?", place).rowcount == 1


def _name(key: object, kind: object) -> EntryName:
    try:
        return EntryName(str(key), str(kind))
    except InputError as error:
        raise IndexDamage("it names an entry that cannot be") from error


def _identify(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stat.st_dev, stat.st_ino


def _version(connection: sqlite3.Connection) -> int:
    """Give the schema's version: four equal bytes, so that a flipped bit shows as damage."""
    stored = int(connection.execute("PRAGMA user_version").fetchone()[0])
    version = stored & 0xFF
    if stored & 0xFFFFFFFF != version * 0x01010101:
        raise IndexDamage("its version is wrong")
    return version


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, sqlite3.Warning) as error:
        if any(cause in str(error) for cause in _OUTSIDE_CAUSES):
            raise IndexUnavailable(str(error)) from error
        raise IndexDamage(str(error)) from error
