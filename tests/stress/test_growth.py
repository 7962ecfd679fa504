"""Memory over hundreds of pictures."""

from pathlib import Path

import pytest

import lookonce
from test_model import grow


@pytest.mark.stress
def test_three_hundred_looks_and_questions_add_less_than_20_mb(tiny_pair: tuple[Path, Path], tmp_path: Path) -> None:
    with lookonce.load(tiny_pair[0], store=tmp_path, n_ctx=512) as model:
        assert grow(model, 300) < 20e6
