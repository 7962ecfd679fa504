"""Start-up, log, devices and handles of the native library."""

import gc
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lookonce.errors import ClosedError, DeviceError, ModelFileError
from lookonce.native.library import (
    Handle,
    choose_devices,
    cpu_features,
    hear_standard_error,
    listen,
    system_info,
    versions,
)
from lookonce.native.text import TextModel

Pair = tuple[Path, Path]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


USE = """
import sys
from pathlib import Path
from lookonce.native.text import Context, ContextOptions, TextModel
from lookonce.native.vision import VisionTower
import numpy as np
model = TextModel(Path({text!r}))
tower = VisionTower(Path({projector!r}), model, threads=1)
context = Context(model, ContextOptions(n_ctx=256, threads=1))
context.decode_tokens([1, 2, 3], position=0)
tower.encode(np.zeros((64, 64, 3), dtype=np.uint8))
"""


def test_the_native_library_writes_nothing_of_its_own(tiny_pair: Pair) -> None:
    text, projector = map(str, tiny_pair)
    failing = "try:\n    TextModel(Path(__file__ if False else sys.executable))\nexcept Exception as error: pass\n"
    done = run_python(USE.format(text=text, projector=projector) + failing)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "ending",
    [
        "",
        "del model, tower, context",
        "del context, tower, model",
        "model.close(); del model; context.close(); tower.close()",
        "model.close()",
        "class Box: pass\nbox = Box(); box.all = [model, tower, context, box]; del model, tower, context, box",
        "class Box: pass\nbox = Box(); box.all = [context, box, tower, model]; del model, tower, context, box\n"
        "import gc; gc.collect()",
    ],
)
def test_handles_can_be_left_to_the_end_of_the_process_or_forgotten_in_any_order(tiny_pair: Pair, ending: str) -> None:
    text, projector = map(str, tiny_pair)
    done = run_python(USE.format(text=text, projector=projector) + ending)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_native_reason_of_a_failure_stands_in_the_exception(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"no GGUF at all, but long enough to be read as a header of one" * 4)
    with pytest.raises(ModelFileError, match="could not be loaded as a text model") as caught:
        TextModel(path)
    assert "magic" in str(caught.value)


def test_native_lines_go_to_logging(tiny_pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "lookonce.native"):
        TextModel(tiny_pair[0]).close()
    assert any("qwen3vl" in record.message for record in caplog.records)


def test_an_interrupt_while_the_native_library_logs_is_raised_after_the_call(tiny_pair: Pair) -> None:
    def interrupt(record: logging.LogRecord) -> bool:
        raise KeyboardInterrupt

    native = logging.getLogger("lookonce.native")
    before = native.level
    native.setLevel(logging.DEBUG)
    native.addFilter(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            TextModel(tiny_pair[0])
    finally:
        native.removeFilter(interrupt)
        native.setLevel(before)
    TextModel(tiny_pair[0]).close()


def test_each_thread_hears_only_its_own_calls(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no GGUF" * 100)

    def fail() -> None:
        with pytest.raises(ModelFileError):
            TextModel(broken)

    with listen() as log:
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    assert log.lines == []


def test_standard_error_is_heard_and_given_back(capfd: pytest.CaptureFixture[str]) -> None:
    with hear_standard_error() as heard:
        os.write(2, b"one\n two\n")
    os.write(2, b"three")
    assert heard == ["one", "two"]
    assert capfd.readouterr().err == "three"


def test_many_threads_may_hear_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    def hear() -> None:
        for _ in range(50):
            with hear_standard_error() as heard:
                os.write(2, b"x\n")
            assert heard == ["x"]

    threads = [threading.Thread(target=hear) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.write(2, b"end")
    assert capfd.readouterr().err == "end"


def test_the_cpu_is_always_there_and_an_unknown_device_is_refused_with_what_there_is() -> None:
    assert choose_devices("cpu") == ()
    for device in ("quantum", "", "cuda:99", "CPU "):
        with pytest.raises(DeviceError, match=r"not in this build of llama-cpp-python, which has cpu"):
            choose_devices(device)


def test_versions_and_cpu_features_are_told() -> None:
    assert set(versions()) == {"llama-cpp-python", "libllama"}
    assert all(versions().values())
    assert "CPU" in system_info()


# --- handles, with numbers for pointers and a list for the native library


class Native:
    def __init__(self) -> None:
        self.freed: list[int] = []

    def handle(self, pointer: int, needs: Handle | None = None) -> Handle:
        return Handle(pointer, self.freed.append, f"thing {pointer}", needs=needs)


def test_a_handle_is_freed_once_however_often_it_is_closed() -> None:
    native = Native()
    handle = native.handle(1)
    assert handle.pointer == 1
    handle.close()
    handle.close()
    del handle
    assert native.freed == [1]


def test_a_closed_handle_says_so() -> None:
    handle = Native().handle(1)
    handle.close()
    with pytest.raises(ClosedError, match="thing 1 is closed"):
        _ = handle.pointer


def test_what_needs_another_is_freed_before_it_whichever_is_closed_or_forgotten_first() -> None:
    def close_needed(model: Handle, context: Handle) -> None:
        model.close()
        with pytest.raises(ClosedError):
            _ = context.pointer

    def close_both(model: Handle, context: Handle) -> None:
        context.close()
        model.close()

    ways: list[Callable[[Handle, Handle], None]] = [close_needed, close_both, lambda model, context: None]
    for way in ways:
        native = Native()
        model = native.handle(1)
        context = native.handle(2, model)
        way(model, context)
        del model
        assert native.freed in ([], [2, 1])
        del context
        assert native.freed == [2, 1]


def test_in_a_cycle_of_garbage_the_order_holds_too() -> None:
    class Owner:
        pass

    for order in ([0, 1], [1, 0]):
        native = Native()
        owners = [Owner(), Owner()]
        model = native.handle(1)
        context = native.handle(2, model)
        for place, handle in zip(order, (model, context), strict=True):
            owners[place].__dict__.update(handle=handle, others=owners)
        del model, context, handle
        owners = []
        gc.collect()
        assert native.freed == [2, 1]


def test_the_features_used_are_those_that_the_native_library_says_it_has() -> None:
    told = system_info()
    assert cpu_features()
    assert all(f"{name} = 1" in told for name in cpu_features())
