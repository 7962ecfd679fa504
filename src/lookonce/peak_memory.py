"""The most memory that this process has held."""

import sys

__all__ = ["peak_bytes"]


def peak_bytes() -> int:
    """The largest resident set so far, in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
