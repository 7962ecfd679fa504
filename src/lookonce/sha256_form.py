"""How a SHA-256 is written: 64 small hexadecimal digits. What files and hubs tell is held to it before it is used."""

import re
from typing import Final

from typing_extensions import TypeIs

__all__ = ["is_sha256"]

_FORM: Final = re.compile(r"[0-9a-f]{64}")


def is_sha256(value: object) -> TypeIs[str]:
    """Tell whether a value has that form."""
    return isinstance(value, str) and _FORM.fullmatch(value) is not None
