"""A test double of GPUs and NCCL: streams, memory and communicators of several ranks, on one virtual clock.

What it takes from CUDA, torch and NCCL:

* work of a stream runs in order, and waits for the events that the stream was told to wait for; the host does not;
* operations of a communicator run in the order of their calls, each on every rank; one that waits for its peer keeps
  its communicator waiting, and one of the `slots` for kernels of communicators that a GPU runs at once;
* streams share `queues` of the hardware (CUDA_DEVICE_MAX_CONNECTIONS), in which work starts in the order of its launch;
* a send needs the receive, a collective all ranks; two sends that meet, or two receives, wait for ever;
* memory that the host lets go is reused at once by the stream that it was taken on, unless it is recorded as used by
  another (`record_stream`) whose work is not over.

An operation that uses memory without being ordered after the one that wrote it, or that reuses memory too early, is
found whatever the delays are: each operation knows which ones are certain to come before it (`Operation.earlier`).

Hosts are threads of which one runs at a time; durations and pauses of hosts are drawn from a seed.
"""

import heapq
import itertools
import random
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple


class Deadlock(AssertionError):
    """Nothing can happen any more, and some rank is not done."""


class Hazard(AssertionError):
    """Memory is used by two operations in no certain order, or has not the expected content."""


class Over(BaseException):
    """Ends the thread of a host."""


class Block:
    """A piece of one GPU's memory. `uses` are those since the last write, which is the first of them."""

    def __init__(self) -> None:
        self.content: Any = None
        self.uses: list[tuple[Operation, bool]] = []


class Message(NamedTuple):
    """What an operation of a communicator does. kind: send, recv or all."""

    communicator: "Communicator"
    kind: str
    label: Any  # the peer of a send or receive, what a collective is for
    size: int = 0
    block: Block | None = None


class Operation:
    """Something that a stream does."""

    def __init__(self, stream: "Stream", name: str, seconds: float, message: Message | None = None):
        self.stream, self.name, self.seconds, self.message = stream, name, seconds, message
        self.bit = 1 << next(stream.gpu.numbers)
        self.earlier = 0  # the bits of all operations of this GPU that are certainly over when this one starts
        self.awaited: set[Operation] = set()
        self.followers: list[Operation] = []
        self.behind: Operation | None = None  # the next one in the same hardware queue
        self.blocked = False  # by the one before it there
        self.started = False
        self.hosts: list[Callable[[], None]] = []
        self.done = False
        self.effect: Callable[[], None] = lambda: None

    def after(self, other: "Operation | None") -> None:
        """Start only when `other` of this GPU is over."""
        if other is None:
            return
        self.earlier |= other.earlier | other.bit
        if not other.done:
            self.awaited.add(other)
            other.followers.append(self)


class Stream:
    """A CUDA stream; `tail` is the last operation that was put on it."""

    def __init__(self, gpu: "GPU", name: str = ""):
        self.gpu, self.name, self.tail = gpu, name, None
        self.free: list[tuple[Block, list[Operation]]] = []
        self.queue = next(gpu.streams) % gpu.queues

    def put(
        self,
        name: str,
        seconds: float = 0.0,
        *,
        reads: Sequence[Block] = (),
        writes: Sequence[Block] = (),
        message: Message | None = None,
        awaits: "Operation | None" = None,
    ) -> Operation:
        """Add an operation. Raises Hazard if it uses memory in no certain order with an earlier operation."""
        operation = Operation(self, name, seconds, message)
        operation.earlier = self.gpu.seen
        operation.after(self.tail)
        operation.after(awaits)
        for block in reads:
            self.check(operation, [use for use, writes_it in block.uses if writes_it])
            block.uses.append((operation, False))
        for block in writes:
            self.check(operation, [use for use, _ in block.uses])
            block.uses = [(operation, True)]
        self.tail = operation
        self.gpu.enqueue(operation)
        return operation

    def check(self, operation: Operation, others: Sequence[Operation]) -> None:
        """Raise Hazard unless all `others` are over when `operation` starts."""
        for other in others:
            if other is not operation and not operation.earlier & other.bit:
                raise Hazard(f"rank {self.gpu.rank}: {operation.name} does not wait for {other.name}")

    def wait_stream(self, other: "Stream") -> None:
        """As torch's: what comes next here waits for what is there now."""
        self.wait(other.tail)

    def wait(self, operation: Operation | None) -> None:
        """Let what comes next wait for an operation, as for an event."""
        if operation is not None:
            self.put("wait", awaits=operation)

    def take(self) -> Block:
        """Return memory: free memory of this stream, if there is any."""
        for place, (block, recorded) in enumerate(self.free):
            if all(operation.done for operation in recorded):
                for operation in recorded:
                    self.gpu.seen |= operation.earlier | operation.bit
                del self.free[place]
                return block
        return Block()


class Storage:
    """Memory as long as the host holds it."""

    def __init__(self, stream: Stream):
        self.stream, self.block = stream, stream.take()
        self.recorded: set[Stream] = set()
        self.kept_for: list[Operation] = []

    def __del__(self) -> None:
        tails = [stream.tail for stream in self.recorded if stream.tail is not None]
        self.stream.free.append((self.block, tails + self.kept_for))


class GPU:
    """One rank: its host, streams and memory."""

    def __init__(self, machine: "Machine", rank: int, slots: int, queues: int):
        self.machine, self.rank, self.slots, self.queues = machine, rank, slots, queues
        self.numbers, self.streams = itertools.count(), itertools.count()
        self.last: dict[int, Operation] = {}  # of each hardware queue
        self.seen = 0  # bits of the operations that the host knows to be over
        self.kernels: deque[Operation] = deque()  # those that wait for a slot
        self.compute = Stream(self, "compute")
        self.current = self.compute
        self.channels: dict[Communicator, Stream] = defaultdict(lambda: Stream(self, "NCCL"))
        self.turn = threading.Semaphore(0)
        self.doing = "the start"
        self.finished = False

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """Put work on `stream` in the block."""
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def call(self, message: Message, *, reads: Sequence[Block] = (), writes: Sequence[Block] = ()) -> Operation:
        """Put an operation on its communicator's stream, behind the work of the current one, as torch does."""
        channel = self.channels[message.communicator]
        name = f"{message.kind} {message.label} of {message.communicator.name}"
        seconds = self.machine.draw("network")
        self.pause()
        return channel.put(name, seconds, reads=reads, writes=writes, message=message, awaits=self.current.tail)

    def enqueue(self, operation: Operation) -> None:
        """Put an operation into the hardware queue of its stream, behind which it starts."""
        before = self.last.get(operation.stream.queue)
        self.last[operation.stream.queue] = operation
        if before is not None and not before.started:
            before.behind, operation.blocked = operation, True
        self.machine.at(0.0, lambda: self.consider(operation))

    def consider(self, operation: Operation) -> None:
        """Start an operation if nothing is to be waited for on this GPU; a kernel of NCCL needs a slot."""
        if operation.awaited or operation.blocked or operation.started:
            return
        operation.started = True
        if (behind := operation.behind) is not None:
            behind.blocked = False
            self.machine.at(0.0, lambda: self.consider(behind))
        if operation.message is None:
            self.machine.at(operation.seconds, lambda: self.end(operation))
            return
        self.kernels.append(operation)
        self.fill_slots()

    def fill_slots(self) -> None:
        """Start kernels while there are slots."""
        while self.kernels and self.slots:
            self.slots -= 1
            kernel = self.kernels.popleft()
            assert kernel.message is not None
            kernel.message.communicator.launch(self.rank, kernel)

    def end(self, operation: Operation) -> None:
        """Let those go on that wait for an operation."""
        operation.effect()
        operation.done = True
        for follower in operation.followers:
            follower.awaited.discard(operation)
            self.consider(follower)
        for wake in operation.hosts:
            wake()
        if operation.message is not None:
            self.slots += 1
            self.fill_slots()

    # --- called by the host

    def pause(self) -> None:
        """Let the host be slow, now and then."""
        if self.machine.random.random() < 0.5:
            self.machine.at(self.machine.draw("host"), self.wake)
            self.sleep()

    def synchronize(self, operation: Operation | None) -> None:
        """Let the host wait for an operation."""
        if operation is None:
            return
        if not operation.done:
            operation.hosts.append(self.wake)
            self.sleep()
        self.query(operation)

    def query(self, operation: Operation) -> bool:
        """Let the host look whether an operation is over."""
        if operation.done:
            self.seen |= operation.earlier | operation.bit
        return operation.done

    def wake(self) -> None:
        """Give the host its turn, until it sleeps."""
        self.machine.running = self
        self.turn.release()
        self.machine.turn.acquire()

    def sleep(self) -> None:
        """Give the turn back."""
        self.machine.turn.release()
        self.turn.acquire()
        if self.machine.over:
            raise Over


class Communicator:
    """A communicator of NCCL: on every rank it has one operation under way."""

    def __init__(self, machine: "Machine", ranks: Sequence[int], name: str):
        self.machine, self.ranks, self.name = machine, tuple(ranks), name
        self.under_way: dict[int, Operation] = {}

    def launch(self, rank: int, operation: Operation) -> None:
        """Start the operation of one rank, and end those of all that it needs if they are there."""
        self.under_way[rank] = operation
        message = operation.message
        assert message is not None
        if message.kind == "all":
            self.collect(message)
            return
        peer = self.under_way.get(message.label)
        theirs = peer and peer.message
        if theirs and theirs.label == rank and {message.kind, theirs.kind} == {"send", "recv"}:
            if message.size != theirs.size:
                raise Hazard(f"{self.name}: {message.size} elements meet {theirs.size}")
            self.end({rank: operation, message.label: peer})

    def collect(self, message: Message) -> None:
        """End a collective that all ranks have come to."""
        if len(self.under_way) < len(self.ranks):
            return
        labels = {rank: operation.name for rank, operation in self.under_way.items()}
        if len(set(labels.values())) > 1:
            raise Hazard(f"collectives in different orders: {labels}")
        self.end(dict(self.under_way))

    def end(self, operations: dict[int, Operation]) -> None:
        """End operations that belong together, after the time that they take."""
        for rank in operations:
            del self.under_way[rank]
        seconds = max(operation.seconds for operation in operations.values())

        def end() -> None:
            ends = {operation.message.kind: operation.message.block for operation in operations.values()}
            if "recv" in ends:
                ends["recv"].content = ends["send"].content
            for operation in operations.values():
                operation.stream.gpu.end(operation)

        self.machine.at(seconds, end)


class Machine:
    """All ranks, and the clock."""

    def __init__(self, ranks: int, seed: int, slots: int = 99, queues: int = 99):
        self.random = random.Random(seed)
        # Some seeds have slow hosts, others slow networks or slow computing.
        self.scales = {kind: 10 ** self.random.uniform(-2, 2) for kind in ("host", "network", "compute")}
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.count, self.now_s = itertools.count(), 0.0
        self.turn = threading.Semaphore(0)
        self.over = False
        self.failure: BaseException | None = None
        self.gpus = [GPU(self, rank, slots, queues) for rank in range(ranks)]
        self.running = self.gpus[0]

    def draw(self, kind: str) -> float:
        """Draw a duration: none, a usual one, or now and then a very long one. kind: a key of `scales`."""
        return self.random.choice((0.0, 1.0, 1.0, 1.0, 30.0)) * self.random.expovariate(1.0) * self.scales[kind]

    def at(self, after_s: float, event: Callable[[], None]) -> None:
        """Let an event happen."""
        heapq.heappush(self.events, (self.now_s + after_s, next(self.count), event))

    def run(self, host: Callable[[GPU], None]) -> None:
        """Run `host` on every rank to the end of all work. Raises Deadlock, Hazard, and what a host raises."""
        threads = [threading.Thread(target=self.live, args=(gpu, host), daemon=True) for gpu in self.gpus]
        for gpu, thread in zip(self.gpus, threads, strict=True):
            thread.start()
            self.at(self.draw("host"), gpu.wake)
        try:
            while self.events and self.failure is None:
                self.now_s, _, event = heapq.heappop(self.events)
                event()
            if self.failure is not None:
                raise self.failure
            self.check_done()
        finally:
            self.over = True
            for gpu, thread in zip(self.gpus, threads, strict=True):
                gpu.turn.release()
                thread.join()

    def live(self, gpu: GPU, host: Callable[[GPU], None]) -> None:
        """Be the thread of one host."""
        gpu.turn.acquire()
        try:
            if not self.over:
                host(gpu)
                gpu.finished = True
        except Over:
            return
        except BaseException as error:
            self.failure = error
        if not self.over:
            self.turn.release()

    def check_done(self) -> None:
        """Raise Deadlock where a host or a kernel still waits."""
        waits = [f"the host of rank {gpu.rank} in {gpu.doing}" for gpu in self.gpus if not gpu.finished]
        for gpu in self.gpus:
            for communicator, channel in gpu.channels.items():
                if (kernel := communicator.under_way.get(gpu.rank)) is not None:
                    waits.append(f"rank {gpu.rank} in {kernel.name}")
                elif channel.tail is not None and not channel.tail.done:
                    waits.append(f"rank {gpu.rank} before {channel.tail.name}")
        if waits:
            raise Deadlock("; ".join(waits))
