"""Native calls that break off, for tests of what is left behind."""

from collections.abc import Callable
from typing import Any

import pytest

from lookonce.native.text import Context

__all__ = ["break_off"]


def break_off(patch: pytest.MonkeyPatch, error: type[BaseException], *, at: int) -> None:
    """Have the context's evaluating calls, counted together, raise `error` once number `at` has done its work."""
    calls = 0

    def breaking(real: Callable[..., None]) -> Callable[..., None]:
        def call(self: Context, *arguments: Any, **options: Any) -> None:
            nonlocal calls
            calls += 1
            real(self, *arguments, **options)
            if calls == at:
                raise error("broken off")

        return call

    for name in ("decode_tokens", "decode_rows", "decode_many"):
        patch.setattr(Context, name, breaking(getattr(Context, name)))
