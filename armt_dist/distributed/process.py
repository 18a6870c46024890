"""Settings of the process: what becomes of freed memory, and kernels that are deterministic.

glibc maps memory for every tensor above 128 kB (later: above the largest one freed, at most 32 MB), unmaps it when the
tensor is freed, and the kernel zeroes the pages each time. While a model is built that is right: its tensors are whole
for a moment each, before they are partitioned, and heaps would keep the room of all of them. In training the same
tensors come again and again: a CPU run of small segments would lose a fifth of its time.
"""

import ctypes
import os

import torch

# Options of malloc.h, and their values in bytes: the heap is never returned, and only huge blocks are mapped.
M_TRIM_THRESHOLD, NEVER = -1, 2**31 - 1
# glibc before 2.35 refuses more than 32 MB. Once either option is set, the threshold no longer grows by itself.
M_MMAP_THRESHOLD, HUGE, SMALL = -3, (2**30, 2**25), 2**17


def return_freed_memory() -> bool:
    """Give freed memory back at once, until `keep_freed_memory`. Returns whether the C library has the option."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, SMALL))


def keep_freed_memory() -> bool:
    """Keep freed memory for later tensors, for CPU runs. Returns whether the C library has the options (glibc has)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return any(mallopt(M_MMAP_THRESHOLD, size) for size in HUGE) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))


# torch has two names for it; the older one is read by all versions.
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def expand_segments() -> None:
    """Let torch grow its segments of GPU memory, unless the user set its allocator; call before torch uses a GPU.

    Where lengths grow from stage to stage, segments of a fixed size that fitted the old tensors fit none of the new.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"


# cuBLAS reads the first when its first handle is made; with it GEMMs do not share workspaces between streams. NCCL's
# tuner picks an algorithm by message size and topology, and each algorithm adds in a different order.
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}


def make_deterministic() -> None:
    """Allow only deterministic kernels in this process; call before torch uses a GPU.

    Environment variables that are set already stay. A kernel without a deterministic form raises RuntimeError from then
    on. Sums over ranks have a fixed order for a fixed number of ranks, so runs on different numbers of ranks still
    differ in the last digits.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
