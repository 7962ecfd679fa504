"""What a store tells about itself: an entry, the counts, the findings of an audit.

Knows nothing about files or SQLite.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["KindStats", "StoreEntry", "StoreReport", "StoreStats"]


@dataclass(frozen=True, slots=True)
class StoreEntry:
    """One entry as the index has it; `size_bytes` is its file's, `created_s` seconds since the epoch."""

    key: str
    kind: str
    size_bytes: int
    created_s: float
    label: str


@dataclass(frozen=True, slots=True)
class KindStats:
    """How many entries of one kind there are, and their size together."""

    entries: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What a store holds."""

    folder: Path
    limit_bytes: int
    kinds: Mapping[str, KindStats]

    @property
    def entries(self) -> int:
        """The number of entries of all kinds."""
        return sum(kind.entries for kind in self.kinds.values())

    @property
    def size_bytes(self) -> int:
        """The size of all entries."""
        return sum(kind.size_bytes for kind in self.kinds.values())


@dataclass(frozen=True, slots=True)
class StoreReport:
    """What `Store.check` found; entries are named `key.kind`.

    `outdated` are entries of another version, which are never used: their pictures are looked at or evaluated again.
    `missing` are rows without a file, as a kill leaves them, `orphans` files without a row, as a power cut may: both
    are harmless. `temporaries` are left-over files more than an hour old.
    """

    checked: int
    corrupt: tuple[str, ...]
    outdated: tuple[str, ...]
    missing: tuple[str, ...]
    orphans: tuple[str, ...]
    temporaries: tuple[str, ...]
    index_damaged: bool
    repaired: bool

    @property
    def sound(self) -> bool:
        """Tell whether nothing was damaged."""
        return not self.corrupt and not self.index_damaged
