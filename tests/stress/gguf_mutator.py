"""Ways to damage a GGUF file: where its header's parts lie, and what to write over them."""

import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

KINDS: Final = (
    "random bytes",
    "header bytes",
    "truncation",
    "inflated count",
    "hostile length",
    "hostile value",
    "wrong type",
    "shape",
    "offset",
    "vocabulary",
)
_SIZES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_EXTREMES: Final = (
    0,
    1,
    2,
    3,
    5,
    7,
    31,
    33,
    63,
    255,
    257,
    4095,
    65_537,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63,
    2**64 - 1,
)


@dataclass(slots=True)
class Layout:
    """Where a sound file's header has its parts: (offset, size in bytes) of each."""

    counts: list[tuple[int, int]] = field(default_factory=list)
    lengths: list[tuple[int, int]] = field(default_factory=list)
    values: list[tuple[int, int]] = field(default_factory=list)
    types: list[tuple[int, int]] = field(default_factory=list)
    shapes: list[tuple[int, int]] = field(default_factory=list)
    offsets: list[tuple[int, int]] = field(default_factory=list)
    texts: list[tuple[int, int]] = field(default_factory=list)
    end: int = 0


def read_layout(path: Path) -> Layout:
    """Find the parts of a sound file's header."""
    data = path.read_bytes()
    layout, at = Layout(counts=[(8, 8), (16, 8)], types=[(4, 4)]), 24
    n_tensors, n_keys = struct.unpack_from("<QQ", data, 8)

    def text(at: int) -> int:
        (length,) = struct.unpack_from("<Q", data, at)
        layout.lengths.append((at, 8))
        layout.texts.append((at + 8, length))
        return at + 8 + length

    for _ in range(n_keys):
        at = text(at)
        layout.types.append((at, 4))
        (kind,) = struct.unpack_from("<I", data, at)
        at += 4
        count = 1
        if kind == 9:
            kind, count = struct.unpack_from("<IQ", data, at)
            layout.types.append((at, 4))
            layout.counts.append((at + 4, 8))
            at += 12
        for _ in range(count):
            if kind == 8:
                at = text(at)
            else:
                if count < 64:
                    layout.values.append((at, _SIZES[kind]))
                at += _SIZES[kind]
    for _ in range(n_tensors):
        at = text(at)
        (dims,) = struct.unpack_from("<I", data, at)
        layout.shapes += [(at, 4), *((at + 4 + 8 * i, 8) for i in range(dims))]
        at += 4 + 8 * dims
        layout.types.append((at, 4))
        layout.offsets.append((at + 4, 8))
        at += 12
    layout.end = at
    return layout


@contextmanager
def mutated(path: Path, layout: Layout, kind: str, draw: random.Random) -> Iterator[None]:
    """Damage a file in place while the block runs, and mend it afterwards."""
    size = path.stat().st_size
    if kind == "truncation":
        keep = draw.choice((draw.randrange(size), draw.randrange(layout.end), size - draw.randrange(1, 64)))
        with path.open("rb+") as file:
            file.seek(keep)
            tail = file.read()
            file.truncate(keep)
        try:
            yield
        finally:
            with path.open("ab") as file:
                file.write(tail)
        return
    patches = list(_patches(layout, kind, draw, size))
    with path.open("rb+") as file:
        saved = [_swap(file.fileno(), *patch) for patch in patches]
    try:
        yield
    finally:
        with path.open("rb+") as file:
            for patch in reversed(saved):
                _swap(file.fileno(), *patch)


def _swap(descriptor: int, at: int, content: bytes) -> tuple[int, bytes]:
    import os

    was = os.pread(descriptor, len(content), at)
    os.pwrite(descriptor, content, at)
    return at, was


def _patches(layout: Layout, kind: str, draw: random.Random, size: int) -> Iterator[tuple[int, bytes]]:
    if kind in ("random bytes", "header bytes"):
        end = size if kind == "random bytes" else layout.end
        for _ in range(draw.choice((1, 2, 8, 64))):
            yield draw.randrange(end - 8), draw.randbytes(draw.randrange(1, 9))
        return
    if kind == "vocabulary":
        for at, length in draw.sample(layout.texts, draw.choice((1, 3, 20))):
            if length:
                yield at, draw.choice((draw.randbytes(length), b"\0" * length, b" " * length, b"\xff" * length))
        return
    places = {
        "inflated count": layout.counts,
        "hostile length": layout.lengths,
        "hostile value": layout.values,
        "wrong type": layout.types,
        "shape": layout.shapes,
        "offset": layout.offsets,
    }[kind]
    for at, width in draw.sample(places, draw.choice((1, 1, 2))):
        value = draw.choice(
            (draw.choice(_EXTREMES), draw.getrandbits(8 * width), draw.randrange(45), draw.randrange(4096))
        )
        yield at, (value & (1 << 8 * width) - 1).to_bytes(width, "little")
