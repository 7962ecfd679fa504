"""Which type is the fastest: the measurement runs, and its choice follows from the times."""

from pathlib import Path

import pytest

from lookonce import gguf_file, projector_choice
from lookonce.errors import InputError
from lookonce.projector_choice import choose_type, compare, measure_types, pick

Pair = tuple[Path, Path]


def test_another_type_is_chosen_only_where_it_is_faster_by_more_than_noise() -> None:
    assert pick("F16", {"F16": 1.0, "BF16": 0.6, "Q8_0": 0.7}).type == "BF16"
    assert pick("F16", {"F16": 1.0, "BF16": 0.95, "Q8_0": 1.2}).type == "F16"
    assert pick("Q8_0", {"Q8_0": 0.5, "BF16": 0.6, "F16": 0.7}).type == "Q8_0"


def test_the_reason_names_times_gain_and_features() -> None:
    reason = pick("F16", {"F16": 1.5, "BF16": 1.0}, ("AVX512_BF16",)).reason
    assert reason.startswith("BF16 is 1.50 times as fast as F16 (")
    assert "F16 1500 ms, BF16 1000 ms" in reason
    assert reason.endswith("have AVX512_BF16)")
    assert pick("F16", {"F16": 1.0, "BF16": 1.0}).reason.startswith("nothing is faster than F16, its own type,")


@pytest.mark.parametrize("pair", ["tiny_pair", "tiny_pair_25"])
def test_every_type_is_measured_on_the_first_blocks_as_often(pair: str, request: pytest.FixtureRequest) -> None:
    projector = gguf_file.read(request.getfixturevalue(pair)[1])
    told: list[tuple[int, int]] = []
    times = measure_types(
        projector, ["F32", "BF16", "F16", "Q8_0"], threads=1, rounds=2, advance=lambda *step: told.append(step)
    )
    assert {kind: len(found) for kind, found in times.items()} == {"F32": 2, "BF16": 2, "F16": 2, "Q8_0": 2}
    assert all(second > 0 for found in times.values() for second in found)
    assert told[-1] == (12, 12)


def test_the_files_own_type_takes_part_in_the_choice(tiny_pair: Pair) -> None:
    choice = choose_type(gguf_file.read(tiny_pair[1]), threads=1)
    assert (choice.own, set(choice.times_s)) == ("F32", {"F32", "BF16", "F16", "Q8_0"})


def test_a_projector_compared_with_itself_and_with_anothers(tiny_pair: Pair, tmp_path: Path) -> None:
    from lookonce.synthetic.pair import make_pair

    assert compare(tiny_pair[1], tiny_pair[1], threads=1) == pytest.approx(1, abs=1e-6)
    assert compare(tiny_pair[1], make_pair(tmp_path, seed=1)[1], threads=1) < 0.9


def test_a_temporary_folder_that_is_full_is_told_in_one_sentence(
    tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(projector_choice, "_write_cut", fail)
    with pytest.raises(InputError, match=r"the temporary folder .* cannot be written \(No space left on device\)"):
        choose_type(gguf_file.read(tiny_pair[1]), threads=1)
