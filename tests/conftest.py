"""What several test modules share: model pairs made on the spot, once a session."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lookonce.synthetic.pair import make_pair


@pytest.fixture(scope="session", autouse=True)
def _hear_interrupts() -> Iterator[None]:
    """A shell has what it starts in the background ignore Ctrl-C, and so would every program that a test starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def _apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests away from the user's own store, cards and models, and from a child process for every model."""
    folder = tmp_path_factory.mktemp("apart")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("LOOKONCE_", "HF_", "MODELSCOPE_"))]:
            patch.delenv(name)
        patch.setenv("LOOKONCE_TRIAL", "0")
        for name in ("LOOKONCE_STORE", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "HF_HOME", "MODELSCOPE_CACHE"):
            patch.setenv(name, str(folder / name))
        yield


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The text model and the projector of a tiny random Qwen3-VL, both F32, alone in their folder."""
    return make_pair(tmp_path_factory.mktemp("tiny"), family="qwen3vl")


@pytest.fixture(scope="session")
def tiny_pair_25(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The text model and the projector of a tiny random Qwen2.5-VL, both F32, alone in their folder."""
    return make_pair(tmp_path_factory.mktemp("tiny25"), family="qwen2.5vl")
