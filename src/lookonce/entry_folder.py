"""The files of a store: entries fanned out by key, and temporaries that become entries.

Knows nothing about the index, the limit or the order of use.
"""

import errno
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lookonce.durable import make_folder, sync_folder, write_temporary
from lookonce.entry_file import EntryDamage, EntryName, iterate_entries, make_header, read_payload
from lookonce.errors import StoreError

__all__ = ["EntryFolder"]

_TEMPORARY_AGE_S = 3600.0


class EntryFolder:
    """The entries below `folder`, which need not be there yet. Safe with many threads and processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects = folder / "objects"
        self._temporary = folder / "tmp"

    def path(self, name: EntryName) -> Path:
        """Where an entry is, or would be."""
        return name.path(self.objects)

    def read(self, name: EntryName) -> memoryview:
        """Read and verify an entry, as `read_payload` does."""
        return read_payload(self.path(name), name)

    def names(self) -> list[EntryName]:
        """All that have a file."""
        return [name for name, _ in iterate_entries(self.objects)]

    @contextmanager
    def staged(self, name: EntryName, parts: Sequence[memoryview], label: str) -> Iterator[Path]:
        """A temporary on the disk with what the entry is to hold, for `place`; gone at the end. Raises OSError."""
        # Folders are never removed, so they can be made before it is this writer's turn.
        make_folder(self._temporary, root=self.folder)
        make_folder(self.path(name).parent, root=self.folder)
        temporary = write_temporary(self._temporary, [make_header(name, parts, label), *parts])
        try:
            yield temporary
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def place(self, temporary: Path, name: EntryName) -> None:
        """Make a temporary the entry, in place of an older one; after `sync` no power cut undoes it."""
        temporary.replace(self.path(name))

    def sync(self, name: EntryName) -> None:
        """Put on the disk that an entry is there."""
        sync_folder(self.path(name).parent)

    def damage(self, name: EntryName) -> EntryDamage | None:
        """What is wrong with an entry; None too where it has no file.

        Raises StoreError where it cannot be read for a reason that says nothing about it.
        """
        try:
            self.read(name)
        except FileNotFoundError:
            return None
        except EntryDamage as damage:
            return damage
        except OSError as error:
            if error.errno == errno.EIO:
                return EntryDamage("the disk cannot give it back")
            # Rights, memory or open files that run out: a repair would delete what is sound.
            raise StoreError(
                f"entry {name} of the store {self.folder} cannot be read ({error.strerror or error}): "
                "mend that, then check again"
            ) from error
        return None

    def delete_oldest(self, limit_bytes: int) -> int:
        """Delete the files that were written first until the rest fits the limit; give the bytes freed."""
        files = sorted(iterate_entries(self.objects), key=lambda file: file[1].st_mtime)
        excess_bytes = sum(status.st_size for _, status in files) - limit_bytes
        freed_bytes = 0
        for name, status in files:
            if freed_bytes >= excess_bytes:
                break
            with suppress(OSError):
                self.path(name).unlink()
                freed_bytes += status.st_size
        return freed_bytes

    def old_temporaries(self) -> list[Path]:
        """The temporaries of processes that were killed; younger ones may still be written to."""
        oldest_s = time.time() - _TEMPORARY_AGE_S
        found = []
        for path in sorted(self._temporary.glob(".*.tmp")):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < oldest_s:
                    found.append(path)
        return found

    def sweep(self) -> None:
        """Delete the old temporaries."""
        for path in self.old_temporaries():
            path.unlink(missing_ok=True)
