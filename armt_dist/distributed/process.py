"""Freed host memory stays with the process, for the next tensors.

glibc maps every tensor above 128 kB (later: above the largest one freed, at most 32 MB) anew and gives it back when it
is freed, and the kernel zeroes each of its pages again. A CPU run of small segments spends a fifth of its time there.
"""

import ctypes
import os

import torch

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


# cuBLAS reads the first when its first handle is made; with it GEMMs do not share workspaces between streams. NCCL's
# tuner picks an algorithm by message size and topology, and each adds in an order of its own.
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}


def make_deterministic() -> None:
    """Only deterministic kernels in this process; call before torch touches a GPU. What is set already stays.

    A kernel that has no deterministic form raises RuntimeError from then on. Sums over ranks have a fixed order for
    a fixed number of ranks, so runs on other numbers of ranks still differ in the last digits.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
