"""The peak of a process is its own."""

import subprocess
import sys

import numpy as np

from lookonce.peak_memory import peak_bytes


def test_the_peak_counts_what_was_held_and_given_back() -> None:
    before = peak_bytes()
    held = np.ones(before + 200_000_000, dtype=np.uint8)
    del held
    assert peak_bytes() > before + 190_000_000


def test_the_peak_of_a_process_does_not_count_what_its_parent_held() -> None:
    held = np.ones(300_000_000, dtype=np.uint8)
    code = "from lookonce.peak_memory import peak_bytes; print(peak_bytes())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5_000_000 < int(run.stdout) < held.nbytes // 2
