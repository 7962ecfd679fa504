"""States in memory: which is found, and which goes first."""

import numpy as np

from look_maker import make_look
from lookonce.held import START, Held
from lookonce.kept_state import KeptState, KeptStates
from lookonce.prompt import RowRun, TokenRun, Unit

A, B = make_look(0), make_look(1)


def row_run(look: object) -> RowRun:
    return RowRun(look, 0, 6, 3, causal=True)  # type: ignore[arg-type]


def make_state(*runs: TokenRun | RowRun, size: int = 100) -> KeptState:
    return KeptState(Held.of(runs), np.zeros(size, dtype=np.uint8), last=0)


ANY = frozenset(range(100))
TEXT = TokenRun((1, 2, 3))
QUESTION: list[Unit] = [1, 2, 3, row_run(A), 9]


def test_the_state_of_which_the_most_is_reused_is_found() -> None:
    kept = KeptStates(1000, 1000)
    short, long, other = (make_state(*runs) for runs in ([TEXT], [TEXT, row_run(A)], [TEXT, row_run(B)]))
    for state in (short, other):
        kept.add(state)
    assert kept.best(QUESTION, ANY)[1].n_units == 3
    kept.add(long)
    found, mark = kept.best(QUESTION, ANY)
    assert found is long
    assert (mark.n_units, mark.n_cells, mark.position) == (4, 9, 6)
    assert kept.best([7, 8], ANY) == (None, START)


def test_a_state_is_reused_only_up_to_a_cut_of_the_prompt() -> None:
    kept = KeptStates(1000, 1000)
    kept.add(make_state(TEXT, row_run(A)))
    assert kept.best(QUESTION, frozenset({0, 3}))[1].n_units == 3
    assert kept.best(QUESTION, frozenset({0, 2}))[1] is START


def test_a_state_takes_the_place_of_those_it_contains() -> None:
    kept = KeptStates(1000, 1000)
    for runs in ([TEXT], [TEXT, row_run(B)], [TEXT, row_run(A)], [TEXT, row_run(A)]):
        kept.add(make_state(*runs))
    assert [len(state.held.units) for state in kept._states] == [4, 4]


def test_the_least_recently_used_go_first_and_the_newest_stays_whatever_its_size() -> None:
    kept = KeptStates(1000, 250)
    first, second, third = (make_state(TokenRun((number,)), row_run(A)) for number in range(3))
    kept.add(first)
    kept.add(second)
    kept.use(first)
    kept.add(third)
    assert kept._states == [first, third]
    kept.use(second)
    assert second not in kept._states
    large = make_state(TEXT, size=1000)
    kept.add(large)
    assert kept._states == [large]
    kept.drop(large)
    kept.drop(large)
    assert kept._states == []


def test_states_of_more_cells_than_the_context_has_do_not_stay() -> None:
    kept = KeptStates(14, 10**6)
    first, second, third = (make_state(TokenRun((number,)), row_run(A)) for number in range(3))
    for state in (first, second, third):
        kept.add(state)
    assert kept._states == [second, third]
