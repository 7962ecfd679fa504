"""The comparison of vectors with other tools: its texts, its figures, its page, and a run of what needs no torch."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import bench_embed
import lookonce
from bench_embed import CASES, Case, Line
from bench_page import begin
from bench_peer import Measured

Pair = tuple[Path, Path]
SCRIPT = Path(bench_embed.__file__)
PAGE = SCRIPT.parent.parent / "docs" / "benchmarks.md"


def test_no_text_comes_twice_however_short_they_are(tiny_pair: Pair) -> None:
    with lookonce.load(tiny_pair[0], threads=1, store=False) as model:
        texts, prompts = bench_embed.make_texts(model, Case("few", 40, 4, tokens=2), 40)
        assert len(set(texts)) == len({tuple(prompt) for prompt in prompts}) == 40
        texts, prompts = bench_embed.make_texts(model, CASES[0], 64)
        assert len(set(texts)) == 64
        assert 9 < sum(len(model.engine.text.tokenize(text)) for text in texts) / 64 < 12
        again, _ = bench_embed.make_texts(model, CASES[0], 64)
        assert again == texts


def test_more_texts_than_there_are_different_ones_are_refused(tiny_pair: Pair) -> None:
    one_word = Case("one word", 14, 4, tokens=1)
    with lookonce.load(tiny_pair[0], threads=1, store=False) as model:
        assert len(bench_embed.make_texts(model, one_word, 14)[0]) == 14
        with pytest.raises(lookonce.InputError, match=r"^--count 15 is more than .* 'one word' .* 14 were found: give"):
            bench_embed.make_texts(model, one_word, 15)


def test_a_ratio_is_that_of_one_round_and_the_peak_is_the_most_of_all_rounds() -> None:
    ours = [Measured(1.0, 0.01, 3_000_000_000), Measured(2.0, 0.02, 1_000_000_000), Measured(4.0, 0.04, 2_000_000_000)]
    theirs = [replace(one, seconds=one.seconds * factor) for one, factor in zip(ours, (3, 4, 5), strict=True)]
    measured = {("A", "lookonce"): ours, ("B", "lookonce"): ours, ("A", "llama-cpp-python"): theirs}
    measured["A", "transformers"] = theirs
    lines = list(bench_embed.summarize("short", {"A": 8, "B": 8}, measured))
    assert lines == [
        Line("short", "A", "lookonce", 8, 2.0, None, pytest.approx(0.01), 3_000_000_000),
        Line("short", "A", "llama-cpp-python", 8, 8.0, 4.0, None, 3_000_000_000),
        Line("short", "A", "transformers", 8, 8.0, 4.0, None, 3_000_000_000),
        Line("short", "B", "lookonce", 8, 2.0, None, pytest.approx(0.01), 3_000_000_000),
        Line("short", "B", "transformers", 8, 8.0, 4.0, None, 3_000_000_000),
    ]
    told = bench_embed.markdown(lines, ["A CPU"], "python x")
    assert "- A CPU\n" in told
    assert "| short | A | lookonce | 8 | 2.00 s | 4.00 /s |  | 1.0% | 3.00 GB |\n" in told
    assert "| short | A | llama-cpp-python | 8 | 8.00 s | 1.00 /s | 4.00 x |  | 3.00 GB |\n" in told


def test_a_run_on_a_tiny_model_writes_its_figures_to_the_projects_own_page(tiny_pair: Pair, tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(PAGE.read_text())
    command = [sys.executable, str(SCRIPT), "--model", str(tiny_pair[0]), "--mmproj", str(tiny_pair[1])]
    command += ["--case", "short", "--peer", "llama-cpp-python", "--count", "5", "--rounds", "1", "--threads", "1"]
    done = subprocess.run([*command, "--markdown", str(page)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = re.search(r"short: 5 texts, 5 of them different, of .* a prompt has (\S+) tokens, and (\d+) of", done.stdout)
    assert told is not None
    assert float(told[1]) > int(told[2]) > 20
    before, _, rest = page.read_text().partition(begin("bench_embed.py"))
    results, _, after = rest.partition("<!-- end of results -->")
    assert before.startswith("# Benchmarks\n")
    assert after == PAGE.read_text().rpartition("<!-- end of results -->")[2]
    for size in (f"{path.name} {path.stat().st_size / 1e9:.2f} GB" for path in tiny_pair):
        assert size in results
    assert told[0] in results
    for peer, figures in (("lookonce", r" \| \S+% \| "), ("llama-cpp-python", r"\S+ x \|  \| ")):
        (peak,) = re.findall(rf"\| short \| given \| {peer} \| 5 \| .*{figures}(\S+) GB \|\n", results)
        assert 0.02 < float(peak) < 4


def test_the_named_projector_is_measured_whatever_type_the_environment_asks_for(
    tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOOKONCE_MMPROJ_TYPE", "BF16")  # of which there is none
    command = ["--model", str(tiny_pair[0]), "--mmproj", str(tiny_pair[1]), "--case", "pictures of 56"]
    status = bench_embed.main(
        [*command, "--peer", "llama-cpp-python", "--count", "1", "--rounds", "1", "--threads", "1"]
    )
    said = capsys.readouterr()
    assert (status, said.err) == (0, "")
    assert re.search(r"^pictures of 56 +given +lookonce +1 ", said.out, re.MULTILINE)


def test_a_peer_that_fails_is_one_line_and_status_2(
    tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / tiny_pair[0].name
    shutil.copy(tiny_pair[0], gone)

    def make_texts(*given: Any) -> Any:
        made = real(*given)
        gone.unlink()  # for the processes
        return made

    real = bench_embed.make_texts
    monkeypatch.setattr(bench_embed, "make_texts", make_texts)
    command = ["--model", str(gone), "--mmproj", str(tiny_pair[1]), "--case", "short", "--peer", "llama-cpp-python"]
    status = bench_embed.main([*command, "--count", "2", "--rounds", "1", "--threads", "1"])
    told = capsys.readouterr().err
    assert (status, len(told.splitlines())) == (2, 1)
    assert told.startswith("bench_embed: lookonce ended with status 1: lookonce.errors.ModelFileError: ")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--model", "x.gguf"), "give --model and --mmproj together"),
        (("--model", "x.gguf", "--mmproj", "y.gguf", "--case", "short"), "x.gguf"),
        (("--markdown", "none.md"), "none.md"),
    ],
)
def test_bad_input_is_status_2(arguments: tuple[str, ...], told: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2
    assert told in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
