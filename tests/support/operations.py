"""What operations a block of code carries out: how many kernels they are, and what those that are no products move."""

from collections import Counter
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Views and allocations.
NO_KERNEL = {
    *("view", "transpose", "t", "slice", "unsqueeze", "expand", "split", "_unsafe_view", "permute", "squeeze"),
    *("select", "alias", "detach", "unbind", "as_strided", "split_with_sizes", "lift_fresh", "empty", "empty_like"),
    *("unfold", "new_empty"),
}
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "dot", "mv"}


class Operations(TorchDispatchMode):
    """Counts kernels, and adds up what those that are neither products nor attention read and write."""

    def __init__(self):
        super().__init__()
        self.names, self.bytes = Counter(), 0

    @property
    def kernels(self):
        """How many there were."""
        return self.names.total()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        if name in NO_KERNEL:
            return out
        self.names[name] += 1
        if name not in PRODUCTS and "attention" not in name:
            read = {id(each): each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
            written = [each for each in tree_leaves(out) if isinstance(each, torch.Tensor)]
            self.bytes += sum(map(stored, [*read.values(), *written]))
        return out


def stored(tensor):
    """Bytes of a tensor, what is repeated by a stride of 0 counted once."""
    kept = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return tensor.element_size() * torch.Size(kept).numel()


@torch.library.custom_op("counted::attention", mutates_args=())
def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """An attention that is one operation, as on a GPU."""
    return torch.empty_like(query)


@torch.library.custom_op("counted::attention_backward", mutates_args=())
def attention_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Its backward pass, one operation too."""
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


attention.register_fake(lambda query, key, value: torch.empty_like(query))
attention_backward.register_fake(lambda grad, *inputs: tuple(map(torch.empty_like, inputs)))
attention.register_autograd(
    lambda ctx, grad: attention_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@contextmanager
def attention_in_one():
    """On the meta device, make one operation of each scaled dot product attention, which it would take apart."""
    name = "torch.nn.functional.scaled_dot_product_attention"
    with patch(name, lambda query, key, value, **_: attention(query, key, value)):
        yield
