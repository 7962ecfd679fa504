"""The native library itself: its start-up, its log and the devices its build knows.

llama.cpp's log callback and backend registry belong to the process, so this is the one module with
process-wide state: importing it routes the native log into `logging` and starts the backend once.
"""

import ctypes
import logging
import math
import os
import signal
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

import llama_cpp
import llama_cpp._ggml as ggml
import llama_cpp.llama_cpp as llama
import llama_cpp.mtmd_cpp as mtmd
import numpy as np
from numpy.typing import NDArray

from lookonce.errors import ClosedError, DeviceError, InputError

logger = logging.getLogger("lookonce.native")

_WARN, _ERROR, _CONTINUED = 3, 4, 5  # enum ggml_log_level in ggml.h
_KEPT_LINES = 12


@dataclass(slots=True)
class NativeLog:
    """The warnings and errors that the native library logged while a block ran, oldest first."""

    lines: list[str] = field(default_factory=list)

    def tail(self) -> tuple[str, ...]:
        """The last lines, stripped, for an exception."""
        return tuple(line.strip() for line in self.lines[-_KEPT_LINES:] if line.strip())


class _Listeners(threading.local):
    """Each thread's open `listen` blocks: the native library logs in the thread that called it."""

    def __init__(self) -> None:
        self.open: list[NativeLog] = []
        self.level = 0
        self.broken_off: BaseException | None = None


_listeners = _Listeners()


def _on_log(level: int, text: bytes | None, _user_data: ctypes.c_void_p) -> None:
    # ctypes prints and drops an exception raised here. Ctrl-C comes up here more often than not while a model
    # loads, since this is the only Python code then running: it is kept, and raised after the native call.
    try:
        _take_line(level, text or b"")
    except BaseException as error:  # noqa: BLE001  nothing may raise here
        _listeners.broken_off = error


def _take_line(level: int, text: bytes) -> None:
    line = text.decode("utf-8", errors="replace")  # it can be cut inside a character
    if level == _CONTINUED:
        level = _listeners.level
    _listeners.level = level
    serious = level in (_WARN, _ERROR)
    if serious:
        for log in _listeners.open:
            log.lines.append(line)
    # The failing lines travel in the exception, so a program without logging set up stays quiet.
    logger.log(logging.INFO if serious else logging.DEBUG, "%s", line.rstrip())


@contextmanager
def listen() -> Iterator[NativeLog]:
    """Collect what the native library warns about in this thread while the block, one native call, runs.

    Ctrl-C is raised when the block has ended.
    """
    log = NativeLog()
    with _deferred_interrupt():
        _listeners.open.append(log)
        try:
            yield log
        finally:
            _listeners.open.pop()
    raise_broken_off()


@contextmanager
def _deferred_interrupt() -> Iterator[None]:
    # Python would raise it at the first bytecode of a callback, before any `try`, and ctypes would drop it there.
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt


def raise_broken_off() -> None:
    """Raise what interrupted a callback of the native library in this thread, if anything did."""
    error, _listeners.broken_off = _listeners.broken_off, None
    if error is not None:
        raise error


_standard_error = threading.Lock()


@contextmanager
def hear_standard_error() -> Iterator[list[str]]:
    """Give what is written to standard error while the block, one short native call, runs: it is not shown.

    llama.cpp's grammar parser writes its reasons there, and to no log. The file descriptor belongs to the process,
    so one block runs at a time.
    """
    heard: list[str] = []
    with _standard_error, tempfile.TemporaryFile() as file:
        try:
            saved = os.dup(2)
        except OSError:  # a program without a standard error
            yield heard
            return
        os.dup2(file.fileno(), 2)
        try:
            yield heard
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            heard += [line.strip() for line in file.read().decode("utf-8", errors="replace").splitlines()]


_log_callback: Final = llama.llama_log_callback(_on_log)  # the native library calls it for as long as it lives


def _start() -> None:
    for set_log in (llama.llama_log_set, mtmd.mtmd_log_set, mtmd.mtmd_helper_log_set):
        set_log(_log_callback, ctypes.c_void_p(0))
    llama.llama_backend_init()


_start()


def _declare(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(ggml.libggml, name)  # a library's dependencies are searched too: libggml-base
    function.restype = result
    function.argtypes = list(arguments)
    return function


_dev_count = _declare("ggml_backend_dev_count", ctypes.c_size_t)
_dev_get = _declare("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
_dev_name = _declare("ggml_backend_dev_name", ctypes.c_char_p, ctypes.c_void_p)
_dev_description = _declare("ggml_backend_dev_description", ctypes.c_char_p, ctypes.c_void_p)
_dev_type = _declare("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)
_dev_reg = _declare("ggml_backend_dev_backend_reg", ctypes.c_void_p, ctypes.c_void_p)
_reg_name = _declare("ggml_backend_reg_name", ctypes.c_char_p, ctypes.c_void_p)
_tensor_get = _declare(
    "ggml_backend_tensor_get",
    None,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_size_t,
)
_get_name = _declare("ggml_get_name", ctypes.c_char_p, ctypes.c_void_p)

_GPU_TYPES = (1, 2)  # GGML_BACKEND_DEVICE_TYPE_GPU and _IGPU
_BACKEND_NAMES: Final = {"MTL": "metal"}  # the Metal backend's registry name; the others read as users write them


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU that the build can use; `name` is what `device=` takes, e.g. `cuda:0`."""

    name: str
    description: str
    handle: int


@cache
def gpus() -> tuple[Device, ...]:
    """The GPUs of this machine that the native build can use."""
    found: list[Device] = []
    for index in range(_dev_count()):
        handle = _dev_get(index)
        if _dev_type(handle) not in _GPU_TYPES:
            continue
        registry = _reg_name(_dev_reg(handle)).decode()
        backend = _BACKEND_NAMES.get(registry, registry.lower())
        number = sum(device.name.startswith(f"{backend}:") for device in found)
        found.append(Device(f"{backend}:{number}", _dev_description(handle).decode(), handle))
    return tuple(found)


def choose_devices(device: str) -> tuple[Device, ...]:
    """The GPUs that `device` names; none for the CPU.

    `auto` takes every GPU of the build's first backend, or the CPU where there is none.

    Raises DeviceError where the build lacks what was asked for.
    """
    available = gpus()
    if device == "cpu" or (device == "auto" and not available):
        return ()
    wanted = available[0].name.partition(":")[0] if device == "auto" else device
    chosen = tuple(one for one in available if wanted in (one.name, one.name.partition(":")[0]))
    if not chosen:
        have = ", ".join(["cpu", *(one.name for one in available)])
        raise DeviceError(
            f"device {device!r} is not in this build of llama-cpp-python, which has {have}: choose one of these, "
            "or install llama-cpp-python built for your device (see the README)"
        )
    return chosen


def versions() -> dict[str, str]:
    """Versions of the native library and its binding, as a look's key and file record them."""
    return {
        "llama-cpp-python": str(llama_cpp.__version__),
        "libllama": llama.llama_version().decode(),
    }


_commit = _declare("ggml_commit", ctypes.c_char_p)


def build() -> dict[str, str]:
    """What tells one build of the native library from another: a state is believed by the one that made it alone."""
    return {**versions(), "ggml": _commit().decode(errors="replace"), "features": system_info()}


def system_info() -> str:
    """The CPU features that the native build uses, in llama.cpp's words."""
    return str(llama.llama_print_system_info().decode())


def cpu_features() -> tuple[str, ...]:
    """The names of the CPU features that the native build uses, as llama.cpp spells them."""
    parts = (part.partition("=") for part in system_info().replace(":", "|").split("|"))
    return tuple(name.strip() for name, _, value in parts if value.strip() == "1")


class Handle:
    """A native pointer that is freed exactly once: by `close`, when its owner is forgotten, or at exit.

    What needs another handle's pointer is freed before it, in whatever order the two are closed or forgotten: the
    garbage collector frees the parts of a cycle in any order.
    """

    def __init__(
        self, pointer: Any, free: Callable[[Any], object], name: str, *, needs: "Handle | None" = None
    ) -> None:
        self._pointer = pointer
        self._name = name
        self._process = os.getpid()
        self._dependants: weakref.WeakSet[Handle] = weakref.WeakSet()
        # The finalizer's arguments keep `needs` alive until this pointer is freed.
        self._free = weakref.finalize(self, _free_last, self._dependants, free, pointer, needs)
        if needs is not None:
            needs._dependants.add(self)
            self._free.atexit = False  # freed with what it needs, once whoever owns both knows them to be idle

    @property
    def pointer(self) -> Any:
        """The native pointer. Raises ClosedError after `close`, and in a process forked off the one that made it."""
        if not self._free.alive:
            raise ClosedError(f"{self._name} is closed: load the model again")
        if self._process != os.getpid():  # the native library's threads did not come along: it would wait for ever
            raise ClosedError(f"{self._name} belongs to the process that loaded it: load the model in this one")
        return self._pointer

    def close(self) -> None:
        """Free the pointer, and before it what needs it; may be called twice."""
        self._free()

    def abandon(self) -> None:
        """Never free the pointer: a thread that cannot be waited for is using it."""
        self._free.detach()


def _free_last(
    dependants: "weakref.WeakSet[Handle]", free: Callable[[Any], object], pointer: Any, _needed: Handle | None
) -> None:
    for dependant in tuple(dependants):
        dependant.close()
    free(pointer)


_F32: Final = 0  # GGML_TYPE_F32 in ggml.h


class _TensorPrefix(ctypes.Structure):
    """The first members of `struct ggml_tensor` (ggml.h)."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
    )


def tensor_name(tensor: int) -> str:
    """Name of a graph's tensor."""
    return str(_get_name(tensor).decode("utf-8", errors="replace"))


def read_tensor(tensor: int) -> NDArray[np.float32]:
    """Copy a contiguous F32 tensor out of its backend; the shape is ggml's reversed, at least two axes of it.

    Raises InputError for a tensor of another kind.
    """
    prefix = _TensorPrefix.from_address(tensor)
    shape = [int(n) for n in reversed(list(prefix.ne))]
    steps = [4, *(4 * math.prod(prefix.ne[:axis]) for axis in (1, 2, 3))]
    if prefix.type != _F32 or list(prefix.nb) != steps:
        raise InputError(f"the tensor {tensor_name(tensor)} is not a contiguous one of F32: capture another")
    while len(shape) > 2 and shape[0] == 1:
        shape.pop(0)
    values = np.empty(shape, dtype=np.float32)
    _tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
    return values
