"""How a program of this project talks and ends: results on stdout, one line for an error, exit statuses, Ctrl-C.

Owns stdout, stderr, the interrupt signal and the log handler while a command line or a script runs. Knows
nothing of models.
"""

import io
import json
import logging
import os
import re
import signal
import sys
import threading
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Final, TypeVar

from lookonce.errors import InputError, LookonceError

__all__ = [
    "CLOSED_PIPE",
    "FAILURE",
    "INTERRUPTED",
    "WRONG_USE",
    "Terminal",
    "bar",
    "byte_bars",
    "one_line",
    "progress",
    "status",
    "write",
    "write_error",
    "write_json",
]

FAILURE: Final = 1
WRONG_USE: Final = 2
INTERRUPTED: Final = 128 + 2  # as a shell reports a program that SIGINT ended
CLOSED_PIPE: Final = 128 + 13  # likewise SIGPIPE

_GRACE_S: Final = 0.3
_RESTORE: Final = "\r\x1b[2K\x1b[?25h"  # clear the line, show the cursor (ECMA-48, DECTCEM)

_Item = TypeVar("_Item")


class _PipeClosedError(Exception):
    """Whoever read stdout has gone, as `head` does when it has enough."""


class Terminal:
    """One run of `program`, whose name starts every line on stderr."""

    def __init__(self, program: str) -> None:
        self.program = program
        self.verbose = False
        self._handler = _OneLineHandler(program)

    def be_verbose(self) -> None:
        """From here on show the library's log and the native library's lines, and tracebacks."""
        self.verbose = True
        self._handler.setLevel(logging.DEBUG)
        logging.getLogger("lookonce").setLevel(logging.DEBUG)

    def run(self, work: Callable[[], int | None]) -> int:
        """Do `work` and give the exit status: what it returns, or what its error stands for.

        An `InputError` is 2, every other error 1, each with one line on stderr; Ctrl-C is 130 within a third of a
        second, native code or not; a reader that left is 141, in silence.
        """
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # an answer may hold what the terminal cannot write
        logger = logging.getLogger("lookonce")
        level = logger.level
        logger.addHandler(self._handler)
        try:
            with _Interrupts(self.program) as interrupts:
                result = self._settle(work)
                if result == INTERRUPTED:
                    interrupts.announce()
                return result
        finally:
            logger.removeHandler(self._handler)
            logger.setLevel(level)

    def _settle(self, work: Callable[[], int | None]) -> int:
        try:
            return work() or 0
        except KeyboardInterrupt:
            return INTERRUPTED
        except _PipeClosedError:
            return CLOSED_PIPE
        except InputError as error:
            return self._fail(str(error), WRONG_USE)
        except LookonceError as error:
            return self._fail(f"{error} (run again with --verbose to see more)", FAILURE)
        except Exception as error:  # noqa: BLE001  a user gets one line whatever goes wrong
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            return self._fail(f"{reason} (run again with --verbose to see more)", FAILURE)

    def _fail(self, message: str, result: int) -> int:
        if self.verbose:
            write_error(traceback.format_exc().rstrip())
        self.say(message)
        return result

    def say(self, message: str) -> None:
        """Write one line to stderr."""
        write_error(f"{self.program}: {one_line(message)}")


def write(text: str) -> None:
    """Write to stdout at once; a reader that has gone ends the program."""
    if sys.stdout.isatty():
        # A model's answer must not steer the terminal; spaces and joiners of other scripts may stay.
        text = "".join(one for one in text if one in "\n\t" or unicodedata.category(one) != "Cc")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # What stays in the buffer would fail once more, and loudly, when the interpreter ends.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise _PipeClosedError from error
        raise


def write_json(value: object) -> None:
    """Write a value to stdout as one line of JSON."""
    plain = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    write(json.dumps(value, ensure_ascii=plain, default=str) + "\n")


def write_error(text: str) -> None:
    """Write a line to stderr; where that is closed nobody is left to tell."""
    with suppress(OSError, ValueError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def one_line(text: str) -> str:
    """Give `text` as one printable line: names of files and models may hold anything."""
    joined = re.sub(r"\s*[\r\n]+\s*", " ", text.strip())
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape", "backslashreplace").decode() for one in joined
    )


@contextmanager
def status(message: str) -> Iterator[None]:
    """Show on a terminal's stderr that something is being done, and nothing elsewhere."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.live import Live
    from rich.markup import escape
    from rich.spinner import Spinner

    # Not Console.status: it would take what is written to stdout meanwhile to stderr.
    spinner = Spinner("dots", escape(one_line(message)))
    with Live(spinner, console=Console(stderr=True), transient=True, redirect_stdout=False):
        yield


def progress(items: Iterable[_Item], *, total: int, what: str) -> Iterator[_Item]:
    """Give the items, with a bar on a terminal's stderr where there are several."""
    with bar(total=total, what=what) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def bar(*, total: int | None, what: str) -> Iterator[Callable[[int], object]]:
    """Show a bar on a terminal's stderr where there is more than one thing to do; give what moves it on.

    `total` None is for work of unknown length.
    """
    if (total is not None and total < 2) or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    shown = rich_progress.Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # else what belongs in a file would land on the terminal
    )
    with shown:
        task = shown.add_task(what, total=total)
        yield lambda count: shown.advance(task, count)


@contextmanager
def byte_bars() -> Iterator[Callable[[str, str, int, int], object]]:
    """Show a bar of bytes for each of several names on a terminal's stderr.

    Gives what moves them on: a name, what is being done with it, the bytes done and all of them.
    """
    if not sys.stderr.isatty():
        yield lambda _name, _doing, _done, _total: None
        return
    from rich import progress as rich_progress
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column

    columns = (
        rich_progress.TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        rich_progress.BarColumn(bar_width=12),
        rich_progress.DownloadColumn(table_column=Column(no_wrap=True)),
        rich_progress.TransferSpeedColumn(table_column=Column(no_wrap=True)),
        rich_progress.TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
    )
    tasks: dict[str, rich_progress.TaskID] = {}
    shown = rich_progress.Progress(
        *columns, console=Console(stderr=True), expand=True, transient=True, redirect_stdout=False
    )
    with shown:

        def move(name: str, doing: str, done: int, total: int) -> None:
            told = escape(one_line(f"{doing} {name}"))
            if name not in tasks:
                tasks[name] = shown.add_task(told, total=total)
            shown.update(tasks[name], description=told, completed=done, total=total)

        yield move


class _OneLineHandler(logging.Handler):
    """Writes each record as one line to whatever stderr is at that moment: a bar may stand in front of it."""

    def __init__(self, program: str) -> None:
        super().__init__(logging.WARNING)
        self._program = program

    def emit(self, record: logging.LogRecord) -> None:
        message = one_line(record.getMessage())
        if record.levelno >= logging.WARNING:
            write_error(f"{self._program}: {record.levelname.lower()}: {message}")
        else:
            write_error(f"{record.name}: {message}")
        if record.exc_info and self.level <= logging.DEBUG:
            write_error("".join(traceback.format_exception(*record.exc_info)).rstrip())


class _Interrupts:
    """Ends the process soon after Ctrl-C, even while a native call keeps Python from acting on it.

    Python raises KeyboardInterrupt between two bytecodes, and one native call can take minutes. But the signal's number
    is written to the wake-up descriptor at once: a thread that waits there gives the program a moment to end in order,
    and then ends it. What is on the disk stands that, as it stands a kill.
    """

    def __init__(self, program: str) -> None:
        self._program = program
        self._active = threading.current_thread() is threading.main_thread()
        self._ended = threading.Event()
        self._announcing = threading.Lock()
        self._announced = False

    def __enter__(self) -> "_Interrupts":
        if not self._active:
            return self
        self._hears, self._tells = os.pipe()
        if os.name != "nt":  # there a handler may write to a pipe that could block, and Python cannot change it
            os.set_blocking(self._tells, False)
        self._before = signal.set_wakeup_fd(self._tells, warn_on_full_buffer=False)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        self._thread = threading.Thread(target=self._watch, name="interrupts", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._active:
            return
        self._ended.set()
        sys.unraisablehook = self._hook
        signal.set_wakeup_fd(self._before)
        os.close(self._tells)
        self._thread.join()
        os.close(self._hears)

    def announce(self) -> None:
        """Say once that the program was interrupted."""
        with self._announcing:
            if not self._announced:
                self._announced = True
                message = f"{self._program}: interrupted"
                if sys.__stderr__ is not None and sys.__stderr__.isatty():
                    # Past the proxy that a bar or spinner puts before stderr, which would draw itself once more.
                    os.write(sys.__stderr__.fileno(), f"{_RESTORE}{message}\n".encode())
                else:
                    write_error(message)

    def _watch(self) -> None:
        while heard := os.read(self._hears, 64):
            if signal.SIGINT in heard and not self._ended.wait(_GRACE_S):
                self.announce()
                os._exit(INTERRUPTED)

    def _unraisable(self, event: "sys.UnraisableHookArgs") -> None:
        # A Ctrl-C that arrives inside a callback from native code is lost there; the watcher still acts on it.
        if not isinstance(event.exc_value, KeyboardInterrupt):
            self._hook(event)
