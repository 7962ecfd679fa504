"""Damaged GGUF files through `load`: each loads or is refused, and nothing dies, hangs or grows."""

import json
import logging
import random
import select
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf_mutator import KINDS, mutated, read_layout

import gguf_maker as maker

logger = logging.getLogger(__name__)

Pair = tuple[Path, Path]
HANG_S = 5.0
MOST_BYTES = 1 << 30


class Loader:
    """A process that loads what it is told to; one that died or hung is replaced by the next."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def load(self, text: Path, projector: Path | None = None) -> dict[str, Any]:
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
        self.process.stdin.write(json.dumps({"model": str(text), "mmproj": projector and str(projector)}) + "\n")
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


def run(loader: Loader, models: list[tuple[Path, ...]], folder: Path, cases: int) -> Counter[str]:
    """Damage the files of copied models in turn, load them, and count what came of it by kind of outcome."""
    places = []  # each file of each model: all its model's files, itself, its layout
    for number, model in enumerate(models):
        (folder / str(number)).mkdir()
        copies = [Path(shutil.copy(path, folder / str(number) / path.name)) for path in model]
        places += [(copies, copy, read_layout(copy)) for copy in copies]
    assert [loader.load(*files)["outcome"] for files, _, _ in places] == ["loaded"] * len(places)
    counts: Counter[str] = Counter()
    bad: list[str] = []
    slowest = peak = 0.0
    for number in range(cases):
        files, path, layout = places[number % len(places)]
        kind = KINDS[number // len(places) % len(KINDS)]
        with mutated(path, layout, kind, random.Random(number)):
            found = loader.load(*files)
            if found["seconds"] >= HANG_S:  # what a busy machine delays does not come late twice
                found = loader.load(*files)
        outcome, seconds, case = found["outcome"], found["seconds"], f"case {number}, {kind} in {path.name}"
        slowest, peak = max(slowest, seconds), max(peak, found["peak_bytes"])
        if outcome.startswith(("DIED", "HUNG", "FOREIGN")) or seconds >= HANG_S or "\n" in outcome:
            bad.append(f"{case}, {seconds:.1f} s: {outcome}")
        died = "llama.cpp died" in outcome
        if died:
            logger.info("%s: %s", case, outcome)
        counts["loaded" if outcome == "loaded" else "refused, the trial died" if died else "refused"] += 1
    logger.info("%d cases: %s; slowest %.2f s, peak %.0f MB", cases, dict(counts), slowest, peak / 1e6)
    assert not bad
    assert peak < MOST_BYTES
    assert [loader.load(*files)["outcome"] for files, _, _ in places] == ["loaded"] * len(places)
    return counts


@pytest.fixture
def models(tiny_pair: Pair, tiny_pair_25: Pair, tmp_path: Path) -> list[tuple[Path, ...]]:
    """Two pairs whose architectures are checked through and through, and a text model of one that is not."""
    keys = {"qwen3.rope.dimension_count": maker.u32(maker.HEAD)}
    return [tiny_pair, tiny_pair_25, (maker.write_text(tmp_path / "other.gguf", "qwen3", keys),)]


def test_sixty_damaged_files_load_or_are_refused(
    loader: Loader, models: list[tuple[Path, ...]], tmp_path: Path
) -> None:
    assert run(loader, models, tmp_path, 60)["refused"] > 20


@pytest.mark.stress
def test_two_thousand_damaged_files_load_or_are_refused(
    loader: Loader, models: list[tuple[Path, ...]], tmp_path: Path
) -> None:
    counts = run(loader, models, tmp_path, 2000)
    assert counts["refused"] > 500
    assert counts["loaded"] > 50
    assert counts["refused, the trial died"] > 0
