"""What both hubs' clients are held to."""

import logging
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from lookonce.hub import HubUnavailable, PartWriter, held, is_final, muted


def test_a_log_has_its_level_back_when_the_last_of_two_that_overlap_is_done() -> None:
    logger = logging.getLogger("lookonce-test-hub")
    logger.setLevel(logging.INFO)
    first, second = muted(logger.name), muted(logger.name)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not logger.isEnabledFor(logging.CRITICAL)
    second.__exit__(None, None, None)
    assert logger.level == logging.INFO


def test_a_setting_is_held_until_the_last_is_done_and_another_one_apart() -> None:
    box = {"size": 10, "other": 1}

    def setting(name: str) -> AbstractContextManager[None]:
        return held(name, 2, lambda: box[name], lambda value: box.update({name: value}))

    first, second, other = setting("size"), setting("size"), setting("other")
    for one in (first, second, other):
        one.__enter__()
    assert box == {"size": 2, "other": 2}
    first.__exit__(None, None, None)
    other.__exit__(None, None, None)
    assert box == {"size": 2, "other": 1}
    second.__exit__(None, None, None)
    assert box == {"size": 10, "other": 1}


def test_no_more_is_written_than_was_published(tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.write_bytes(b"ab")
    told: list[int] = []
    with PartWriter(part, 5, told.append) as output:
        assert output.write(b"cd") == 2
        with pytest.raises(HubUnavailable, match="more than it published"):
            output.write(b"efgh")
        with pytest.raises(HubUnavailable):
            output.write(b"i")
    assert part.read_bytes() == b"abcde"
    assert told == [4, 5, 5]


@pytest.mark.parametrize(
    ("status", "final"),
    [(None, False), (200, False), (401, True), (404, True), (408, False), (429, False), (503, False)],
)
def test_an_answer_is_final_where_no_other_try_would_change_it(status: int | None, final: bool) -> None:
    assert is_final(status) is final
