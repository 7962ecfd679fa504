"""A lock that a forked process finds free, whoever held it where the process was forked off."""

import os
import threading
from types import TracebackType

__all__ = ["ForkLock"]


class ForkLock:
    """As `threading.Lock`. A copy that is held by a thread which the child does not have would never be released."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = os.getpid()

    def acquire(self, timeout: float = -1) -> bool:
        """Take the lock; False where `timeout` seconds did not suffice."""
        if self._process != os.getpid():  # a child begins with one thread
            self._lock, self._process = threading.Lock(), os.getpid()
        return self._lock.acquire(timeout=timeout)

    def release(self) -> None:
        """Give the lock to the next."""
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
