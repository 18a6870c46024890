"""Bytes of the tensors that are alive, at their peak."""

import weakref
from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors alive that were made within, backward included, and keeps the peak.

    `known`: tensors from before, which in-place operations return.
    """

    def __init__(self, known: Iterable[torch.Tensor]):
        super().__init__()
        self.known = [tensor.untyped_storage() for tensor in known]
        self.alive = {id(storage) for storage in self.known}
        self.bytes = self.peak_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        """A view's storage is known already."""
        if id(storage) not in self.alive:
            self.alive.add(id(storage))
            self.bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.bytes)
            weakref.finalize(storage, self.freed, id(storage), storage.nbytes())

    def freed(self, key: int, size: int) -> None:
        self.alive.remove(key)
        self.bytes -= size
