"""Results go between a page's marks, whole or not at all, without this machine's paths."""

import argparse
import os
from pathlib import Path

import pytest

import bench_page
from bench_page import END, begin, shown_command, write_page
from lookonce.errors import InputError
from test_bench_peers import results

SCRIPT = "bench_peers.py"
BEGIN = begin(SCRIPT)


def test_the_page_gets_the_results_between_its_marks_and_keeps_the_rest(tmp_path: Path) -> None:
    from bench_peers import markdown

    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{BEGIN}\n\nyesterday\n\n{END}\n\nMore.\n")
    for _ in range(2):
        write_page(page, SCRIPT, markdown(results(), "python scripts/bench_peers.py"))
    text = page.read_text()
    assert text.startswith("# Page\n\n<!-- results")
    assert text.endswith("\n\nMore.\n")
    assert text.count("| llama-cpp-python, MTMD chat handler | 16.500 | 11.000 to 22.000 | 22.00 | 2.00 |") == 1
    assert "| first token from saved rows / cold | 0.4 | at most 0.45 | pass |" in text
    assert "yesterday" not in text


@pytest.mark.parametrize("page", ["# Page\n", f"{BEGIN}\n", f"{END}\n{BEGIN}\n"])
def test_a_page_without_both_marks_is_refused_and_stays(tmp_path: Path, page: str) -> None:
    path = tmp_path / "page.md"
    path.write_text(page)
    with pytest.raises(InputError, match=r"page\.md' has not the lines .*: write them where results go"):
        write_page(path, SCRIPT, "x")
    assert path.read_text() == page


@pytest.mark.parametrize("script", [SCRIPT, "bench_embed.py"])
def test_a_block_that_lost_its_end_does_not_take_the_next_ones(tmp_path: Path, script: str) -> None:
    path = tmp_path / "page.md"
    blocks = [f"{begin(one)}\n\nold\n" for one in (SCRIPT, "bench_embed.py")]
    page = f"{blocks[0]}\n## A section\n\n{blocks[1]}\n{END}\n"
    path.write_text(page)
    if script == SCRIPT:
        with pytest.raises(
            InputError, match=rf"page\.md' has no line {END} between {BEGIN} and the next <!-- results:"
        ):
            write_page(path, script, "new")
        assert path.read_text() == page
    else:
        write_page(path, script, "new")
        assert path.read_text().startswith(f"{blocks[0]}\n## A section\n\n{begin(script)}\n\nnew\n")


def test_a_write_that_fails_leaves_the_old_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    old = f"{BEGIN}\n\nyesterday\n\n{END}\n"
    page.write_text(old)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_page(page, SCRIPT, "new")
    assert page.read_text() == old
    assert list(tmp_path.iterdir()) == [page]


def test_the_command_line_is_shown_without_this_machines_paths() -> None:
    options = argparse.Namespace(
        model=Path("/data/m/text.gguf"), image=Path("/home/a b.png"), markdown=Path("docs/b.md")
    )
    arguments = [
        "--model",
        "/data//m/text.gguf",
        "--image=/home/a b.png",
        "--prompt",
        "/data/m/other?",
        "--rounds",
        "5",
    ]
    assert shown_command(SCRIPT, options, [*arguments, "--markdown", "docs/b.md"]) == (
        "python scripts/bench_peers.py --model text.gguf '--image=a b.png' --prompt '/data/m/other?' --rounds 5 "
        "--markdown docs/b.md"
    )
    assert shown_command(SCRIPT, options, []) == "python scripts/bench_peers.py"


@pytest.mark.parametrize("script", [SCRIPT, "bench_embed.py"])
def test_the_projects_own_page_has_the_marks(tmp_path: Path, script: str) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text((Path(bench_page.__file__).parent.parent / "docs" / "benchmarks.md").read_text())
    write_page(page, script, "new\n")
    assert f"{begin(script)}\n\nnew\n" in page.read_text()
