import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from lookonce.errors import MismatchError, NativeError, StoreError
from lookonce.terminal import Terminal, one_line, progress, write


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MismatchError("a look does not fit"), 2),
        (NativeError("llama.cpp failed", ("one", "two")), 1),
        (StoreError("no store"), 1),
        (MemoryError(), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_error_has_its_status_and_one_line(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int
) -> None:
    def work() -> None:
        raise error

    assert Terminal("prog").run(work) == status
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("prog: ")


def test_the_status_of_work_that_raises_nothing_is_its_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert [Terminal("prog").run(lambda result=result: result) for result in (None, 0, 1)] == [0, 0, 1]  # type: ignore[misc]
    assert capsys.readouterr() == ("", "")


def test_one_line_shows_what_could_not_be_seen() -> None:
    assert one_line("  a \r\n  b\x1b[31m\u202ec\n") == "a b\\x1b[31m\\u202ec"
    assert one_line("naïve 日本") == "naïve 日本"


def test_warnings_are_lines_on_stderr_and_the_rest_is_for_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("lookonce.store")
    terminal = Terminal("prog")

    def work() -> None:
        logger.info("quiet")
        logger.warning("entry %s was\nnot kept", "x")
        terminal.be_verbose()
        logger.debug("loud")

    assert terminal.run(work) == 0
    assert capsys.readouterr().err == "prog: warning: entry x was not kept\nlookonce.store: loud\n"
    logger.debug("after")
    assert capsys.readouterr().err == ""
    assert logging.getLogger("lookonce").handlers == []


def test_a_terminal_gets_no_control_characters_and_a_file_gets_the_text_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, shown in ((Screen(), "a[2J\tb\n"), (io.StringIO(), "a\x1b[2J\tb\n")):
        monkeypatch.setattr(sys, "stdout", stream)
        write("a\x1b[2J\tb\n")
        assert stream.getvalue() == shown


def test_progress_gives_every_item_in_order() -> None:
    assert list(progress(iter("abc"), total=3, what="Looking")) == ["a", "b", "c"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_line_and_status_1() -> None:
    code = "import sys; from lookonce.terminal import *; sys.exit(Terminal('prog').run(lambda: write('x' * 99999)))"
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60
        )
    assert (run.returncode, run.stderr.count("\n")) == (1, 1)
    assert "No space left" in run.stderr


def test_a_reader_that_left_ends_the_work_in_silence() -> None:
    code = (
        "import sys; from lookonce.terminal import *\n"
        "def work():\n"
        "    while True: write('x' * 99)\n"
        "sys.exit(Terminal('prog').run(work))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(9)
    process.stdout.close()
    process.stdout = None
    assert process.communicate(timeout=30)[1] == b""
    assert process.returncode == 141
