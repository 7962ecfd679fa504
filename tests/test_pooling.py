"""Pooling is arithmetic: every case is small enough to be worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookonce.errors import InputError, NativeError
from lookonce.pooling import POOLINGS, check_finite, check_pooling, cut, normalize, pool

STATES = np.array([[1, -4, 0], [3, 2, 0], [2, -1, 6]], dtype=np.float32)


def test_the_poolings_are_worked_out_over_the_tokens() -> None:
    assert pool(STATES, "mean").tolist() == [2, -1, 2]
    assert pool(STATES, "max").tolist() == [3, 2, 6]
    assert pool(STATES, "cls").tolist() == [1, -4, 0]
    assert pool(STATES, "last").tolist() == [2, -1, 6]


def test_a_pooled_vector_is_f32_and_one_token_is_its_own_vector() -> None:
    for pooling in POOLINGS:
        vector = pool(STATES[:1], pooling)
        assert vector.dtype == np.float32
        assert vector.tolist() == [1, -4, 0]


def test_a_mean_of_many_tokens_does_not_lose_digits() -> None:
    states = np.full((100_000, 2), 0.1, dtype=np.float32)
    assert np.abs(pool(states, "mean") - np.float32(0.1)).max() <= 1e-8


def test_a_cut_keeps_the_first_values_of_every_vector() -> None:
    assert cut(STATES, 2).tolist() == [[1, -4], [3, 2], [2, -1]]
    assert cut(STATES[0], 1).tolist() == [1]
    assert cut(STATES, None).tolist() == STATES.tolist()


@given(st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=20), st.integers(1, 20))
def test_a_cut_and_normalised_vector_has_the_length_one(values: list[float], dimension: int) -> None:
    vector = cut(np.array([values], dtype=np.float32), dimension)
    norm = np.linalg.norm(vector.astype(np.float64))
    expected = 1.0 if norm > 0 else 0.0
    assert np.linalg.norm(normalize(vector).astype(np.float64)) == pytest.approx(expected, abs=1e-6)


def test_a_zero_vector_stays_zero() -> None:
    assert normalize(np.zeros((2, 3), dtype=np.float32)).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_normalising_keeps_the_direction() -> None:
    assert normalize(np.array([3, 4], dtype=np.float32)) == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("pooling", ["median", "", "Mean", None, 3])
def test_an_unknown_pooling_is_refused_with_the_known_ones(pooling: object) -> None:
    with pytest.raises(InputError, match="choose one of mean, last, cls, max"):
        check_pooling(pooling)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_names_the_model(value: float) -> None:
    vectors = np.ones((2, 3), dtype=np.float32)
    assert check_finite(vectors, "tiny") is vectors
    vectors[1, 2] = value
    with pytest.raises(NativeError, match="tiny gave values that are not finite: the model file may be damaged"):
        check_finite(vectors, "tiny")
