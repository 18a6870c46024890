"""Run a cell again without the last product of its layer: what it would give is known from the forward pass.

In most families the layer ends with a linear map whose result is only added to the hidden states. Its gradients need
what goes into it, not what comes out, and of the cell's output the memory's write alone reads anything: the memory
positions, which are stored. So a cell that is run again leaves that map out, a quarter of a Llama layer's products.

Shapes: B batch rows, N positions of a segment's row, M memory tokens, D model width, I width of the MLP.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from ..model.memory_kind import ARMTLayer


def last_product(layer: ARMTLayer) -> nn.Module | None:
    """Return the linear map that a cell may leave out when it is run again; None: there is none."""
    if not layer.last_product:
        return None
    module = layer.layer.get_submodule(layer.last_product)
    # LoRA adds to what its base layer gives.
    module = getattr(module, "base_layer", module)
    plain = type(module) in (nn.Linear, Conv1D) and "forward" not in vars(module)
    return module if plain else None


@contextmanager
def left_out(product: nn.Module) -> Iterator[None]:
    """Let the linear map give zeros within the block; its gradients are those of the map."""

    def forward(x: Tensor) -> Tensor:
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            return type(product).forward(product, x)
        weight = product.weight.t() if isinstance(product, Conv1D) else product.weight
        return LeftOut.apply(x, weight, product.bias)

    # Below the module's hooks: ZeRO-3's are called as ever.
    product.forward = forward
    try:
        yield
    finally:
        del product.forward


class LeftOut(torch.autograd.Function):
    """x Wᵀ + b with zeros in the place of the result. x [B, N, I], W [D, I], b [D] or None -> [B, N, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_zeros(()).expand(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        # The products of autograd's own linear map, so that gradients are the same to the bit.
        rows = grad.flatten(0, -2)
        by_x, by_weight, by_bias = ctx.needs_input_grad
        return (
            rows.mm(weight).view_as(x) if by_x else None,
            x.flatten(0, -2).t().mm(rows).t() if by_weight else None,
            rows.sum(0) if by_bias else None,
        )
