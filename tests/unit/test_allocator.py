"""Tensors of megabytes come from the heap, which stays with the process, rather than from mappings of their own."""

import os
import subprocess
import sys

import pytest
from support.paths import ROOT

from armt_dist.distributed import process

MAPPED = """
import ctypes, torch
from armt_dist.distributed import process

class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Mallinfo2
{before}
mapped = mallinfo2().hblks
tensor = torch.empty({megabytes} * 2**20, dtype=torch.uint8)
print(mallinfo2().hblks - mapped)
"""


def mapped(before: str, megabytes: int) -> int:
    """How many mappings a tensor costs in a process of its own."""
    script = MAPPED.format(before=before, megabytes=megabytes)
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, timeout=120, check=True, cwd=ROOT)
    return int(done.stdout)


@pytest.mark.needs("mallinfo2")
def test_tensors_come_from_the_heap():
    assert mapped("", 48) == mapped("", 24) == 1
    assert mapped("assert process.keep_freed_memory()", 48) == 0
    # A C library that takes no more than 32 MB.
    assert mapped("process.keep_freed_memory(); assert process.return_freed_memory()", 1) == 1
    # Without it, a tensor as large as one that was freed comes from the heap.
    freed = "del_ = torch.empty(30 * 2**20, dtype=torch.uint8); del del_"
    assert mapped(freed, 24) == 0
    assert mapped(f"process.return_freed_memory(); {freed}", 24) == 1
    assert mapped("process.HUGE = process.HUGE[1:]; assert process.keep_freed_memory()", 24) == 0


@pytest.mark.parametrize("name", [None, *process.ALLOCATOR])
def test_segments_grow_unless_the_user_set_the_allocator(monkeypatch, name):
    for each in process.ALLOCATOR:
        monkeypatch.delenv(each, raising=False)
    if name:
        monkeypatch.setenv(name, "max_split_size_mb:64")
    process.expand_segments()
    found = {each: os.environ[each] for each in process.ALLOCATOR if each in os.environ}
    os.environ.pop(process.ALLOCATOR[0], None)
    assert found == (
        {name: "max_split_size_mb:64"} if name else {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    )
