"""Damaged GGUF files through `load`: each loads or is refused, and nothing dies, hangs or grows."""

import json
import logging
import random
import select
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf_mutator import KINDS, mutated, read_layout

logger = logging.getLogger(__name__)

Pair = tuple[Path, Path]
HANG_S = 5.0
MOST_BYTES = 1 << 30


class Loader:
    """A process that loads what it is told to; one that died or hung is replaced by the next."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def load(self, text: Path, projector: Path) -> dict[str, Any]:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("load_worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"model": str(text), "mmproj": str(projector)}) + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], 60)
        line = self.process.stdout.readline() if ready else ""
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        self.close()
        return {"outcome": "HUNG" if not ready else "DIED", "seconds": 60.0, "peak_bytes": 0}

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loader]:
    monkeypatch.delenv("LOOKONCE_TRIAL")
    loader = Loader()
    yield loader
    loader.close()


def run(loader: Loader, pairs: list[Pair], folder: Path, cases: int) -> Counter[str]:
    """Damage the files of copied pairs in turn, load them, and count what came of it by kind of outcome."""
    copies = []
    for number, pair in enumerate(pairs):
        (folder / str(number)).mkdir()
        copies.append([folder / str(number) / path.name for path in pair])
        for source, copy in zip(pair, copies[-1], strict=True):
            copy.write_bytes(source.read_bytes())
    layouts = {path: read_layout(path) for pair in copies for path in pair}
    assert all(loader.load(*pair)["outcome"] == "loaded" for pair in copies)  # type: ignore[misc]
    counts: Counter[str] = Counter()
    bad: list[str] = []
    slowest = peak = 0.0
    for number in range(cases):
        draw = random.Random(number)
        pair, kind = copies[number % len(copies)], KINDS[number // (2 * len(copies)) % len(KINDS)]
        path = pair[number // len(copies) % 2]
        with mutated(path, layouts[path], kind, draw):
            found = loader.load(pair[0], pair[1])
        outcome, case = found["outcome"], f"case {number}, {kind} in {path.name}"
        slowest, peak = max(slowest, found["seconds"]), max(peak, found["peak_bytes"])
        if outcome.startswith(("DIED", "HUNG", "FOREIGN")) or found["seconds"] >= HANG_S or "\n" in outcome:
            bad.append(f"{case}, {found['seconds']:.1f} s: {outcome}")
        where = "in the trial" if "trial" in outcome else "by the header"
        counts["loaded" if outcome == "loaded" else f"refused {where}"] += 1
        if where == "in the trial":
            logger.info("%s: %s", case, outcome)
    logger.info("%d cases: %s; slowest %.2f s, peak %.0f MB", cases, dict(counts), slowest, peak / 1e6)
    assert not bad
    assert peak < MOST_BYTES
    assert all(loader.load(*pair)["outcome"] == "loaded" for pair in copies)  # type: ignore[misc]
    return counts


def test_sixty_damaged_files_load_or_are_refused(
    loader: Loader, tiny_pair: Pair, tiny_pair_25: Pair, tmp_path: Path
) -> None:
    counts = run(loader, [tiny_pair, tiny_pair_25], tmp_path, 60)
    assert counts["refused by the header"] > 20


@pytest.mark.stress
def test_two_thousand_damaged_files_load_or_are_refused(
    loader: Loader, tiny_pair: Pair, tiny_pair_25: Pair, tmp_path: Path
) -> None:
    counts = run(loader, [tiny_pair, tiny_pair_25], tmp_path, 2000)
    assert counts["refused by the header"] > 500
    assert counts["loaded"] > 50
