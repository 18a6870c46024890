"""Back-propagation through the segments of one layer, with one cell's graph alive at a time.

`SegmentBPTT` is applied inside `ARMTLayer.forward`, so that ZeRO-3 gathers the layer once for all segments of a
block, forward and backward, and every parameter receives exactly one gradient per call. Within the call the
schedule's instructions of this (layer, block) are dispatched from two small tables.

Shapes: B batch rows, N positions of a segment's row, D model width. The hidden states of a block are packed:
[B, sum of N, D], so segments may differ in length.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..config import Section
from ..model.backbone import Context
from ..model.modeling_armt import ARMTLayer
from ..schedule.program import Instruction, Op
from .activation_store import DeviceStash, HostStash
from .rerun import Cell, ChunkReplay, Gradients


class BPTTConfig(Section):
    """How backward has each segment's incoming state again.

    store: all of them are kept. rebuild: only the rank-M updates are kept, about 20 times smaller, and applied again.
    recompute: from the block's first state, for one more forward of the block.
    """

    states: Literal["store", "rebuild", "recompute"] = "store"
    """Source of each segment's incoming state in the backward pass: kept, rebuilt from updates, or recomputed."""


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
