"""A process that a benchmark starts: its answer is the JSON of its last line, and its failure one sentence.

Knows nothing of what is measured.
"""

import json
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from lookonce.errors import NativeError

__all__ = ["run_process"]


def run_process(
    who: str, command: Sequence[str], *, given: str = "", environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run a command with a text on its stdin, and give its answer. Raises NativeError, which names `who` died.

    environment: in place of this process's own.
    """
    done = subprocess.run(  # noqa: S603  a Python with code of this project
        command, input=given, capture_output=True, text=True, check=False, env=environment
    )
    said = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
    if done.returncode:
        raise NativeError(f"{who} ended with status {done.returncode}: {said[0].strip()}")
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        answer = None
    if not isinstance(answer, dict):
        raise NativeError(f"{who} ended without an answer: {said[0].strip()}")
    return answer
