"""Sizes as people write and read them.

>>> parse_size("5GB"), parse_size("1.5 GiB"), format_size(1610612736)
(5000000000, 1610612736, '1.61 GB')
"""

import re
from typing import Final

from lookonce.errors import InputError

__all__ = ["format_size", "parse_size"]

_STEPS: Final = "KMGT"
_SIZE: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([KMGT])(i)?)?B?\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Read a size in bytes: KB is 1,000 bytes, KiB 1,024. Raises InputError."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise InputError(f"{text!r} is not a size: write it as 500MB, 5GB or 1.5GiB")
    number, step, binary = match.groups()
    unit = (1024 if binary else 1000) ** (_STEPS.index(step.upper()) + 1 if step else 0)
    return int(float(number) * unit) if "." in number else int(number) * unit


def format_size(size_bytes: int) -> str:
    """Write a size with three digits, in powers of 1,000 as disks are sold."""
    size, unit = float(size_bytes), ""
    for step in _STEPS:
        if size < 999.5:
            break
        size, unit = size / 1000, step
    if not unit:
        return f"{size_bytes} B"
    return f"{size:.0f} {unit}B" if size >= 100 else f"{size:.3g} {unit}B"
