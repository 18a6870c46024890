"""Run the programs of all ranks with the real hand-off and ring on the double of `nccl_model`.

The product's own code decides which message takes which process group and when it is posted: `distributed.mesh.ring`,
`runtime.handoff`, `runtime.executor`'s link of a pass and `runtime.segment_bptt`'s dispatch of a layer call. In the
place of cells there is an operation that checks which state it got; in the place of ZeRO-3 there are its collectives
in the order and with the waits of DeepSpeed 0.19.8 on CUDA.
"""

import inspect
import itertools
from collections import deque
from collections.abc import Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch

from armt_dist.distributed import mesh as real_mesh
from armt_dist.runtime import handoff as real_handoff
from armt_dist.runtime.executor import ScheduledLM
from armt_dist.runtime.segment_bptt import BACKWARD, FORWARD, LayerCall
from armt_dist.schedule.grid import ARMT_ARROWS, Grid, prefetch_window, reduction_layers
from armt_dist.schedule.program import Call, Instruction, Op, backward_program, build_program, layer_calls
from armt_dist.schedule.simulator import issue_order
from support.nccl_model import GPU, Communicator, Hazard, Machine, Message, Operation, Storage, Stream

BATCH = 4
# Of DeepSpeed: the host waits where more gathers or reductions than that are unfinished.
ONGOING = 2


def mutated(module: ModuleType, line: str, instead: str) -> ModuleType:
    """Return a copy of a module in which one line, that must be there once, is another."""
    source = inspect.getsource(module)
    assert source.count(line) == 1, f"{module.__name__} has {source.count(line)} times: {line}"
    copy = ModuleType(module.__name__)
    copy.__package__ = module.__package__
    exec(compile(source.replace(line, instead), f"a mutated {module.__file__}", "exec"), copy.__dict__)
    return copy


class Tensor:
    """A tensor on a GPU of the double, or a view of one."""

    is_cuda = True

    def __init__(self, storage: Storage, numel: int):
        self.storage, self.size = storage, numel
        self.nbytes = 4 * numel

    @property
    def block(self):
        return self.storage.block

    def numel(self) -> int:
        return self.size

    def flatten(self) -> "Tensor":
        return self

    def view(self, shape: Any) -> "Tensor":
        return self

    def __getitem__(self, part: slice) -> "Tensor":
        return Tensor(self.storage, part.stop - part.start)

    def record_stream(self, stream: Stream) -> None:
        self.storage.recorded.add(stream)


class State(NamedTuple):
    """As the associative memory's: matrix and normaliser."""

    A: Any
    z: Any


class Work:
    """What torch.distributed returns. torch holds the tensor until the work is waited for, or over."""

    def __init__(self, gpu: GPU, operation: Operation, tensor: Tensor):
        self.gpu, self.operation, self.tensor = gpu, operation, tensor
        operation.hosts.append(self.over)

    def over(self) -> None:
        """Let go of the tensor, whose memory may be taken again because the operation is over."""
        if self.tensor is not None:
            self.tensor.storage.kept_for.append(self.operation)
        self.tensor = None

    def wait(self) -> None:
        self.gpu.current.wait(self.operation)
        self.tensor = None

    def is_completed(self) -> bool:
        self.gpu.pause()
        return self.gpu.query(self.operation)


class FakeTorch:
    """As much of `torch` as the hand-off uses."""

    float32 = torch.float32
    device = torch.device

    def __init__(self, machine: Machine):
        self.machine = machine
        self.cuda = SimpleNamespace(
            Stream=lambda device: Stream(machine.running, "wire"),
            current_stream=lambda: machine.running.current,
            stream=lambda stream: machine.running.on(stream),
        )

    def empty(self, numel: int, dtype: Any, device: Any) -> Tensor:
        gpu = self.machine.running
        gpu.pause()
        return Tensor(Storage(gpu.current), numel)

    def cat(self, tensors: Sequence[Tensor]) -> Tensor:
        gpu = self.machine.running
        gpu.pause()
        joined = Tensor(Storage(gpu.current), sum(tensor.numel() for tensor in tensors))
        sources, target = [tensor.block for tensor in tensors], joined.block
        operation = gpu.current.put("cat", self.machine.draw("compute"), reads=sources, writes=[target])

        def copy() -> None:
            assert len({source.content for source in sources}) == 1, "parts of different states"
            target.content = sources[0].content

        operation.effect = copy
        return joined


class FakeDist:
    """As much of `torch.distributed` as the hand-off uses. shared: one communicator for all edges of an sp group."""

    def __init__(self, machine: Machine, shared: bool):
        self.machine, self.shared = machine, shared
        self.made: dict[tuple, Communicator] = {}

    def communicator(self, key: tuple, ranks: Sequence[int], name: str) -> Communicator:
        if key not in self.made:
            self.made[key] = Communicator(self.machine, ranks, name)
        return self.made[key]

    def isend(self, buffer: Tensor, dst: int, group: Communicator) -> Work:
        gpu = self.machine.running
        message = Message(group, "send", dst, buffer.numel(), buffer.block)
        return Work(gpu, gpu.call(message, reads=[buffer.block]), buffer)

    def irecv(self, buffer: Tensor, src: int, group: Communicator) -> Work:
        gpu = self.machine.running
        message = Message(group, "recv", src, buffer.numel(), buffer.block)
        return Work(gpu, gpu.call(message, writes=[buffer.block]), buffer)


def edges_of(dist: FakeDist, ranks: int, sp: int) -> list[tuple]:
    """Return the edges of every rank, as the product's `ring` makes them."""
    found = []
    for rank in range(ranks):
        times = itertools.count()

        def connect(pairs: list[list[int]], rank: int, *_: Any, times=times) -> Communicator | None:
            time = next(times)
            own = next((pair for pair in pairs if rank in pair), None)
            if own is None:
                return None
            group = range(own[0] // sp * sp, own[0] // sp * sp + sp)
            key, members = (("shared", group[0]), group) if dist.shared else ((time, *own), own)
            return dist.communicator(key, members, f"communicator {'-'.join(map(str, members))} ({time})")

        sp_ranks = tuple(range(rank // sp * sp, (rank // sp + 1) * sp))
        mesh = real_mesh.Mesh(ranks // sp, sp, *divmod(rank, sp), sp_ranks)
        with put_in(real_mesh, connect=connect, gather_json=lambda host: [host] * ranks):
            found.append(real_mesh.ring(mesh, 60))
    return found


class Zero3:
    """The collectives of ZeRO-3 on one rank, in one forward pass and, if it trains, its backward pass."""

    def __init__(self, gpu: GPU, world: Communicator, grid: Grid, window: int | None, trains: bool):
        self.gpu, self.world = gpu, world
        program = build_program("wavefront", grid, gpu.rank % grid.sp)
        self.program = program + (backward_program(program) if trains else [])
        order = issue_order(self.program, prefetch_window(grid) if window is None else window)
        self.gathers = deque(place for place in order if self.program[place[1]].op is Op.GATHER)
        self.places = deque(index for index, instruction in enumerate(self.program) if instruction.op is Op.GATHER)
        self.gathering, self.reducing = Stream(gpu, "gathers"), Stream(gpu, "reductions")
        self.issued: deque[Operation] = deque()
        self.fetches: deque[Operation] = deque()
        self.reductions: deque[Operation] = deque()
        self.bucket, self.full = 0, reduction_layers(grid)

    def collective(self, stream: Stream, label: Any) -> Operation:
        with self.gpu.on(stream):
            return self.gpu.call(Message(self.world, "all", label))

    def limit(self, events: deque[Operation]) -> None:
        while events and self.gpu.query(events[0]):
            events.popleft()
        if len(events) > ONGOING:
            self.gpu.synchronize(events.popleft())

    def fetch(self) -> None:
        """Gather the next layer call's parameters, wait as DeepSpeed does, and prefetch."""
        place = self.places.popleft()
        if not self.issued:
            self.gather()
        self.limit(self.fetches)
        self.gathering.wait(self.issued.popleft())
        self.fetches.append(self.gathering.tail)
        self.gpu.compute.wait_stream(self.gathering)
        while self.gathers and self.gathers[0][0] <= place:
            self.gather()

    def gather(self) -> None:
        instruction = self.program[self.gathers.popleft()[1]]
        self.issued.append(self.collective(self.gathering, f"{instruction.op} {instruction.layer}"))

    def reduce(self, layer: int, last: bool) -> None:
        """Add a layer's gradients to the bucket, and reduce those in a full one."""
        self.reducing.wait_stream(self.gpu.compute)
        self.bucket += 1
        if self.bucket == self.full or last:
            self.limit(self.reductions)
            self.reductions.append(self.collective(self.reducing, f"REDUCE to {layer}"))
            self.bucket = 0

    def meet(self) -> None:
        """Let the host wait for all ranks, as the end of a step and its metrics do."""
        self.gpu.synchronize(self.reducing.tail)
        self.gpu.synchronize(self.collective(self.gpu.compute, "metrics"))


class Rank:
    """What one rank does in a pass: the real dispatch of layer calls, with this class's cells and ZeRO-3."""

    def __init__(self, gpu: GPU, link: Any, zero: Zero3, grid: Grid):
        self.gpu, self.zero, self.grid = gpu, zero, grid
        self.work = SimpleNamespace(trace=self.trace, link=link)
        self.forward = {**FORWARD, Op.RUN: Rank.cell}
        self.backward = {**BACKWARD, Op.RERUN: Rank.rerun, Op.BACK: Rank.cell, Op.REDUCE: BACKWARD[Op.GATHER]}

    def trace(self, instruction: Instruction) -> None:
        self.gpu.doing = str(instruction)
        self.gpu.pause()

    def rerun(self, instruction: Instruction, carried: None, tensors: None) -> None:
        self.gpu.compute.put(str(instruction), self.gpu.machine.draw("compute"))

    def cell(self, instruction: Instruction, carried: State | None, tensors: None) -> State:
        """Check the state that comes in, and make the one that goes out."""
        gpu, back = self.gpu, instruction.op is Op.BACK
        after = State(*(Tensor(Storage(gpu.compute), size) for size in sizes(len_of_chunk(instruction, self.grid))))
        reads, writes = [each.block for each in carried or ()], [each.block for each in after]
        operation = gpu.compute.put(str(instruction), gpu.machine.draw("compute"), reads=reads, writes=writes)
        expected = instruction._replace(block=instruction.block + (1 if back else -1))

        def check() -> None:
            for block in reads:
                if block.content != expected:
                    raise Hazard(f"rank {gpu.rank}: {instruction} got {block.content}")
            for block in writes:
                block.content = instruction

        operation.effect = check
        return after

    def run(self, calls: Sequence[Call], trains: bool) -> None:
        """Make a forward pass and, to train, its backward pass."""
        for call in calls:
            self.zero.fetch()
            LayerCall.dispatch(self, self.forward, call.forward, None)
        if not trains:
            return
        for call in reversed(calls):
            self.zero.fetch()
            LayerCall.dispatch(self, self.backward, call.backward, None)
            if any(instruction.op is Op.REDUCE for instruction in call.backward):
                self.zero.reduce(call.gather.layer, last=call is calls[0])


def len_of_chunk(instruction: Instruction, grid: Grid) -> int:
    return len(torch.empty(BATCH).tensor_split(grid.chunks)[instruction.chunk])


def sizes(rows: int) -> tuple[int, int]:
    return 12 * rows, 3 * rows


def initial_state(rows: int, device: str) -> State:
    """As the memory's `initial_state` on "meta": shapes."""
    return State(*(torch.empty(size, device="meta") for size in sizes(rows)))


class Case(NamedTuple):
    """What runs on the double."""

    grid: Grid
    dp: int = 1
    seed: int = 0
    slots: int = 3  # kernels of communicators that a GPU runs at once: as many as a rank has communicators
    queues: int = 99
    handoff: ModuleType = real_handoff
    shared: bool = False
    window: int | None = None  # layers that are gathered ahead; None: as many as the product sets
    steps: int = 2


@contextmanager
def put_in(module: ModuleType, **values: Any):
    """Replace names of a module for a while."""
    before = {name: getattr(module, name) for name in values}
    module.__dict__.update(values)
    try:
        yield
    finally:
        module.__dict__.update(before)


def play(case: Case) -> None:
    """Run steps of a forward and a backward pass and a validation. Raises Deadlock or Hazard."""
    grid, ranks = case.grid, case.dp * case.grid.sp
    machine = Machine(ranks, case.seed, case.slots, case.queues)
    fake = FakeDist(machine, case.shared)
    world = fake.communicator(("world",), range(ranks), "the world")
    edges = edges_of(fake, ranks, grid.sp)

    def host(gpu: GPU) -> None:
        rank = gpu.rank % grid.sp
        wire = case.handoff.Wire(*edges[gpu.rank], SimpleNamespace(type="cuda"))
        calls = layer_calls("wavefront", grid, rank, ARMT_ARROWS)
        memory = SimpleNamespace(memory=SimpleNamespace(initial_state=initial_state))
        model = SimpleNamespace(link=wire, model=SimpleNamespace(layers=[memory] * grid.layers))
        for step in range(case.steps):
            # Two accumulation steps and a validation, then one more step.
            for trains in (True, True, False) if step == 0 else (True,):
                torch.set_grad_enabled(trains)  # of this thread
                link = ScheduledLM.open_link(model, calls, 0 if trains else grid.layers, BATCH, grid.chunks)
                zero = Zero3(gpu, world, grid, case.window, trains)
                Rank(gpu, link, zero, grid).run(calls, trains)
            zero.meet()
        wire.drain()
        gpu.synchronize(gpu.compute.tail)

    with put_in(case.handoff, torch=FakeTorch(machine), dist=fake):
        machine.run(host)
