"""Weight gradients of a layer's linear maps, put off and computed for the cells of a group at once.

A cell's backward then has two halves: the gradients of its inputs, for which other layers and ranks wait, and those of
weights and biases, for which nothing waits but the reduction. One product over the rows of many cells reads and writes
the float32 sums of the gradients once, and not once a cell.

Shapes: n rows of a cell, I inputs, O outputs of a map.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..model.memory_kind import ARMTLayer
from ..schedule.weight_groups import GROUP
from .linear_map import is_plain


class Put(NamedTuple):
    """What one map's weight gradient of one cell is made of."""

    place: int  # of the map
    x: Tensor  # [n, I]
    grad: Tensor  # [n, O]


class WeightGradients:
    """What the cells of one call of a layer have put off."""

    def __init__(self, layer: ARMTLayer):
        self.maps = [module for module in layer.layer.modules() if is_plain(module) and trains(module)]
        trained = [id(p) for p in layer.parameters() if p.requires_grad]
        # Of weight and bias among the trained parameters; a bias may be missing.
        self.indices = [
            (trained.index(id(m.weight)), None if m.bias is None else trained.index(id(m.bias))) for m in self.maps
        ]
        self.turned = [isinstance(module, Conv1D) for module in self.maps]
        self.put: list[Put] = []
        self.cells = 0

    def takers(self) -> dict[nn.Module, partial]:
        """Return for each map the function that takes what its weight gradients are made of."""
        return {module: partial(self.take, place) for place, module in enumerate(self.maps)}

    def take(self, place: int, x: Tensor, grad: Tensor) -> None:
        """Hold x [n, I] and the gradient of the map's result [n, O]."""
        self.put.append(Put(place, x, grad))

    def taken(self) -> list[Put]:
        """Return what is held, and hold it no longer."""
        put, self.put, self.cells = self.put, [], 0
        return put

    def add_full_group(self, sums: Sequence[Tensor]) -> None:
        """Add the group to the sums if it is full; called before each cell's backward."""
        if self.cells == GROUP:
            self.add_to(sums)
        self.cells += 1

    def add_to(self, sums: Sequence[Tensor]) -> None:
        """Add the weight gradients that were put off to `sums`, float32, of the layer's trained parameters."""
        by_map: dict[int, list[Put]] = defaultdict(list)
        for put in self.taken():
            by_map[put.place].append(put)
        for place, puts in by_map.items():
            x, grad = torch.cat([put.x for put in puts]), torch.cat([put.grad for put in puts])
            weight, bias = self.indices[place]
            add_product(sums[weight], *(x, grad) if self.turned[place] else (grad, x))
            if bias is not None:
                sums[bias].add_(grad.sum(0, dtype=sums[bias].dtype))


def trains(module: nn.Module) -> bool:
    """Tell whether a map's weight is trained; and its bias too, if it has one, so that both are put off or neither."""
    return all(p.requires_grad for p in module.parameters(recurse=False))


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add aᵀ b to a float32 sum; a [n, O], b [n, I], total [O, I]. No digits of a narrower dtype's product are lost."""
    if a.dtype == total.dtype:
        total.addmm_(a.t(), b)
    elif a.is_cuda and a.dtype.itemsize < total.dtype.itemsize:
        total.add_(torch.mm(a.t(), b, out_dtype=total.dtype))
    else:
        # CPUs have no product of bfloat16 with a float32 result.
        wide = torch.promote_types(a.dtype, total.dtype)
        total.add_(a.t().to(wide) @ b.to(wide))
