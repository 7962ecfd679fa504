"""The comparison with other tools: its bars, its page, and a run of what needs no torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import bench_peers
from bench_peers import BARS, Results
from lookonce import bench

Pair = tuple[Path, Path]
SCRIPT = Path(bench_peers.__file__)


def results(**changed: float) -> Results:
    """Two rounds in which every bar is kept, but for what is changed."""
    value = {"state": 0.5, "text": 0.48, "cold": 10.0, "rows": 4.0, "llama": 11.0, "read_s": 0.02, "restore_s": 0.003}
    value |= {"rate": 19.8, "bare_rate": 20.0, "look_gain": 1.6, "lowest_row_cosine": 0.9999}
    value |= changed
    common = {"text": "a", "peak_bytes": 2_000_000_000, "text_tokens": 32, "image_rows": 256, "look_s": 6.0}
    found: dict[str, list[dict[str, Any]]] = {
        way: [{**common, "first_token_s": factor * value[way], "prefill_rate": 80.0} for factor in (1, 2)]
        for way in ("cold", "rows", "state", "text")
    }
    for one in found["state"]:
        one |= {"read_s": value["read_s"], "restore_s": value["restore_s"]}
    found["generation"] = [{"rate": value["rate"], "bare_rate": value["bare_rate"]}] * 2
    machine = {"cpu": "A CPU", "logical_cores": 2, "threads": 2, "memory_bytes": 8e9, "system": "Linux"}
    facts = {
        "machine": {**machine, "features": ["AVX512_BF16"]},
        "model": {
            "text": "t.gguf",
            "text_bytes": 1,
            "projector": "p.gguf",
            "projector_bytes": 1,
            "projector_type": "F16",
        },
        "versions": {"lookonce": "1"},
        "prompt": "What?",
        "options": {"n_ctx": 8192},
        "n_rounds": 2,
    }
    llama = [
        {**common, "first_token_s": factor * value["llama"], "again_s": 10.0, "rate": 18.0, "did": "as it does"}
        for factor in (1, 2)
    ]
    retyped = {"look_gain": value["look_gain"], "lowest_row_cosine": value["lowest_row_cosine"]}
    retyped |= {"f16_look_s": [6.0], "bf16_look_s": [4.0], "auto": {"reason": "BF16 is faster"}}
    return Results(bench.Report(facts, found), {"llama-cpp-python": llama}, retyped)


def verdicts(found: Results) -> dict[str, str]:
    return {what: verdict for what, _, _, verdict in bench_peers.bar_rows(found)}


def test_every_bar_is_kept_where_the_numbers_are_good() -> None:
    told = verdicts(results())
    assert set(told.values()) == {"pass", "not measured"}
    assert [what for what, verdict in told.items() if verdict == "not measured"] == [BARS[-1].what]


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({"text": 0.45}, "kept state / plain text"),
        ({"llama": 7.4}, "llama-cpp-python"),
        ({"read_s": 0.028}, "read from the store and restored"),
        ({"rows": 4.6}, "saved rows / cold"),
        ({"look_gain": 1.49}, "F16 projector / with BF16"),
        ({"lowest_row_cosine": 0.998}, "cosine"),
        ({"rate": 19.3}, "libllama alone"),
    ],
)
def test_each_bar_is_missed_by_its_own_number(changed: dict[str, float], missed: str) -> None:
    told = verdicts(results(**changed))
    assert [what for what, verdict in told.items() if verdict == "MISS"] == [what for what in told if missed in what]


def test_ratios_are_those_of_one_round_each_and_a_peer_that_took_no_part_has_none() -> None:
    found = results()
    assert found.ratio("llama", "state") == 22
    assert found.times("transformers") == []
    assert found.ratio("transformers", "state") is None


def test_the_page_gets_the_results_between_its_marks_and_keeps_the_rest(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{bench_peers._BEGIN}\n\nyesterday\n\n{bench_peers._END}\n\nMore.\n")
    for _ in range(2):
        bench_peers.write_page(page, bench_peers.markdown(results(), "python scripts/bench_peers.py"))
    text = page.read_text()
    assert text.startswith("# Page\n\n<!-- results")
    assert text.endswith("\n\nMore.\n")
    assert text.count("| llama-cpp-python, MTMD chat handler | 16.500 | 11.000 to 22.000 | 22.00 | 2.00 |") == 1
    assert "| first token from saved rows / cold | 0.4 | at most 0.45 | pass |" in text
    assert "yesterday" not in text
    page.write_text("# Page\n")
    with pytest.raises(ValueError, match="has not the lines"):
        bench_peers.write_page(page, "x")


def test_the_projects_own_page_has_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text((SCRIPT.parent.parent / "docs" / "benchmarks.md").read_text())
    bench_peers.write_page(page, "new\n")
    assert "new\n" in page.read_text()


def test_a_run_on_a_tiny_model_with_the_handler_of_llama_cpp_python(tiny_pair: Pair) -> None:
    command = [sys.executable, str(SCRIPT), "--model", str(tiny_pair[0]), "--mmproj", str(tiny_pair[1])]
    command += ["--peer", "llama-cpp-python", "--rounds", "1", "--threads", "1", "--n-ctx", "512", "--max-tokens", "3"]
    done = subprocess.run([*command, "--json", "--no-retype"], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    told = json.loads(done.stdout)
    (peer,) = told["peers"]["llama-cpp-python"]
    own = told["rounds"]["cold"][0]
    assert (peer["text_tokens"], peer["image_rows"]) == (own["text_tokens"], own["image_rows"])
    assert peer["first_token_s"] > 0
    assert peer["again_s"] > 0
    assert {bar["passed"] for bar in told["bars"]} <= {True, False, None}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--model", "x.gguf"), "give --model and --mmproj together"),
        (("--model", "x.gguf", "--mmproj", "y.gguf", "--peer", "llama-cpp-python"), "x.gguf"),
        (("--markdown", "none.md"), "none.md"),
    ],
)
def test_bad_input_is_status_2(arguments: tuple[str, ...], told: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2
    assert told in done.stderr.splitlines()[-1]
