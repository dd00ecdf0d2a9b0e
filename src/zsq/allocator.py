"""One setting of the C library that makes training loops on a CPU a third faster."""

import ctypes
import sys

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Options of glibc's ``mallopt``."""


def keep_freed_memory() -> bool:
    """Let the process keep the memory that tensors free; whether the C library could be told so.

    By default glibc gives every large block back at once, so that each step of a loop waits for the kernel to hand
    out and clear the same pages again. A setting of the whole process, so that programs make it (the command line
    and the benchmarks do), never the library by itself.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and all((mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, 2**31 - 1)))
