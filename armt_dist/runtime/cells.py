"""The cells of one layer, run operation by operation: forward without a graph, again with one, and backward.

Shapes: B batch rows, N positions of a segment's row, D model width.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves

from ..model.backbone import Context
from ..model.memory_kind import ARMTLayer, MemoryUpdate, apply
from .kept_graphs import graph_bytes, without_parameters


class Cell(NamedTuple):
    """One cell with its graph."""

    inputs: tuple[Tensor, ...]  # x, then the incoming state
    # y, then the outgoing state; of a kept cell only where they are in the graph, None where they do not depend on it
    outputs: tuple[Tensor | GradientEdge | None, ...]


class Cells(Protocol):
    """The cells of one layer during one call over a block: its forward pass, and later its backward pass."""

    draws: bool  # whether a cell draws random numbers, so that its generators must be kept

    def begin(self) -> None:
        """Begin a pass: the layer's parameters are whole and have their values."""

    def forward(self, x: Tensor, state: tuple, context: Context, keep: bool) -> tuple[Tensor, MemoryUpdate, tuple]:
        """Run a cell without a graph. x [B, N, D] -> y [B, N, D], valid until the next call; update; state after it.

        keep: whether the update is used after the next call.
        """

    def keep(self, x: Tensor, state: tuple, context: Context) -> tuple[Tensor, tuple, Cell]:
        """Run a cell with a graph that `back` may use at any time. Returns y [B, N, D], the state after it, the graph."""

    def graph_bytes(self, x: Tensor, state: tuple, context: Context) -> int:
        """Return the bytes that the graph of a cell like this holds while it is kept, beside its inputs."""

    def rerun(self, x: Tensor, state: tuple, context: Context) -> Cell:
        """Run a cell with its graph; `back` of it comes before the next one is run again."""

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

    def keep(self, x: Tensor, state: tuple, context: Context) -> tuple[Tensor, tuple, Cell]:
        """Run a cell and keep its graph; see `Cells`."""
        with without_parameters(self.layer):
            cell = run_again(self.layer, x, state, context)
        y, *after = cell.outputs
        # Without the results themselves, which the graph does not need.
        edges = tuple(get_gradient_edge(t) if t.requires_grad else None for t in cell.outputs)
        return y.detach(), type(state)(*(t.detach() for t in after)), Cell(cell.inputs, edges)

    def graph_bytes(self, x: Tensor, state: tuple, context: Context) -> int:
        """Return what a kept graph holds; see `Cells`."""
        devices = [x.device] if x.is_cuda else []
        with torch.random.fork_rng(devices, enabled=self.draws):
            outside = (x, *state, *self.layer.parameters(), *(t for t in tree_leaves(context) if isinstance(t, Tensor)))
            return graph_bytes(lambda: run_again(self.layer, x, state, context), outside)

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
    pairs = [pair for pair in zip(cell.outputs, gradients, strict=True) if in_graph(pair[0])]
    outputs, gradients = zip(*pairs, strict=True)
    # An input that a cell does not depend on (z without denominators) gets zeros, never None.
    sources = (*cell.inputs, *parameters)
    found = torch.autograd.grad(outputs, sources, gradients, allow_unused=True, materialize_grads=True)
    return found[: len(cell.inputs)], found[len(cell.inputs) :]


def in_graph(output: Tensor | GradientEdge | None) -> bool:
    """Tell whether an output of a cell depends on its inputs or parameters."""
    return output.requires_grad if isinstance(output, Tensor) else output is not None


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
