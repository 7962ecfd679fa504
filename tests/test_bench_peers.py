"""The comparison with other tools: its bars, its page, and a run of what needs no torch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import bench_peers
from bench_page import END, begin
from bench_peers import BARS, Results
from lookonce import bench
from lookonce.bench_worker import Job
from lookonce.synthetic.pair import make_pair

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


def test_a_run_on_a_tiny_model_with_the_handler_of_llama_cpp_python(tiny_pair: Pair, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{begin('bench_peers.py')}\n\nyesterday\n\n{END}\n\nMore.\n")
    command = [sys.executable, str(SCRIPT), "--model", str(tiny_pair[0]), "--mmproj", str(tiny_pair[1])]
    command += ["--peer", "llama-cpp-python", "--rounds", "1", "--threads", "1", "--n-ctx", "512", "--max-tokens", "3"]
    command += ["--json", "--no-retype", f"--markdown={page}"]
    environment = {**os.environ, "LOOKONCE_MMPROJ_TYPE": "BF16"}  # the named file is measured all the same
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode in (0, 1), done.stderr
    told = json.loads(done.stdout)
    (peer,) = told["peers"]["llama-cpp-python"]
    own = told["rounds"]["cold"][0]
    assert (peer["text_tokens"], peer["image_rows"]) == (own["text_tokens"], own["image_rows"])
    assert peer["first_token_s"] > 0
    assert peer["again_s"] > 0
    assert {bar["passed"] for bar in told["bars"]} <= {True, False, None}
    shown = page.read_text()
    assert f"python scripts/bench_peers.py --model {tiny_pair[0].name} --mmproj {tiny_pair[1].name} --peer" in shown
    assert "--markdown=page.md\n```" in shown
    assert "| Lookonce, cold |" in shown
    assert str(tmp_path) not in shown
    assert str(tiny_pair[0].parent) not in shown


def test_each_type_is_measured_with_its_own_file_whatever_the_environment_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, projector = make_pair(tmp_path / "pair", mmproj_type="F16")
    folder = tmp_path / "folder"
    folder.mkdir()
    options = {"mmproj": str(projector), "device": "cpu", "threads": 1, "n_ctx": 512}
    job = Job("", str(text), str(bench.save_picture(tmp_path)), "What?", str(folder), options, 2)
    monkeypatch.setenv("LOOKONCE_MMPROJ_TYPE", "Q8_0")  # of which there is none
    found = bench_peers._measure_retyped(job, 1, folder)
    assert (len(found["f16_look_s"]), len(found["bf16_look_s"])) == (1, 1)
    assert 0.99 < found["lowest_row_cosine"] < 1


def test_a_run_that_breaks_off_leaves_the_last_results_on_the_page(tiny_pair: Pair, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    old = f"{begin('bench_peers.py')}\n\nyesterday\n\n{END}\n"
    page.write_text(old)
    command = ["--model", str(tiny_pair[0]), "--mmproj", str(tiny_pair[1]), "--peer", "llama-cpp-python"]
    command += ["--rounds", "1", "--n-ctx", "100000", "--markdown", str(page)]
    done = subprocess.run([sys.executable, str(SCRIPT), *command], capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "n_ctx is 100000" in done.stderr
    assert page.read_text() == old


def test_a_peer_that_fails_is_one_line_and_status_2(
    tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "run_bench", lambda *_, **__: {"cold": [{"text_tokens": 32}]})
    command = ["--model", str(tiny_pair[0]), "--mmproj", str(tiny_pair[1]), "--peer", "llama-cpp-python"]
    # A context in which the picture has no room: the handler raises.
    status = bench_peers.main([*command, "--rounds", "1", "--threads", "1", "--n-ctx", "16", "--no-retype"])
    said = capsys.readouterr()
    assert (status, said.out) == (2, "")
    told = said.err.splitlines()
    assert told[0] == "round 1 of 1: Lookonce"
    assert len(told) == 2
    assert told[1].startswith("bench_peers: llama-cpp-python ended with status 1: ")


@pytest.mark.parametrize(
    ("python", "told"),
    [
        ("exit 3", "it ended with status 3: it said nothing"),
        ("exit 0", "it ended without an answer: it said nothing"),
        (f"exec '{sys.executable}' -S \"$@\"", "it ended with status 1: ModuleNotFoundError: No module named '"),
    ],
)
def test_a_python_without_transformers_is_refused_before_anything_is_made(
    python: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "python"
    given.write_text(f"#!/bin/sh\n{python}\n")
    given.chmod(0o755)
    folder = tmp_path / "models"
    status = bench_peers.main(["--transformers-python", str(given), "--folder", str(folder), "--shape", "tiny"])
    said = capsys.readouterr()
    assert (status, said.out, len(said.err.splitlines())) == (2, "", 1)
    assert f"--transformers-python {str(given)!r} cannot run transformers ({told}" in said.err
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--model", "x.gguf"), "--model and --mmproj belong together: give both, or neither"),
        *[(("--rounds", value), f"'{value}' is no whole number of at least 1") for value in ("0", "-3", "1.5", "many")],
        (("--max-tokens", "1"), "--max-tokens: '1' is no whole number of at least 2"),
        (("--n-ctx", "0"), "--n-ctx: '0' is no whole number of at least 1"),
        (("--threads", "0"), "--threads: '0' is no whole number of at least 1"),
        (("--threads", "100000"), "threads is 100000: "),
        (("--shape", "9b"), "there is no shape '9b': choose one of tiny, "),
        (("--shape", "demo"), "there is no shape 'demo': choose one of tiny, 2b, 4b, 8b"),
        (("--peer", "ollama"), "--peer: invalid choice: 'ollama'"),
        (("--image", "none.png"), "none.png"),
        (("--transformers-python", "no-python"), "--transformers-python 'no-python' is no program: give a Python's"),
        (("--nonsense",), "unrecognized arguments: --nonsense: --help shows what there is"),
        (("--model", "x.gguf", "--mmproj", "y.gguf", "--peer", "llama-cpp-python"), "x.gguf"),
        (
            ("--markdown", "none.md"),
            "--markdown 'none.md' cannot be used (No such file or directory): give a page that",
        ),
        (("--markdown", "."), "--markdown '.' cannot be used (Is a directory): give a page that is there"),
        (("--markdown", "bare.md"), "--markdown 'bare.md' has not the lines <!-- results: "),
    ],
)
def test_bad_input_is_one_line_and_status_2_before_anything_is_made(
    arguments: tuple[str, ...],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare.md").write_text("# Page\n")
    status = bench_peers.main(arguments)
    said = capsys.readouterr()
    assert (status, said.out, len(said.err.splitlines())) == (2, "", 1)
    assert told in said.err
    assert (tmp_path / "bare.md").read_text() == "# Page\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare.md"]
