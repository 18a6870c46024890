"""Freed host memory stays with the process, for the next tensors.

glibc maps every tensor above 128 kB (later: above the largest one freed, at most 32 MB) anew and gives it back when it
is freed, and the kernel zeroes each of its pages again. A CPU run of small segments spends a fifth of its time there.
"""

import ctypes

# M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h, in bytes: never give back, map only what is huge.
OPTIONS = {-1: 2**31 - 1, -3: 2**30}


def keep_freed_memory() -> bool:
    """For CPU runs; whether the C library knows these options (glibc does)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all([mallopt(option, value) for option, value in OPTIONS.items()])
