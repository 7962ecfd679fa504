"""What a benchmark's process answers is read from its last line, and what it fails of is one sentence."""

import os
import sys

import pytest

from lookonce.bench_process import run_process
from lookonce.errors import LookonceError


def run(code: str, given: str = "") -> dict[str, object]:
    return run_process("the peer", [sys.executable, "-c", code], given=given)


def test_the_answer_is_the_last_line_whatever_was_said_before() -> None:
    code = "import sys; print('loading'); print('a warning', file=sys.stderr); print(sys.stdin.read())"
    assert run(code, given='{"seconds": 1.5}') == {"seconds": 1.5}


def test_a_process_has_the_environment_that_it_is_given() -> None:
    code = "import json, os; print(json.dumps({'seen': os.environ.get('BENCHED')}))"
    command = [sys.executable, "-c", code]
    assert run_process("the peer", command, environment={**os.environ, "BENCHED": "yes"}) == {"seen": "yes"}


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise RuntimeError('no room')", "the peer ended with status 1: RuntimeError: no room"),
        ("import sys; sys.exit(7)", "the peer ended with status 7: it said nothing"),
        ("import sys; print('{}'); sys.exit('a\\nlast \\n\\n')", "the peer ended with status 1: last"),
        ("pass", "the peer ended without an answer: it said nothing"),
        ("import sys; print('done'); print('why', file=sys.stderr)", "the peer ended without an answer: why"),
        ("print([1])", "the peer ended without an answer: it said nothing"),
    ],
)
def test_a_failure_says_who_and_the_last_line_of_its_errors(code: str, told: str) -> None:
    with pytest.raises(LookonceError) as caught:
        run(code)
    assert str(caught.value) == told
