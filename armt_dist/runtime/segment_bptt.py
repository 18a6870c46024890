"""Back-propagate through the segments of one layer, with one cell's graph alive at a time beside those that are kept.

`SegmentBPTT` is applied inside `ARMTLayer.forward`, so that ZeRO-3 gathers the layer once for all segments of a
block, forward and backward, and every parameter receives exactly one gradient per call. Within the call the
schedule's instructions for this (layer, block) are dispatched from two small tables.

Shapes: B batch rows, N positions of a segment's row, D model width. The hidden states of a block are packed:
[B, sum of N, D], so segments may differ in length.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..model.backbone import Context
from ..model.memory_kind import ARMTLayer
from ..schedule.program import Instruction, Op
from .activation_store import DeviceStore, HostStore
from .cells import Cell, Cells
from .kept_graphs import KeptGraphs
from .rerun import ChunkReplay

MarkReady = Callable[[Sequence[Tensor], bool], None]
"""Tells the engine whether it may reduce the next gradients of these parameters, or more are to be added first."""


def no_engine(parameters: Sequence[Tensor], ready: bool) -> None:
    """Do nothing: without an engine autograd itself adds up the gradients of several calls."""


class Link(Protocol):
    """Where a block's first state comes from and its last state goes to, and their gradients; see `handoff`."""

    def recv(self, instruction: Instruction) -> tuple:
        """Return the state, or its gradient, that the neighbouring block has sent."""

    def send(self, instruction: Instruction, state: tuple) -> None:
        """Hand a state, or its gradient, to the neighbouring block without waiting."""


class CellView(NamedTuple):
    """One cell of a forward pass, as an observer sees it."""

    instruction: Instruction
    row: int  # of the micro-batch: the first of the chunk
    layer: ARMTLayer
    segment: int  # of the block
    x: Tensor  # [b, N, D], the cell's input
    before: tuple  # state that entered the cell
    after: tuple  # state that left it


class GradientView(NamedTuple):
    """The gradient of the state that entered one cell, as an observer of a backward pass sees it."""

    instruction: Instruction
    segment: int  # of the block
    gradient: tuple  # shaped as the state


class LayerWork(NamedTuple):
    """What one call of a layer is to do."""

    forward: Sequence[Instruction]  # of one (layer, block): RECV, RUN, SEND chunk by chunk, RELEASE
    backward: Sequence[Instruction]  # RERUN, RECV_GRAD, BACK, SEND_GRAD, perhaps WEIGHT, then perhaps REDUCE
    lengths: Sequence[int]  # N of each segment
    contexts: Sequence[Sequence[Context]]  # [chunk][segment]
    states: str  # BPTTConfig.states
    cells: Callable[[ARMTLayer, bool], Cells]  # of a layer, and whether they are trained
    kept: KeptGraphs  # cells of this pass that are not run again
    store: DeviceStore | HostStore  # where the layer's input waits for the backward pass
    link: Link
    mark_ready: MarkReady
    trace: Callable[[Instruction], None]  # told of each instruction when it begins
    observe: Callable[[CellView], None] | None = None  # shown every cell of the forward; must not wait for the device
    observe_gradient: Callable[[GradientView], None] | None = None  # shown every cell of the backward; must not wait
    first: tuple | None = None  # state [B, ...] that enters the sequence's first block; None: the empty one
    last: list[tuple] | None = None  # takes the states after the sequence's last block, chunk by chunk


class ForwardTensors(NamedTuple):
    """Input and output of one forward call, cut into the schedule's chunks."""

    x: tuple[Tensor, ...]
    out: tuple[Tensor, ...]


class BackwardTensors(NamedTuple):
    """Input and gradients of one backward call, cut into the schedule's chunks."""

    x: tuple[Tensor, ...]
    grad_out: tuple[Tensor, ...]
    grad_x: tuple[Tensor, ...]
    graphs: dict[int, Iterator[Cell]]  # by chunk, from RERUN until BACK


class LayerCall:
    """One call of a layer over a block: the instructions of one (layer, block), forward and later backward."""

    def __init__(self, layer: ARMTLayer, work: LayerWork):
        self.layer, self.work, self.trains = layer, work, torch.is_grad_enabled()
        self.cells = work.cells(layer, self.trains)
        self.replays = [ChunkReplay(self.cells, work.lengths, contexts, work.states) for contexts in work.contexts]
        self.parameters = tuple(p for p in layer.parameters() if p.requires_grad)

    @property
    def key(self) -> tuple[int, int]:
        """(block, layer)."""
        return self.work.forward[0].block, self.work.forward[0].layer

    def chunks(self, x: Tensor) -> tuple[Tensor, ...]:
        """Cut the micro-batch into the schedule's chunks."""
        return x.tensor_split(len(self.replays))

    def forward(self, x: Tensor) -> Tensor:
        """Run the block. [B, sum of N, D] -> the same shape."""
        out = torch.empty_like(x)
        self.cells.begin()
        self.dispatch(FORWARD, self.work.forward, ForwardTensors(self.chunks(x), self.chunks(out)))
        return out

    def backward(self, x: Tensor, grad_out: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the gradient of x, from that of forward's result, and one gradient per parameter."""
        # DeepSpeed must not reduce them unless this call carries out REDUCE.
        self.work.mark_ready(self.parameters, False)
        grad_x = torch.empty_like(grad_out)
        tensors = BackwardTensors(self.chunks(x), self.chunks(grad_out), self.chunks(grad_x), {})
        self.cells.begin()
        # The re-run sets the generators back; what is drawn after this call must not notice.
        devices = [x.device] if x.is_cuda else []
        with torch.random.fork_rng(devices, enabled=self.cells.draws):
            self.dispatch(BACKWARD, self.work.backward, tensors)
        return grad_x, self.cells.gradients()

    def dispatch(self, table: Mapping[Op, Callable], program: Sequence[Instruction], tensors: tuple) -> None:
        """Carry out the instructions chunk by chunk; each gets the state, or its gradient, from the one before it."""
        for _, instructions in groupby(program, key=lambda instruction: instruction.chunk):
            carried: tuple | None = None
            for instruction in instructions:
                self.work.trace(instruction)
                carried = table[instruction.op](self, instruction, carried, tensors)

    def recv(self, instruction: Instruction, carried: None, tensors: Any) -> tuple:
        """Wait for the state, or its gradient, of the neighbouring block."""
        return self.work.link.recv(instruction)

    def send(self, instruction: Instruction, carried: tuple, tensors: Any) -> None:
        """Hand the state, or its gradient, to the neighbouring block."""
        self.work.link.send(instruction, carried)

    def run(self, instruction: Instruction, carried: tuple | None, tensors: ForwardTensors) -> tuple:
        """Run the chunk forward; return the state after its last segment."""
        chunk = instruction.chunk
        x = tensors.x[chunk]
        state = self.first_state(chunk, x) if carried is None else carried
        observe = None
        if watcher := self.work.observe:
            row = sum(len(part) for part in tensors.x[:chunk])

            def observe(*cell: Any) -> None:
                watcher(CellView(instruction, row, self.layer, *cell))

        kept = self.cells_to_keep(chunk, x, state)
        after = self.replays[chunk].forward(x, tensors.out[chunk], state, kept, observe)
        if self.work.last is not None:
            self.work.last.append(after)
        return after

    def cells_to_keep(self, chunk: int, x: Tensor, state: tuple) -> int:
        """Return how many segments of the chunk keep their graphs; x [b, sum of N, D], state that enters it."""
        if not self.trains:
            return 0
        lengths, contexts = self.work.lengths, self.work.contexts[chunk]
        longest = max(range(len(lengths)), key=lambda s: lengths[s])
        x_s, context = x.split(lengths, 1)[longest], contexts[longest]
        kind = x_s.shape, context.mask is None, context.documents is None
        return self.work.kept.take(len(lengths), kind, lambda: self.cells.graph_bytes(x_s, state, context))

    def first_state(self, chunk: int, x: Tensor) -> tuple:
        """Return the state that enters the sequence's first block; x [b, sum of N, D] of the chunk."""
        first = self.work.first
        if first is None:
            return self.layer.memory.initial_state(x.shape[0], x.device)
        return type(first)(*(tensor.tensor_split(len(self.replays))[chunk] for tensor in first))

    def rerun(self, instruction: Instruction, carried: None, tensors: BackwardTensors) -> None:
        """Run the block's last cell without a graph again: it needs no gradient yet, so it fills the wait for one."""
        tensors.graphs[instruction.chunk] = self.replays[instruction.chunk].graphs(tensors.x[instruction.chunk])

    def back(self, instruction: Instruction, carried: tuple | None, tensors: BackwardTensors) -> tuple:
        """Run the chunk backward; return the gradient of the state that entered its first segment."""
        chunk = instruction.chunk
        grads_out = tensors.grad_out[chunk].split(self.work.lengths, 1)
        grads_x = tensors.grad_x[chunk].split(self.work.lengths, 1)
        if carried is None:
            carried = self.layer.memory.initial_state(len(grads_x[0]), grads_x[0].device)
        kind, grad = type(carried), tuple(carried)
        cells = tensors.graphs.pop(chunk)
        backwards = zip(cells, reversed(grads_out), reversed(grads_x), strict=True)
        for segment, (cell, grad_y, grad_x) in zip(reversed(range(len(grads_out))), backwards, strict=True):
            grad_in, *grad_state = self.cells.back(cell, (grad_y, *grad))
            grad_x.copy_(grad_in)
            grad = tuple(grad_state)
            if self.work.observe_gradient:
                self.work.observe_gradient(GradientView(instruction, segment, kind(*grad)))
        return kind(*grad)

    def weight(self, instruction: Instruction, carried: None, tensors: BackwardTensors) -> None:
        """Compute the weight gradients that BACK has left out."""
        self.cells.add_weights()

    def reduce(self, instruction: Instruction, carried: None, tensors: BackwardTensors) -> None:
        """Let ZeRO-3's hook, which comes next, reduce the gradients; the calls of earlier blocks only added to them."""
        self.work.mark_ready(self.parameters, True)

    def done_by_zero3(self, instruction: Instruction, carried: None, tensors: Any) -> None:
        """Do nothing: ZeRO-3's hooks around the layer's call carry out the instruction."""


FORWARD: Mapping[Op, Callable] = {
    Op.RECV: LayerCall.recv,
    Op.RUN: LayerCall.run,
    Op.SEND: LayerCall.send,
    Op.RELEASE: LayerCall.done_by_zero3,
}
BACKWARD: Mapping[Op, Callable] = {
    Op.RERUN: LayerCall.rerun,
    Op.RECV_GRAD: LayerCall.recv,
    Op.BACK: LayerCall.back,
    Op.SEND_GRAD: LayerCall.send,
    Op.WEIGHT: LayerCall.weight,
    Op.REDUCE: LayerCall.reduce,
    Op.GATHER: LayerCall.done_by_zero3,
}


class SegmentBPTT(torch.autograd.Function):
    """A layer over a block as one node of the graph: forward without a graph, backward cell by cell."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: LayerCall, *parameters: Tensor) -> Tensor:
        """Run the call forward and store its input."""
        call.work.store.put(call.key, x)
        ctx.call = call
        return call.forward(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the parameters."""
        call = ctx.call
        grad_x, gradients = call.backward(call.work.store.take(call.key), grad_out)
        return grad_x, None, *gradients


def segment_bptt(layer: ARMTLayer, x: Tensor, work: LayerWork) -> Tensor:
    """Run the layer over a block of segments; for `ARMTLayer.forward` as `run`. [B, sum of N, D] -> the same shape.

    An x that needs no gradient comes from frozen layers into one that is frozen too: it runs forward only.
    """
    if not torch.is_grad_enabled():
        return LayerCall(layer, work).forward(x)
    if not x.requires_grad:
        with torch.no_grad():
            return LayerCall(layer, work._replace(states="recompute")).forward(x)
    call = LayerCall(layer, work)
    return SegmentBPTT.apply(x, call, *call.parameters)
