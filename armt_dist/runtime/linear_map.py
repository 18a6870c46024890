"""A linear map whose product forward, or whose weight gradients backward, can be left out.

Shapes: ... leading dimensions, n their rows, I inputs, O outputs.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

Take = Callable[[Tensor, Tensor], None]
"""Is given x [n, I] and the gradient of the result [n, O], in the place of weight gradients."""


def is_plain(module: nn.Module) -> bool:
    """Tell whether a module is a linear map and nothing else."""
    return type(module) in (nn.Linear, Conv1D) and "forward" not in vars(module)


def linear_map(module: nn.Module, x: Tensor, product: bool = True, take: Take | None = None) -> Tensor:
    """Apply a plain linear map. [..., I] -> [..., O], zeros without the `product`.

    take: gets what weight and bias gradients are made of, which the map then has none of; None: it has its own. Under
    autocast the map is the module's own.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return type(module).forward(module, x)
    weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
    return LinearMap.apply(x, weight, module.bias, product, take)


@contextmanager
def instead_of(maps: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Let functions take the place of modules' `forward` within the block.

    Below the modules' hooks: ZeRO-3's are called as ever.
    """
    for module, function in maps.items():
        module.forward = function
    try:
        yield
    finally:
        for module in maps:
            del module.forward


class LinearMap(torch.autograd.Function):
    """x Wᵀ + b. x [..., I], W [O, I], b [O] or None -> [..., O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: bool, take: Take | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.take = take
        return linear(x, weight, bias) if product else x.new_zeros(()).expand(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        by_x, by_weight, by_bias, *_ = ctx.needs_input_grad
        # The products of autograd's own linear map, so that gradients are the same to the bit.
        rows = grad.flatten(0, -2)
        grad_x = rows.mm(weight).view_as(x) if by_x else None
        if ctx.take is not None:
            ctx.take(x.flatten(0, -2), rows)
            return grad_x, None, None, None, None
        grad_weight = x.flatten(0, -2).t().mm(rows).t() if by_weight else None
        return grad_x, grad_weight, rows.sum(0) if by_bias else None, None, None
