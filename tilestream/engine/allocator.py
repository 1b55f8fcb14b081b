"""The C library's allocator, told to give freed buffers back: without it a budget in bytes could not be kept."""

import ctypes
import sys

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_M_MMAP_THRESHOLD = -3
_THRESHOLD_BYTES = 2**20


def return_freed_memory() -> None:
    """Has glibc map every buffer from 1 MiB on its own, for the whole process, so that freeing it shrinks the process.

    By default glibc raises that limit to 32 MiB as it goes and keeps freed buffers in fragments: measured at twice the
    live tensors for tiles of half a gigabyte, at the same speed. Other C libraries return large buffers by themselves.
    """
    if _LIBC is not None and hasattr(_LIBC, "mallopt"):
        _LIBC.mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)


def trim() -> None:
    """Returns freed pages between the smaller buffers as well; under a millisecond unless there is much to return."""
    if _LIBC is not None and hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)
