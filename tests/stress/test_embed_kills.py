"""A long run of `lookonce embed` under kills."""

from pathlib import Path

import pytest

from test_embed_run import check_kills


@pytest.mark.stress
@pytest.mark.parametrize("suffix", ["npy", "jsonl"])
def test_a_run_killed_fifty_times_gives_the_bytes_of_one_left_alone(
    tiny_pair: tuple[Path, Path], tmp_path: Path, suffix: str
) -> None:
    check_kills(tmp_path, tiny_pair[0], suffix, n_items=800, n_kills=50, seed=11)
