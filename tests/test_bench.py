"""The benchmark: each way is measured as what it says it is, and the report follows from the rounds."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lookonce import bench
from lookonce.bench import MEASURES, Report, describe, lines, run_bench, run_worker, save_picture
from lookonce.bench_worker import Job
from lookonce.errors import InputError, NativeError
from lookonce.model_files import find_files

Pair = tuple[Path, Path]
FACTS: dict[str, Any] = {"n_rounds": 2}


@pytest.fixture(scope="module")
def job(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("bench")
    options = {"mmproj": str(tiny_pair[1]), "threads": 1, "n_ctx": 512}
    return Job("", str(tiny_pair[0]), str(save_picture(folder)), "What is it?", str(folder), options, 6)


@pytest.fixture(scope="module")
def report(job: Job, tiny_pair: Pair) -> Report:
    """One round on a tiny model."""
    return Report(describe(find_files(*tiny_pair), job, 1), run_bench(job, rounds=1))


def test_cold_evaluates_all_with_the_tower_rows_all_without_it_and_state_only_the_question(report: Report) -> None:
    cold, rows, state, text = (report.found[way][0] for way in ("cold", "rows", "state", "text"))
    cells = cold["text_tokens"] + cold["image_rows"]
    assert cold["image_rows"] == 256
    assert (cold["evaluated"], cold["prefix"]) == (cells, "evaluated")
    assert (rows["evaluated"], rows["prefix"]) == (cells, "evaluated")
    assert (state["evaluated"] + state["reused"], state["prefix"]) == (cells, "store")
    assert text["evaluated"] == state["evaluated"] < 32
    assert text["prefix_cells"] == state["reused"]
    assert state["state_bytes"] > 100_000


def test_each_time_is_within_what_holds_it_and_the_answers_are_the_same(report: Report) -> None:
    for way in ("cold", "rows", "state"):
        one = report.found[way][0]
        assert 0 < one["prefill_s"] < one["first_token_s"]
        assert one["peak_bytes"] > 20_000_000
    cold = report.found["cold"][0]
    assert cold["look_s"] + cold["prefill_s"] == pytest.approx(cold["first_token_s"])
    assert report.same_answer


def test_generation_covers_as_many_tokens_as_the_bare_loop(report: Report) -> None:
    one = report.found["generation"][0]
    assert one["generated"] == 5  # of six: the first token is the prompt's
    assert one["rate"] > 0
    assert one["bare_rate"] > 0


def test_sixteen_questions_are_asked_both_ways(report: Report) -> None:
    one = report.found["many"][0]
    assert one["questions"] == 16
    assert one["same_texts"] >= 12  # sums are rounded otherwise in a larger batch
    assert one["together_rate"] / one["single_rate"] == pytest.approx(one["single_s"] / one["together_s"])
    assert report.ratios()["together_to_single"] == one["together_rate"] / one["single_rate"]


def test_the_report_names_machine_versions_files_and_every_way(report: Report) -> None:
    told = "\n".join(lines(report))
    for expected in (
        "threads used",
        "llama-cpp-python 0.",
        "Qwen3VL-tiny",
        "F32",
        "cold: tower",
        "saved state",
        "Peak",
    ):
        assert expected in told
    assert "please report" not in told
    plain = report.as_dict()
    assert set(plain["rounds"]) == set(plain["median"]) == set(MEASURES)
    assert (
        plain["ratios"]["cold_to_state"]
        == plain["median"]["cold"]["first_token_s"] / (plain["median"]["state"]["first_token_s"])
    )
    assert plain["same_answer"]


def test_nothing_stays_of_the_stores(report: Report, job: Job) -> None:
    assert [path.name for path in Path(job.store).iterdir()] == ["picture.png"]


def test_ratios_are_those_of_one_round_each() -> None:
    slow_round = [{"first_token_s": 1.0, "text": "a"}, {"first_token_s": 8.0, "text": "a"}]
    fast = [{"first_token_s": 0.5, "text": "a"}, {"first_token_s": 4.0, "text": "b"}]
    found = Report(FACTS, {"rows": fast, "cold": slow_round})
    assert found.ratio(("rows", "first_token_s"), ("cold", "first_token_s")) == 0.5
    assert found.median("cold", "first_token_s") == 4.5
    assert found.ratios()["cold_to_state"] is None
    assert not found.same_answer


def test_a_number_that_one_round_lacks_is_not_reported() -> None:
    found = Report(FACTS, {"generation": [{"rate": 2.0}, {"rate": None}]})
    assert found.values("generation", "rate") == []
    assert found.median("generation", "rate") is None


def test_what_fills_the_store_goes_first_and_the_others_change_places(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []

    def worker(_: str, given: Any) -> dict[str, Any]:
        seen.append((given["measure"], given["turn"]))
        return {}

    monkeypatch.setattr(bench, "run_worker", worker)
    run_bench(job, rounds=3)
    rounds = [[measure for measure, turn in seen if turn == number] for number in range(3)]
    assert all(one[0] == "cold" and sorted(one) == sorted(MEASURES) for one in rounds)
    assert len({tuple(one) for one in rounds}) == 3


def test_a_projector_that_is_named_is_measured_whatever_type_the_environment_asks_for(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOKONCE_MMPROJ_TYPE", "BF16")  # of which there is none
    one = {**asdict(job), "measure": "look"}
    assert run_worker("lookonce.bench_worker", one)["image_rows"] == 256
    found_beside = {name: value for name, value in job.options.items() if name != "mmproj"}
    with pytest.raises(InputError, match="LOOKONCE_MMPROJ_TYPE asks for the projector in BF16"):
        run_worker("lookonce.bench_worker", {**one, "options": found_beside})


@pytest.mark.parametrize(
    ("system", "shown"),
    [
        ("Linux 6.18.44-fc-v657 x86_64", "Linux 6.18.44 x86_64"),
        ("Linux 6.8.0-45-generic aarch64", "Linux 6.8.0 aarch64"),
        ("Linux 5.15.fc39.mine+ x86_64", "Linux 5.15 x86_64"),
        ("Linux built-by-me x86_64", "Linux x86_64"),
        ("Windows 2022Server AMD64", "Windows 2022 AMD64"),
        ("Darwin 24.1.0 arm64", "Darwin 24.1.0 arm64"),
    ],
)
def test_of_the_system_its_name_number_and_architecture_are_shown(report: Report, system: str, shown: str) -> None:
    machine = {**report.facts["machine"], "system": system}
    told = list(bench.fact_lines({**report.facts, "machine": machine}))
    assert told[1].endswith(f" memory, {shown}")


def test_what_a_measuring_process_refuses_is_raised_here_and_its_death_too(job: Job) -> None:
    bad = {"measure": "rows", "model": "none.gguf", "picture": "", "prompt": "", "store": job.store, "options": {}}
    with pytest.raises(InputError, match=r"'none\.gguf' does not exist"):
        run_worker("lookonce.bench_worker", {**bad, "max_tokens": 2})
    with pytest.raises(NativeError, match=r"ended with status 1: .*TypeError"):
        run_worker("lookonce.bench_worker", {"max_tokens": 2})
