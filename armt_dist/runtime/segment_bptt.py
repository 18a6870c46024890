"""Back-propagation through the segments of one layer, with one cell's graph alive at a time.

`SegmentBPTT` is applied inside `ARMTLayer.forward`, so that ZeRO-3 gathers the layer once for all segments of a
block, forward and backward, and every parameter receives exactly one gradient per call. Within the call the
schedule's instructions of this (layer, block) are dispatched from two small tables.

Shapes: B batch rows, N positions of a segment's row, D model width. The hidden states of a block are packed:
[B, sum of N, D], so segments may differ in length.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from itertools import accumulate, chain, groupby
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..config import Section
from ..model.backbone import Context
from ..model.memory import apply
from ..model.modeling_armt import ARMTLayer
from ..schedule.program import Instruction, Op
from .activation_store import DeviceStash, HostStash


class BPTTConfig(Section):
    """How backward has each segment's incoming state again.

    store: all of them are kept. rebuild: only the rank-M updates are kept, about 20 times smaller, and applied again.
    recompute: from the block's first state, for one more forward of the block.
    """

    states: Literal["store", "rebuild", "recompute"] = "store"


class Link(Protocol):
    """Where a block's first state comes from and its last state goes to, and their gradients; see `handoff`."""

    def recv(self, instruction: Instruction) -> tuple: ...

    def send(self, instruction: Instruction, state: tuple) -> None: ...


class CellView(NamedTuple):
    """One cell of a forward, for an observer."""

    instruction: Instruction
    row: int  # of the micro-batch: the first of the chunk
    layer: ARMTLayer
    segment: int  # of the block
    x: Tensor  # [b, N, D], the cell's input
    before: tuple
    after: tuple


class LayerWork(NamedTuple):
    """What one call of a layer is to do."""

    forward: Sequence[Instruction]  # of one (layer, block): RECV, RUN, SEND chunk by chunk, RELEASE
    backward: Sequence[Instruction]  # RERUN, RECV_GRAD, BACK, SEND_GRAD, then perhaps REDUCE
    lengths: Sequence[int]  # N of each segment
    contexts: Sequence[Sequence[Context]]  # [chunk][segment]
    states: str  # BPTTConfig.states
    stash: DeviceStash | HostStash  # where the layer's input waits for backward
    link: Link
    trace: Callable[[Instruction], None]  # told of each instruction when it begins
    observe: Callable[[CellView], None] | None = None  # shown every cell of the forward; must not wait for the device


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


class LayerCall:
    """One call of a layer over a block: the instructions of one (layer, block), forward and later backward."""

    def __init__(self, layer: ARMTLayer, work: LayerWork):
        self.layer, self.work = layer, work
        self.units = [ChunkReplay(layer, work.lengths, contexts, work.states) for contexts in work.contexts]
        self.cells: dict[int, Iterator[Cell]] = {}
        self.gradients = Gradients([p for p in layer.parameters() if p.requires_grad])

    @property
    def key(self) -> tuple[int, int]:
        """(block, layer)."""
        return self.work.forward[0].block, self.work.forward[0].layer

    def chunks(self, x: Tensor) -> tuple[Tensor, ...]:
        """The micro-batch cut into the schedule's chunks."""
        return x.tensor_split(len(self.units))

    def forward(self, x: Tensor) -> Tensor:
        """[B, sum of N, D] -> the same shape."""
        out = torch.empty_like(x)
        self.x, self.out = self.chunks(x), self.chunks(out)
        self.dispatch(FORWARD, self.work.forward)
        del self.x, self.out
        return out

    def backward(self, x: Tensor, grad_out: Tensor) -> Tensor:
        """Gradient of x from that of forward's result; parameter gradients go to `self.gradients`."""
        for parameter in self.gradients.parameters:
            parameter.ds_grad_is_ready = False
        grad_x = torch.empty_like(grad_out)
        self.x, self.grad_out, self.grad_x = self.chunks(x), self.chunks(grad_out), self.chunks(grad_x)
        # The re-run sets the generators back; what is drawn after this call must not notice.
        devices = [x.device] if x.is_cuda else []
        with torch.random.fork_rng(devices, enabled=self.layer.training):
            self.dispatch(BACKWARD, self.work.backward)
        del self.x, self.grad_out, self.grad_x
        return grad_x

    def dispatch(self, table: dict, program: Sequence[Instruction]) -> None:
        """Carry out the instructions chunk by chunk; the state, or its gradient, goes from one to the next."""
        for _, instructions in groupby(program, key=lambda instruction: instruction.chunk):
            carried: tuple | None = None
            for instruction in instructions:
                self.work.trace(instruction)
                carried = table[instruction.op](self, instruction, carried)

    def recv(self, instruction: Instruction, _: None) -> tuple:
        return self.work.link.recv(instruction)

    def send(self, instruction: Instruction, state: tuple) -> None:
        self.work.link.send(instruction, state)

    def run(self, instruction: Instruction, state: tuple | None) -> tuple:
        x, out = self.x[instruction.chunk], self.out[instruction.chunk]
        if state is None:
            state = self.layer.memory.initial_state(x.shape[0], x.device)
        observe = None
        if self.work.observe:
            row = sum(len(chunk) for chunk in self.x[: instruction.chunk])

            def observe(*cell) -> None:
                self.work.observe(CellView(instruction, row, self.layer, *cell))

        return self.units[instruction.chunk].forward(x, out, state, observe)

    def rerun(self, instruction: Instruction, _: None) -> None:
        """Only the block's last cell: it needs no gradient yet, so it fills the wait for one."""
        cells = self.units[instruction.chunk].cells(self.x[instruction.chunk])
        self.cells[instruction.chunk] = chain([next(cells)], cells)

    def back(self, instruction: Instruction, grad: tuple | None) -> tuple:
        chunk = instruction.chunk
        grads_out = self.grad_out[chunk].split(self.work.lengths, 1)
        grads_x = self.grad_x[chunk].split(self.work.lengths, 1)
        if grad is None:
            grad = self.layer.memory.initial_state(len(self.grad_x[chunk]), self.grad_x[chunk].device)
        kind = type(grad)
        for cell, grad_y, grad_x in zip(self.cells.pop(chunk), reversed(grads_out), reversed(grads_x), strict=True):
            grad_in, *grad = self.gradients.add(cell, (grad_y, *grad))
            grad_x.copy_(grad_in)
        return kind(*grad)

    def reduce(self, *_) -> None:
        """Let ZeRO-3's hook, which comes next, have the gradients.

        Where the rank has several blocks, the calls before only added to them. Measured exact, with gradient
        accumulation too; `engine.coalesce_grad_reduction()` is as exact, but keeps all layers' gradients to the end
        of the backward and takes one backward for a step.
        """
        for parameter in self.gradients.parameters:
            parameter.ds_grad_is_ready = True

    def hooked(self, *_) -> None:
        """Carried out by ZeRO-3's hooks around the layer's call."""


FORWARD = {Op.RECV: LayerCall.recv, Op.RUN: LayerCall.run, Op.SEND: LayerCall.send, Op.RELEASE: LayerCall.hooked}
BACKWARD = {
    Op.RERUN: LayerCall.rerun,
    Op.RECV_GRAD: LayerCall.recv,
    Op.BACK: LayerCall.back,
    Op.SEND_GRAD: LayerCall.send,
    Op.REDUCE: LayerCall.reduce,
    Op.GATHER: LayerCall.hooked,
}


class SegmentBPTT(torch.autograd.Function):
    """A layer over a block as one node of the graph: forward without one, backward cell by cell."""

    @staticmethod
    def forward(ctx, x: Tensor, run: LayerCall, *parameters: Tensor) -> Tensor:
        run.work.stash.put(run.key, x)
        ctx.run = run
        return run.forward(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        run = ctx.run
        grad_x = run.backward(run.work.stash.take(run.key), grad_out)
        return grad_x, None, *run.gradients.result()


def segment_bptt(layer: ARMTLayer, x: Tensor, work: LayerWork) -> Tensor:
    """The layer over a block of segments. [B, sum of N, D] -> the same shape. For `ARMTLayer.forward` as `run`."""
    run = LayerCall(layer, work)
    if not torch.is_grad_enabled():
        return run.forward(x)
    return SegmentBPTT.apply(x, run, *run.gradients.parameters)


def rng_state(device: torch.device) -> tuple[Tensor, ...]:
    """The generators that dropout on `device` draws from."""
    state = (torch.get_rng_state(),)
    return (*state, torch.cuda.get_rng_state(device)) if device.type == "cuda" else state


def set_rng_state(state: tuple[Tensor, ...], device: torch.device) -> None:
    """The inverse of `rng_state`."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
