"""Hand each block's last state to the next block, and its gradient back, over torch.distributed.

A message is one contiguous float32 buffer, the tensors of a state one after the other. Messages follow the order of the
schedule, so receives are posted one unit ahead and need no tags.

Every edge of the ring of ranks has a separate process group. NCCL carries out the point-to-point operations of a
communicator one after another in the order of their calls: on a shared one the receive for the next unit, posted
early, would hold up this unit's send, and all ranks of the ring would wait for each other. On an edge the order is the
same at both ends: the states of a pass, then their gradients.
"""

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.mesh import Edge
from ..schedule.program import Instruction, Op

Shapes = Callable[[Instruction], tuple]
"""From a message to the state's shapes, a NamedTuple of meta tensors."""


class Local:
    """The link of a rank that holds the whole sequence: from one of its blocks to the next, without communication."""

    sent_bytes = 0
    neighbours = ""

    def __init__(self) -> None:
        self.kept: dict[Instruction, tuple] = {}

    def open(self, receives: Iterable[Instruction], shapes: Shapes) -> "Local":
        """Return the link of one pass."""
        return Local()

    def send(self, instruction: Instruction, state: tuple) -> None:
        """Keep the state, or its gradient, until `recv`."""
        op, step = {Op.SEND: (Op.RECV, 1), Op.SEND_GRAD: (Op.RECV_GRAD, -1)}[instruction.op]
        self.kept[instruction._replace(op=op, block=instruction.block + step)] = state

    def recv(self, instruction: Instruction) -> tuple:
        """Return the state, or its gradient, that the neighbouring block has sent."""
        return self.kept.pop(instruction)


class Wire:
    """The link of one rank among several, for a whole run; `before` and `after` lead to its neighbours in the ring."""

    def __init__(self, before: Edge | None, after: Edge | None, device: torch.device):
        self.edges = {Op.RECV: before, Op.SEND_GRAD: before, Op.SEND: after, Op.RECV_GRAD: after}
        self.device = device
        # Buffers are filled and receives started without waiting for the layer that is running.
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.sending: deque[tuple[dist.Work, Tensor, Edge]] = deque()
        self.sent_bytes = 0
        # For messages: ranks and hosts, of the one before and the one after.
        self.neighbours = " and ".join(dict.fromkeys(str(edge) for edge in (before, after) if edge))

    def open(self, receives: Iterable[Instruction], shapes: Shapes) -> "Pass":
        """Return the link of one pass with its `receives` in order. Waits for the sends of the pass before."""
        self.drain()
        return Pass(self, receives, shapes)

    def edge(self, instruction: Instruction) -> Edge:
        """Return the edge of the ring that a message takes."""
        edge = self.edges[instruction.op]
        assert edge is not None, f"{instruction}: this rank has no neighbour for it"
        return edge

    def beside(self) -> AbstractContextManager:
        """Return the context in which work goes to the wire's own stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def post(self, instruction: Instruction, numel: int) -> tuple[dist.Work, Tensor]:
        """Start a receive of `numel` elements."""
        edge = self.edge(instruction)
        with self.beside():
            buffer = torch.empty(numel, dtype=torch.float32, device=self.device)
            work = dist.irecv(buffer, src=edge.peer, group=edge.group)
        return running(work, instruction), buffer

    def send(self, instruction: Instruction, state: tuple) -> None:
        """Start a send, and keep its buffer until it has left."""
        edge = self.edge(instruction)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
            for tensor in state:
                tensor.record_stream(self.stream)
        with self.beside():
            buffer = torch.cat([tensor.flatten() for tensor in state])
            work = dist.isend(buffer, dst=edge.peer, group=edge.group)
        self.sending.append((running(work, instruction), buffer, edge))
        self.sent_bytes += buffer.nbytes
        # gloo reports completion only in wait(); `drain` frees its buffers.
        while self.sending and self.sending[0][0].is_completed():
            self.sending.popleft()

    def drain(self) -> None:
        """Wait until all messages have left: the host for those in host memory, the stream for the device's."""
        with self.beside():
            while self.sending:
                work, _, edge = self.sending.popleft()
                await_neighbour(work, edge)


class Pass:
    """A wire during one forward pass and its backward pass."""

    def __init__(self, wire: Wire, receives: Iterable[Instruction], shapes: Shapes):
        self.wire, self.shapes = wire, shapes
        self.due = deque(receives)
        self.posted: deque[tuple[Instruction, dist.Work, Tensor]] = deque()

    def send(self, instruction: Instruction, state: tuple) -> None:
        """Hand a state, or its gradient, to the neighbour without waiting."""
        self.wire.send(instruction, state)

    def recv(self, instruction: Instruction) -> tuple:
        """Return what the neighbour has sent. Starts the next receive, then waits: on CUDA the stream, not the host.

        Raises RuntimeError when the neighbour is gone, or silent for longer than the timeout of its group.
        """
        if not self.posted:
            self.post()
        # Not across the change from states to gradients: on an edge all states come before the first gradient.
        if self.due and self.due[0].op is instruction.op:
            self.post()
        expected, work, buffer = self.posted.popleft()
        assert expected == instruction, f"{instruction} was asked for, but {expected} comes next"
        await_neighbour(work, self.wire.edge(instruction))
        if buffer.is_cuda:
            # Allocated for the wire's stream, used on this one.
            buffer.record_stream(torch.cuda.current_stream())
        return unpack(buffer, self.shapes(instruction))

    def post(self) -> None:
        """Start the next receive."""
        instruction = self.due.popleft()
        numel = sum(tensor.numel() for tensor in self.shapes(instruction))
        self.posted.append((instruction, *self.wire.post(instruction, numel)))


def await_neighbour(work: dist.Work, edge: Edge) -> None:
    """Wait for a message. Raises RuntimeError with the neighbour's name where it fails or the time is over."""
    try:
        work.wait()
    except RuntimeError as error:
        raise RuntimeError(f"hand-off with {edge}: {error}") from error


def running(work: dist.Work | None, instruction: Instruction) -> dist.Work:
    """Return the operation; torch gives None to a rank outside the group."""
    assert work is not None, f"{instruction}: this rank is not in the group of the edge"
    return work


def unpack(buffer: Tensor, shapes: tuple) -> tuple:
    """Return views into `buffer`, shaped as `shapes`: the inverse of flattening a state."""
    ends = list(accumulate(tensor.numel() for tensor in shapes))
    parts = (buffer[end - tensor.numel() : end].view(tensor.shape) for end, tensor in zip(ends, shapes, strict=True))
    return type(shapes)(*parts)
