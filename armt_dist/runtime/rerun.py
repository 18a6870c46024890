"""Run the cells of a layer forward without a graph, and once more with one for the backward pass.

The state that entered each cell is stored, rebuilt from its updates, or recomputed.

Shapes: B batch rows, N positions of a segment's row, D model width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.backbone import Context
from ..model.memory import apply
from ..model.modeling_armt import ARMTLayer


class Cell(NamedTuple):
    """One cell run again, with its graph."""

    inputs: tuple[Tensor, ...]  # x, then the incoming state
    outputs: tuple[Tensor, ...]  # y, then the outgoing state


class Gradients:
    """The layer's parameter gradients, summed over segments in float32: K bfloat16 additions would lose digits."""

    def __init__(self, parameters: Sequence[Tensor]):
        self.parameters = tuple(parameters)
        self.sums: list[Tensor | None] = [None] * len(self.parameters)

    def add(self, cell: Cell, grad_outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Backward of one cell: add to the sums, return the gradients of the cell's inputs."""
        sources = (*cell.inputs, *self.parameters)
        # A detached window depends on nothing.
        pairs = [pair for pair in zip(cell.outputs, grad_outputs, strict=True) if pair[0].requires_grad]
        # An input that a cell does not depend on (z without denominators) gets zeros, never None.
        outputs, grad_outputs = zip(*pairs, strict=True)
        grads = torch.autograd.grad(outputs, sources, grad_outputs, allow_unused=True, materialize_grads=True)
        inputs = len(cell.inputs)
        for i, grad in enumerate(grads[inputs:]):
            self.sums[i] = grad.float() if self.sums[i] is None else self.sums[i].add_(grad)
        return grads[:inputs]

    def result(self) -> tuple[Tensor, ...]:
        """One gradient per parameter, in its dtype."""
        return tuple(total.to(p.dtype) for p, total in zip(self.parameters, self.sums, strict=True))


class ChunkReplay:
    """The segments of one chunk through the layer; between forward and backward, what backward needs of them."""

    def __init__(self, layer: ARMTLayer, lengths: Sequence[int], contexts: Sequence[Context], states: str):
        self.layer, self.lengths, self.contexts, self.mode = layer, lengths, contexts, states
        self.states: list[tuple] = []
        self.updates: list[tuple] = []
        self.rng: list[tuple[Tensor, ...]] = []

    def forward(self, x: Tensor, out: Tensor, state: tuple, observe: Callable | None = None) -> tuple:
        """Fill `out` from x, both [B, sum of N, D]; return the state after the last segment.

        `observe(segment, x, state before, state after)` is called for every cell.
        """
        self.states.append(state)
        for s, (x_s, out_s) in enumerate(zip(x.split(self.lengths, 1), out.split(self.lengths, 1), strict=True)):
            if self.layer.training:
                self.rng.append(rng_state(x.device))
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
            # The state after the last segment is nobody's incoming state here.
            self.states.pop()
        return state

    def cells(self, x: Tensor) -> Iterator[Cell]:
        """Every cell run again with its graph, last segment first."""
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
        """The incoming state of every segment, last first; drops each when it was used."""
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
        """Let dropout draw for segment s what it drew in forward."""
        if self.rng:
            set_rng_state(self.rng[s], device)


def reapplied(first: tuple, updates: Sequence[tuple]) -> Iterator[tuple]:
    """The K states that led to K updates, last first, bit for bit, holding about 2·sqrt(K) of them at a time.

    Undoing the updates from the last state would hold one, but rounding leaves a feature that was never written
    slightly away from 0, and z·q + 1e-5 magnifies that 1e5 times.
    """
    count, span = len(updates), math.isqrt(len(updates))
    starts = [first]
    for s in range(span, count, span):
        starts.append(reduce(apply, updates[s - span : s], starts[-1]))
    for i in reversed(range(len(starts))):
        states = list(accumulate(updates[i * span : min((i + 1) * span, count) - 1], apply, initial=starts.pop()))
        while states:
            yield states.pop()


def rng_state(device: torch.device) -> tuple[Tensor, ...]:
    """The generators that dropout on `device` draws from."""
    state = (torch.get_rng_state(),)
    return (*state, torch.cuda.get_rng_state(device)) if device.type == "cuda" else state


def set_rng_state(state: tuple[Tensor, ...], device: torch.device) -> None:
    """The inverse of `rng_state`."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
