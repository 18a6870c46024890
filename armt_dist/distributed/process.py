"""Freed host memory stays with the process, for the next tensors.

glibc maps every tensor above 128 kB (later: above the largest one freed, at most 32 MB) anew and gives it back when it
is freed, and the kernel zeroes each of its pages again. A CPU run of small segments spends a fifth of its time there.
"""

import ctypes

# Options of malloc.h, and their values in bytes: the heap is never given back, and only what is huge is mapped.
M_TRIM_THRESHOLD, NEVER = -1, 2**31 - 1
# glibc before 2.35 refuses more than 32 MB. Once the other option is set, the threshold no longer grows by itself.
M_MMAP_THRESHOLD, HUGE = -3, (2**30, 2**25)


def keep_freed_memory() -> bool:
    """For CPU runs; whether the C library knows these options (glibc does)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return any(mallopt(M_MMAP_THRESHOLD, size) for size in HUGE) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
