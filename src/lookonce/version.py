"""The version of this package: saved looks record it."""

from typing import Final

VERSION: Final = "0.1.0"
