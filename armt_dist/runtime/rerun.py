"""Run the cells of a layer forward without a graph, and again with one in the backward pass.

The state that entered each cell is stored, rebuilt from the updates, or recomputed.

Shapes: B batch rows, N positions of a segment's row, D model width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from ..model.backbone import Context
from ..model.memory_kind import ARMTLayer, MemoryUpdate, StateT, apply


class Cell(NamedTuple):
    """One cell that was run again, with its graph."""

    inputs: tuple[Tensor, ...]  # x, then the incoming state
    outputs: tuple[Tensor, ...]  # y, then the outgoing state


class Gradients:
    """The layer's parameter gradients, summed over segments in float32: K bfloat16 additions would lose digits."""

    def __init__(self, parameters: Sequence[Tensor]):
        self.parameters = tuple(parameters)
        self.sums: list[Tensor] = []

    def add(self, cell: Cell, grad_outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Add the parameter gradients of one cell, and return the gradients of the cell's inputs."""
        sources = (*cell.inputs, *self.parameters)
        # The outgoing state need not depend on anything: a detached window does not.
        pairs = [pair for pair in zip(cell.outputs, grad_outputs, strict=True) if pair[0].requires_grad]
        outputs, grad_outputs = zip(*pairs, strict=True)
        # An input that a cell does not depend on (z without denominators) gets zeros, never None.
        grads = torch.autograd.grad(outputs, sources, grad_outputs, allow_unused=True, materialize_grads=True)
        inputs, own = grads[: len(cell.inputs)], grads[len(cell.inputs) :]
        if self.sums:
            for total, grad in zip(self.sums, own, strict=True):
                total.add_(grad)
        else:
            self.sums = [grad.float() for grad in own]
        return inputs

    def result(self) -> tuple[Tensor, ...]:
        """Return one gradient per parameter, in the parameter's dtype."""
        return tuple(total.to(p.dtype) for p, total in zip(self.parameters, self.sums, strict=True))


class Generators(NamedTuple):
    """The states of the random generators that dropout draws from."""

    cpu: Tensor
    devices: list[int]
    device_states: list[Tensor]

    @classmethod
    def of(cls, x: Tensor) -> "Generators":
        """Return the states of the CPU's generator and of that of x's device."""
        return cls(torch.get_rng_state(), *get_device_states(x))

    def restore(self, device_type: str) -> None:
        """Set the generators back to these states."""
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.device_states, device_type=device_type)


class ChunkReplay:
    """The segments of one chunk through the layer; between forward and backward, what backward needs of them."""

    def __init__(self, layer: ARMTLayer, lengths: Sequence[int], contexts: Sequence[Context], states: str):
        self.layer, self.lengths, self.contexts, self.mode = layer, lengths, contexts, states
        self.states: list[tuple] = []
        self.updates: list[MemoryUpdate] = []
        self.generators: list[Generators] = []

    def forward(self, x: Tensor, out: Tensor, state: tuple, observe: Callable | None = None) -> tuple:
        """Fill `out` from x, both [B, sum of N, D], and return the state after the last segment.

        `observe(segment, x, state before, state after)` is called for every cell.
        """
        self.states.append(state)
        for s, (x_s, out_s) in enumerate(zip(x.split(self.lengths, 1), out.split(self.lengths, 1), strict=True)):
            if self.layer.training:
                self.generators.append(Generators.of(x))
            y, update = self.layer.cell(x_s, state, self.contexts[s])
            out_s.copy_(y)
            before, state = state, apply(state, update)
            if observe:
                observe(s, x_s, before, state)
            if self.mode == "rebuild":
                self.updates.append(update)
            elif self.mode == "store":
                self.states.append(state)
        if self.mode == "store":
            # The state after the last segment enters no segment of this block.
            self.states.pop()
        return state

    def cells(self, x: Tensor) -> Iterator[Cell]:
        """Run every cell again with its graph, last segment first."""
        rows = x.split(self.lengths, 1)
        for s, state in zip(reversed(range(len(rows))), self.incoming(rows), strict=True):
            leaf = rows[s].detach().requires_grad_()
            state = type(state)(*(t.detach().requires_grad_() for t in state))
            self.replay(s, x.device)
            with torch.enable_grad():
                y, update = self.layer.cell(leaf, state, self.contexts[s])
                following = apply(state, update)
            yield Cell((leaf, *state), (y, *following))

    def incoming(self, rows: Sequence[Tensor]) -> Iterator[tuple]:
        """Yield the incoming state of every segment, last first, and drop each after its use."""
        if self.mode == "rebuild":
            yield from reapplied(self.states.pop(), self.updates)
            self.updates.clear()
            return
        if self.mode == "recompute":
            with torch.no_grad():
                for s, x_s in enumerate(rows[:-1]):
                    self.replay(s, x_s.device)
                    _, update = self.layer.cell(x_s, self.states[-1], self.contexts[s])
                    self.states.append(apply(self.states[-1], update))
        while self.states:
            yield self.states.pop()

    def replay(self, s: int, device: torch.device) -> None:
        """Let dropout draw for segment s what it drew in the forward pass."""
        if self.generators:
            self.generators[s].restore(device.type)


def reapplied(first: StateT, updates: Sequence[MemoryUpdate[StateT]]) -> Iterator[StateT]:
    """Yield the K states before K updates, last first, bit for bit; about 2·sqrt(K) of them exist at a time.

    Undoing the updates from the last state would need a single one, but rounding leaves a feature that was never
    written slightly away from 0, and z·q + 1e-5 magnifies that 1e5 times.
    """
    count, span = len(updates), math.isqrt(len(updates))
    starts = [first]
    for s in range(span, count, span):
        starts.append(reduce(apply, updates[s - span : s], starts[-1]))
    for i in reversed(range(len(starts))):
        states = list(accumulate(updates[i * span : min((i + 1) * span, count) - 1], apply, initial=starts.pop()))
        while states:
            yield states.pop()
