"""What several test modules share: model pairs made on the spot, once a session."""

import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def _make_pair(folder: Path, family: str) -> tuple[Path, Path]:
    sys.path.insert(0, str(SCRIPTS))
    try:
        from make_model import make_pair
    finally:
        sys.path.remove(str(SCRIPTS))
    text, projector = make_pair(folder, family=family)
    return text, projector


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The text model and the projector of a tiny random Qwen3-VL, both F32, alone in their folder."""
    return _make_pair(tmp_path_factory.mktemp("tiny"), "qwen3vl")


@pytest.fixture(scope="session")
def tiny_pair_25(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The text model and the projector of a tiny random Qwen2.5-VL, both F32, alone in their folder."""
    return _make_pair(tmp_path_factory.mktemp("tiny25"), "qwen2.5vl")
