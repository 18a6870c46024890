"""The cells of one layer, run operation by operation: forward without a graph, again with one, and backward.

Shapes: B batch rows, N positions of a segment's row, D model width.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves

from ..model.backbone import Context
from ..model.memory_kind import ARMTLayer, MemoryUpdate, apply
from .kept_graphs import graph_bytes, without_parameters
from .known_output import last_product
from .linear_map import instead_of, linear_map
from .weight_gradients import WeightGradients


class Cell(NamedTuple):
    """One cell with its graph."""

    inputs: tuple[Tensor, ...]  # x, then the incoming state
    outputs: tuple["Output", ...]  # y, then the outgoing state


Output = Tensor | GradientEdge | None
"""An output of a cell; of a kept one its place in the graph, None where it has none."""


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
        """Run a cell with a graph that `back` may use at any time. Returns y [B, N, D], the state after it, and it."""

    def graph_bytes(self, x: Tensor, state: tuple, context: Context) -> int:
        """Return the bytes that the graph of a cell like this holds while it is kept, beside its inputs."""

    def to_store(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return what `rerun` takes of each cell's output [B, N, D], [B, M, D]; empty where it needs nothing."""

    def rerun(self, x: Tensor, state: tuple, context: Context, known: Tensor | None) -> Cell:
        """Run a cell with its graph; `back` of it comes before the next one is run again. known: from `to_store`."""

    def back(self, cell: Cell, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the gradients of x and of the state, from those of y and of the state after it.

        That of x is valid until the next call. Adds up the gradients of the parameters, but for weight gradients that
        are put off.
        """

    def add_weights(self) -> None:
        """Compute the weight gradients that `back` has put off, and add them up."""

    def gradients(self) -> tuple[Tensor, ...]:
        """End the backward pass: return one gradient per parameter, in the parameter's dtype."""


class EagerCells:
    """Cells as PyTorch runs them; parameter gradients are summed in float32: K bfloat16 additions would lose digits."""

    def __init__(self, layer: ARMTLayer, trains: bool, grouped: bool = False):
        """trains: whether a backward pass follows. grouped: whether it puts weight gradients off."""
        self.layer, self.parameters = layer, tuple(p for p in layer.parameters() if p.requires_grad)
        # Without a backward pass nothing is run again.
        self.product = last_product(layer) if trains else None
        self.sums: list[Tensor] = []
        self.later = WeightGradients(layer) if grouped and trains else None
        self.draws = draws(layer)

    def begin(self) -> None:
        """Do nothing."""

    def forward(self, x: Tensor, state: tuple, context: Context, keep: bool) -> tuple[Tensor, MemoryUpdate, tuple]:
        """Run a cell without a graph; see `Cells`."""
        y, update = self.layer.cell(x, state, context)
        return y, update, apply(state, update)

    def keep(self, x: Tensor, state: tuple, context: Context) -> tuple[Tensor, tuple, Cell]:
        """Run a cell and keep its graph; see `Cells`."""
        with without_parameters(self.layer), changed_maps(None, self.later):
            inputs, outputs = with_graph(self.layer, x, state, context)
        y, *after = outputs
        # Without the results themselves, which the graph does not need.
        edges = tuple(get_gradient_edge(t) if t.requires_grad else None for t in outputs)
        return y.detach(), type(state)(*(t.detach() for t in after)), Cell(inputs, edges)

    def graph_bytes(self, x: Tensor, state: tuple, context: Context) -> int:
        """Return what a kept graph holds; see `Cells`."""
        devices = [x.device] if x.is_cuda else []
        with torch.random.fork_rng(devices, enabled=self.draws):
            outside = (x, *state, *self.layer.parameters(), *(t for t in tree_leaves(context) if isinstance(t, Tensor)))
            return graph_bytes(lambda: with_graph(self.layer, x, state, context), outside)

    def to_store(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the memory positions of the cells' outputs; see `Cells`."""
        return [] if self.product is None else stored_positions(self.layer, outputs)

    def rerun(self, x: Tensor, state: tuple, context: Context, known: Tensor | None) -> Cell:
        """Run a cell with its graph; see `Cells`."""
        return run_again(self.layer, x, state, context, self.product, known, self.later)

    def back(self, cell: Cell, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the gradients of the cell's inputs; see `Cells`."""
        if self.later:
            self.sums = self.sums or list(map(zeros, self.parameters))
            self.later.add_full_group(self.sums)
        inputs, own = gradients_of(cell, gradients, self.parameters)
        if self.sums:
            add(self.sums, own)
        else:
            given = zip(self.parameters, own, strict=True)
            self.sums = [zeros(p) if grad is None else grad.float() for p, grad in given]
        return inputs

    def add_weights(self) -> None:
        """Add up the weight gradients that were put off; see `Cells`."""
        if self.later:
            self.later.add_to(self.sums)

    def gradients(self) -> tuple[Tensor, ...]:
        """Return one gradient per parameter; see `Cells`."""
        # The call outlives its backward pass as long as its result does.
        sums, self.sums = self.sums, []
        return tuple(total.to(p.dtype) for p, total in zip(self.parameters, sums, strict=True))


def stored_positions(layer: ARMTLayer, outputs: Sequence[Tensor]) -> list[Tensor]:
    """Copy the memory positions [B, M, D] out of the outputs [B, N, D] of cells, all at once."""
    positions = [layer.memory_positions(y) for y in outputs]
    return list(torch.cat(positions, 1).split([part.shape[1] for part in positions], 1))


def run_again(
    layer: ARMTLayer,
    x: Tensor,
    state: tuple,
    context: Context,
    product: nn.Module | None,
    known: Tensor | None,
    later: WeightGradients | None = None,
) -> Cell:
    """Run a cell with its graph, without the `product` if the memory positions of its output are `known` [B, M, D].

    later: takes what the weight gradients of the cell's backward are made of.
    """
    if product is None or known is None:
        product = known = None
    with changed_maps(product, later):
        return Cell(*with_graph(layer, x, state, context, known))


def changed_maps(left_out: nn.Module | None, later: WeightGradients | None) -> AbstractContextManager:
    """Within the block, leave out the product of one linear map and put off the weight gradients of all, if given."""
    takers: dict[nn.Module, Callable | None] = dict(later.takers()) if later else {}
    if left_out is not None:
        takers.setdefault(left_out, None)
    maps = {m: partial(linear_map, m, product=m is not left_out, take=take) for m, take in takers.items()}
    return instead_of(maps)


def with_graph(
    layer: ARMTLayer, x: Tensor, state: tuple, context: Context, known: Tensor | None = None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Run a cell with a graph that begins at x and the state. Returns `Cell.inputs` and the outputs.

    known: what is written to the memory [B, M, D], whatever the layer gives; None: what it gives.
    """
    leaf = x.detach().requires_grad_()
    state = type(state)(*(t.detach().requires_grad_() for t in state))
    with torch.enable_grad():
        y, context = layer.attend(leaf, state, context)
        positions = layer.memory_positions(y)
        if known is not None:
            # In their place: products of rows that lie elsewhere may be rounded differently.
            positions.detach().copy_(known)
        update = layer.write(positions, state, context)
        following = apply(state, update)
    return (leaf, *state), (y, *following)


def gradients_of(
    cell: Cell, gradients: tuple[Tensor, ...], parameters: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Return the gradients of a cell's inputs and of the parameters, from those of its outputs.

    None for a parameter that the cell does not depend on, or whose gradient is put off.
    """
    # The outgoing state need not depend on anything: a detached window does not.
    pairs = [pair for pair in zip(cell.outputs, gradients, strict=True) if in_graph(pair[0])]
    outputs, gradients = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, (*cell.inputs, *parameters), gradients, allow_unused=True)
    inputs, own = found[: len(cell.inputs)], found[len(cell.inputs) :]
    # An input that a cell does not depend on (z without denominators) gets zeros, never None.
    given = zip(cell.inputs, inputs, strict=True)
    return tuple(torch.zeros_like(t) if grad is None else grad for t, grad in given), own


def in_graph(output: Output) -> bool:
    """Tell whether an output of a cell depends on its inputs or parameters."""
    return output.requires_grad if isinstance(output, Tensor) else output is not None


def zeros(parameter: Tensor) -> Tensor:
    """Return the float32 sum of no gradients of a parameter."""
    return torch.zeros_like(parameter, dtype=torch.float32)


def add(sums: list[Tensor], gradients: tuple[Tensor | None, ...]) -> None:
    """Add a cell's parameter gradients, where there are any, to their sums, all at once."""
    found = [(total, grad) for total, grad in zip(sums, gradients, strict=True) if grad is not None]
    if found:
        torch._foreach_add_(*map(list, zip(*found, strict=True)))


def draws(layer: nn.Module) -> bool:
    """Tell whether a layer draws random numbers: in training, where any of its modules has a dropout above 0."""
    return layer.training and any(
        value > 0
        for module in layer.modules()
        for name, value in vars(module).items()
        # nn.Dropout calls it p; attentions without a module for it have `attention_dropout`.
        if isinstance(value, int | float) and ("dropout" in name or (name == "p" and isinstance(module, nn.Dropout)))
    )
