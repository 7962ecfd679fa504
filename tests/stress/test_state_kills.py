"""Processes that ask about pictures and are killed at any instant, also while they write a state.

The run is a function that the default tests call with small numbers.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lookonce
from look_maker import make_look
from lookonce.store import Store

N_LOOKS = 6
OPTIONS = {"temperature": 0, "max_tokens": 4}


def ask_for_ever(model_folder: str, store: str, seed: str) -> None:
    """Print a line with each answer; the store has room for two states, so that most are written again."""
    chance = random.Random(seed)
    with (
        Store(store, limit_bytes=1_100_000) as narrow,
        lookonce.load(model_folder, store=narrow, threads=1, n_ctx=256) as model,
    ):
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            number = chance.randrange(N_LOOKS)
            reply = model.ask("What?", [make_look(number, (12, 12))], **OPTIONS)
            sys.stdout.write(f"{number} {reply.text!r}\n")
            sys.stdout.flush()


def kill_askers(model_folder: Path, folder: Path, *, kills: int, seed: int) -> None:
    """See that each answer is the one of a process left alone, and that nothing in the store is damaged."""
    with lookonce.load(model_folder, store=False, threads=1, n_ctx=256) as model:
        expected = [model.ask("What?", [make_look(number, (12, 12))], **OPTIONS).text for number in range(N_LOOKS)]
    chance = random.Random(seed)
    path = os.pathsep.join(entry for entry in sys.path if entry)
    n_answers = 0
    for number in range(kills):
        asker = subprocess.Popen(
            [sys.executable, __file__, str(model_folder), str(folder), f"{seed}/{number}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert asker.stdout is not None
        assert asker.stdout.readline() == "ready\n", asker.communicate()
        time.sleep(chance.uniform(0, 0.8))
        asker.send_signal(signal.SIGKILL)
        output, errors = asker.communicate()
        assert (asker.returncode, errors) == (-signal.SIGKILL, "")
        for line in output.split("\n")[:-1]:  # what follows the last line's end was cut by the kill
            look, _, text = line.partition(" ")
            assert text == repr(expected[int(look)])
            n_answers += 1
    assert n_answers
    with Store(folder) as store:
        report = store.check()
        assert report.sound, report
        assert report.orphans == ()
    for number in range(N_LOOKS):
        for _ in range(2):
            with lookonce.load(model_folder, store=folder, threads=1, n_ctx=256) as model:
                reply = model.ask("What?", [make_look(number, (12, 12))], **OPTIONS)
            assert reply.text == expected[number]
        assert reply.usage.prefix == "store"


@pytest.mark.stress
def test_a_hundred_kills_while_states_are_kept(tiny_pair: tuple[Path, Path], tmp_path: Path) -> None:
    kill_askers(tiny_pair[0].parent, tmp_path / "store", kills=100, seed=3)


if __name__ == "__main__":
    ask_for_ever(*sys.argv[1:])
