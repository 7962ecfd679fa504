import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookonce.byte_size import format_size, parse_size
from lookonce.errors import InputError


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("7 B", 7), ("5gb", 5 * 10**9), ("1.5GiB", 3 * 2**29), (" 500 MB ", 5 * 10**8), ("2T", 2 * 10**12)],
)
def test_a_size_is_read_as_it_is_written(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "1e9", "5 PB", "5GBB", "1.GB", "٣MB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not a size"):
        parse_size(text)


@given(st.integers(0, 10**16))
def test_a_written_size_reads_back_to_three_digits(size: int) -> None:
    assert abs(parse_size(format_size(size)) - size) <= 0.005 * size
