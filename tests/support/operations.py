"""What operations a block of code carries out: how many kernels they are, and what those that are no products move."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Views and allocations.
NO_KERNEL = {
    *("view", "transpose", "t", "slice", "unsqueeze", "expand", "split", "_unsafe_view", "permute", "squeeze"),
    *("select", "alias", "detach", "unbind", "as_strided", "split_with_sizes", "lift_fresh", "empty", "empty_like"),
}
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "dot", "mv"}


class Operations(TorchDispatchMode):
    """Counts kernels, and adds up what those that are neither products nor attention read and write."""

    def __init__(self):
        super().__init__()
        self.kernels, self.bytes = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        if name in NO_KERNEL:
            return out
        self.kernels += 1
        if name not in PRODUCTS and "attention" not in name:
            read = {id(each): each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
            written = [each for each in tree_leaves(out) if isinstance(each, torch.Tensor)]
            self.bytes += sum(map(stored, [*read.values(), *written]))
        return out


def stored(tensor):
    """Bytes of a tensor, what is repeated by a stride of 0 counted once."""
    kept = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return tensor.element_size() * torch.Size(kept).numel()
