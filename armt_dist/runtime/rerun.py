"""Run the cells of a layer forward without a graph, and again with one in the backward pass.

The state that entered each cell is stored, rebuilt from the updates, or recomputed. The last cells may keep the graphs
of the forward pass instead (`kept_graphs`).

Shapes: B batch rows, N positions of a segment's row, D model width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from itertools import accumulate, chain, islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from ..model.backbone import Context
from ..model.memory_kind import MemoryUpdate, StateT, apply
from .cells import Cell, Cells


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

    def __init__(self, cells: Cells, lengths: Sequence[int], contexts: Sequence[Context], states: str):
        self.cells, self.lengths, self.contexts, self.mode = cells, lengths, contexts, states
        self.states: list[tuple] = []
        self.updates: list[MemoryUpdate] = []
        self.generators: list[Generators] = []
        self.known: list[Tensor] = []
        self.kept: list[Cell] = []

    def forward(self, x: Tensor, out: Tensor, state: tuple, kept: int = 0, observe: Callable | None = None) -> tuple:
        """Fill `out` from x, both [B, sum of N, D], and return the state after the last segment.

        kept: how many segments, the last ones, keep their graphs. `observe(segment, x, state before, state after)` is
        called for every cell.
        """
        first_kept = len(self.lengths) - kept
        if first_kept:
            self.states.append(state)
        for s, (x_s, out_s) in enumerate(zip(x.split(self.lengths, 1), out.split(self.lengths, 1), strict=True)):
            before = state
            y, state = (self.run if s < first_kept else self.keep)(x_s, state, s)
            out_s.copy_(y)
            if observe:
                observe(s, x_s, before, state)
        if first_kept:
            self.known = self.cells.to_store(out.split(self.lengths, 1)[:first_kept])
        if self.mode == "store" and first_kept:
            # The state after the last segment that is run again enters none of them.
            self.states.pop()
        return state

    def run(self, x: Tensor, state: tuple, s: int) -> tuple[Tensor, tuple]:
        """Run a cell without a graph. x [B, N, D] -> y, the state after it."""
        if self.cells.draws:
            self.generators.append(Generators.of(x))
        y, update, after = self.cells.forward(x, state, self.contexts[s], keep=self.mode == "rebuild")
        if self.mode == "rebuild":
            self.updates.append(update)
        elif self.mode == "store":
            self.states.append(after)
        return y, after

    def keep(self, x: Tensor, state: tuple, s: int) -> tuple[Tensor, tuple]:
        """Run a cell and keep its graph. x [B, N, D] -> y, the state after it."""
        y, after, cell = self.cells.keep(x, state, self.contexts[s])
        self.kept.append(cell)
        return y, after

    def graphs(self, x: Tensor) -> Iterator[Cell]:
        """Return every cell with its graph, last segment first; the first of those to be run again is so at once."""
        again = self.reruns(x)
        ahead = list(islice(again, 1))
        return chain(drained(self.kept), drained(ahead), again)

    def reruns(self, x: Tensor) -> Iterator[Cell]:
        """Run every cell that has no graph again with one, last segment first."""
        rows = x.split(self.lengths, 1)[: len(self.lengths) - len(self.kept)]
        if not rows:
            return
        for s, state in zip(reversed(range(len(rows))), self.incoming(rows), strict=True):
            self.replay(s, x.device)
            yield self.cells.rerun(rows[s], state, self.contexts[s], self.known.pop() if self.known else None)

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
                    *_, after = self.cells.forward(x_s, self.states[-1], self.contexts[s], keep=False)
                    self.states.append(after)
        while self.states:
            yield self.states.pop()

    def replay(self, s: int, device: torch.device) -> None:
        """Let dropout draw for segment s what it drew in the forward pass."""
        if self.generators:
            self.generators[s].restore(device.type)


def drained(cells: list[Cell]) -> Iterator[Cell]:
    """Yield cells, last first, and hold each no longer."""
    while cells:
        yield cells.pop()


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
