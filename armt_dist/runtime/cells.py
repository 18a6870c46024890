"""The cells of one layer, run operation by operation: forward without a graph, again with one, and backward.

Shapes: B batch rows, N positions of a segment's row, D model width.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..model.backbone import Context
from ..model.memory_kind import ARMTLayer, MemoryUpdate, apply


class Cell(NamedTuple):
    """One cell that was run again, with its graph."""

    inputs: tuple[Tensor, ...]  # x, then the incoming state
    outputs: tuple[Tensor, ...]  # y, then the outgoing state


class Cells(Protocol):
    """The cells of one layer during one call over a block: its forward pass, and later its backward pass."""

    draws: bool  # whether a cell draws random numbers, so that its generators must be kept

    def begin(self) -> None:
        """Begin a pass: the layer's parameters are whole and have their values."""

    def forward(self, x: Tensor, state: tuple, context: Context, keep: bool) -> tuple[Tensor, MemoryUpdate, tuple]:
        """Run a cell without a graph. x [B, N, D] -> y [B, N, D], valid until the next call; update; state after it.

        keep: whether the update is used after the next call.
        """

    def rerun(self, x: Tensor, state: tuple, context: Context) -> Cell:
        """Run a cell with its graph; `back` of it comes before the next one."""

    def back(self, cell: Cell, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the gradients of x and of the state, from those of y and of the state after it.

        That of x is valid until the next call. Adds up the gradients of the parameters.
        """

    def gradients(self) -> tuple[Tensor, ...]:
        """End the backward pass: return one gradient per parameter, in the parameter's dtype."""


class EagerCells:
    """Cells as PyTorch runs them; parameter gradients are summed in float32: K bfloat16 additions would lose digits."""

    def __init__(self, layer: ARMTLayer, parameters: Sequence[Tensor]):
        self.layer, self.parameters = layer, tuple(parameters)
        self.sums: list[Tensor] = []
        self.draws = draws(layer)

    def begin(self) -> None:
        """Do nothing."""

    def forward(self, x: Tensor, state: tuple, context: Context, keep: bool) -> tuple[Tensor, MemoryUpdate, tuple]:
        """Run a cell without a graph; see `Cells`."""
        y, update = self.layer.cell(x, state, context)
        return y, update, apply(state, update)

    def rerun(self, x: Tensor, state: tuple, context: Context) -> Cell:
        """Run a cell with its graph; see `Cells`."""
        return run_again(self.layer, x, state, context)

    def back(self, cell: Cell, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the gradients of the cell's inputs; see `Cells`."""
        inputs, own = gradients_of(cell, gradients, self.parameters)
        if self.sums:
            add(self.sums, own)
        else:
            self.sums = [grad.float() for grad in own]
        return inputs

    def gradients(self) -> tuple[Tensor, ...]:
        """Return one gradient per parameter; see `Cells`."""
        # The call outlives its backward pass as long as its result does.
        sums, self.sums = self.sums, []
        return tuple(total.to(p.dtype) for p, total in zip(self.parameters, sums, strict=True))


def run_again(layer: ARMTLayer, x: Tensor, state: tuple, context: Context) -> Cell:
    """Run a cell with its graph, which begins at x and the state."""
    leaf = x.detach().requires_grad_()
    state = type(state)(*(t.detach().requires_grad_() for t in state))
    with torch.enable_grad():
        y, update = layer.cell(leaf, state, context)
        following = apply(state, update)
    return Cell((leaf, *state), (y, *following))


def gradients_of(
    cell: Cell, gradients: tuple[Tensor, ...], parameters: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the gradients of a cell's inputs and of the parameters, from those of its outputs."""
    # The outgoing state need not depend on anything: a detached window does not.
    pairs = [pair for pair in zip(cell.outputs, gradients, strict=True) if pair[0].requires_grad]
    outputs, gradients = zip(*pairs, strict=True)
    # An input that a cell does not depend on (z without denominators) gets zeros, never None.
    sources = (*cell.inputs, *parameters)
    found = torch.autograd.grad(outputs, sources, gradients, allow_unused=True, materialize_grads=True)
    return found[: len(cell.inputs)], found[len(cell.inputs) :]


def add(sums: list[Tensor], gradients: tuple[Tensor, ...]) -> None:
    """Add a cell's parameter gradients to their sums, all at once."""
    if sums:
        torch._foreach_add_(sums, gradients)


def draws(layer: nn.Module) -> bool:
    """Tell whether a layer draws random numbers: in training, where any of its modules has a dropout above 0."""
    return layer.training and any(
        value > 0
        for module in layer.modules()
        for name, value in vars(module).items()
        # nn.Dropout calls it p; attentions without a module for it have `attention_dropout`.
        if isinstance(value, int | float) and ("dropout" in name or (name == "p" and isinstance(module, nn.Dropout)))
    )
