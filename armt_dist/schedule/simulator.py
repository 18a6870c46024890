"""Simulate what a schedule costs on all ranks of one sp group, without a GPU.

It takes the programs that the executor runs, has them checked (`checker.py`) and runs every rank against `Costs`.
Clocks are max-plus: an instruction starts when its rank is free and what it waits for has arrived, so the order in
which ranks are visited does not matter.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from .checker import ScheduleError, check_collectives, verify_program
from .grid import ARMT_ARROWS, Grid, block_owner, block_segments, prefetch_window, source_layer, target_layer
from .program import COMPUTE, Instruction, Op, backward_program, build_program, fit_grid
from .timeline import SENDER, Event, waits_s
from .weight_groups import left_over

COLLECTIVES = (Op.GATHER, Op.REDUCE)


class Costs(NamedTuple):
    """Durations and sizes. Defaults: free communication, the usual 1 : 1 : 2 of forward, re-run and backward."""

    cell_s: float = 1.0
    """Forward time of one cell (segment, layer) for the whole micro-batch; a chunk takes cell_s / chunks."""
    rerun_ratio: float = 1.0
    """Time to run a cell again, as a multiple of cell_s."""
    keep: float = 0.0
    """Share of the cells that keep their graphs, and are not run again."""
    backward_ratio: float = 2.0
    """Backward time of a cell without the re-run, as a multiple of cell_s."""
    weight_ratio: float = 0.0
    """The part of backward_ratio that WEIGHT can carry out; 0: BACK leaves nothing out."""
    gather_s: float = 0.0
    reduce_s: float = 0.0
    latency_s: float = 0.0
    """Time of one hand-off on top of state_bytes / chunks / bytes_per_s."""
    state_bytes: float = 0.0
    bytes_per_s: float = math.inf
    prefetch_layers: int | None = None
    """How many layers ahead a rank issues its gathers; None for as many as the grid needs."""
    reduce_blocks: bool = False
    """Whether a rank waits until all ranks have joined its reduction, as with gloo."""


FREE = Costs()


class Report(NamedTuple):
    """Results of a simulation."""

    makespan_s: float
    bubble: float
    """Share of all ranks' time in which they do not compute."""
    exposed_s: tuple[float, ...]
    """Waits of each rank for a state or its gradient, except for the first of each direction."""
    skew_s: tuple[float, ...]
    """Those first waits of each rank, while the pipeline fills."""
    gather_wait_s: tuple[float, ...]
    """Waits of each rank for gathers."""
    peak_live_layers: int
    """Most layers whole (or being gathered) on any rank at a time."""
    peak_live_states: int
    """Most states and state gradients on any rank at a time, from RECV or RUN until used or taken by the next rank."""
    events: tuple[Event, ...]


def issue_order(program: Sequence[Instruction], window: int) -> list[tuple[int, int]]:
    """Return a rank's collectives in the order of issue, as (index that triggers it, index of the collective).

    A gather is issued when the rank reaches the gather `window` layers before it.
    """
    gathers = [index for index, instruction in enumerate(program) if instruction.op is Op.GATHER]
    triggers = {index: gathers[max(0, n - window)] for n, index in enumerate(gathers)}
    own = [index for index, instruction in enumerate(program) if instruction.op in COLLECTIVES]
    return sorted((triggers.get(index, index), index) for index in own)


class Clock:
    """One rank's place in its program, its time, and the changes of what it holds."""

    def __init__(self, rank: int, program: Sequence[Instruction], order: list[tuple[int, int]]):
        self.rank, self.program = rank, program
        self.index, self.now_s, self.issued = 0, 0.0, 0
        self.order, self.slots = order, {index: place for place, (_, index) in enumerate(order)}
        # (change, layer), and (time, change) of the number of states.
        self.layers: list[tuple[int, int]] = []
        self.states: list[tuple[float, int]] = []


class Group:
    """All ranks of a simulation: their clocks, the queue of collectives and the states in transfer."""

    def __init__(self, grid: Grid, programs: Sequence[Sequence[Instruction]], costs: Costs, arrows: Sequence[str]):
        window = prefetch_window(grid) if costs.prefetch_layers is None else costs.prefetch_layers
        orders = [issue_order(program, window) for program in programs]
        check_collectives(programs, orders)
        self.grid, self.costs, self.arrows = grid, costs, arrows
        self.sizes = [len(segments) for segments in block_segments(grid)]
        self.clocks = [Clock(*each) for each in zip(range(grid.sp), programs, orders, strict=True)]
        self.joined: list[list[float]] = [[] for _ in orders[0]]
        self.collected_s: list[float] = []
        self.arrived_s: dict[Instruction, float] = {}
        self.link_free_s: dict[tuple, float] = defaultdict(float)
        self.events: list[Event] = []

    def run(self) -> None:
        """Advance every rank to the end of its program. Raises ScheduleError on a deadlock."""
        unfinished = list(self.clocks)
        while unfinished:
            moved = False
            for clock in unfinished:
                while clock.index < len(clock.program) and self.step(clock):
                    clock.index, moved = clock.index + 1, True
            unfinished = [clock for clock in unfinished if clock.index < len(clock.program)]
            if unfinished and not moved:
                raise self.deadlock(unfinished)

    def deadlock(self, stuck: list[Clock]) -> ScheduleError:
        """Return an error that names the instruction which holds up a state that another rank waits for.

        Collectives alone cannot be the cause: their order is checked by now.
        """
        waits = "; ".join(f"rank {clock.rank} in {clock.program[clock.index]}" for clock in stuck[:8])
        culprit = next((clock for clock in stuck if clock.program[clock.index].op in SENDER), stuck[0])
        followed: set[int] = set()
        while (op := culprit.program[culprit.index].op) in SENDER and culprit.rank not in followed:
            followed.add(culprit.rank)
            culprit = self.clocks[(culprit.rank + SENDER[op]) % self.grid.sp]
        return ScheduleError(culprit.rank, culprit.index, culprit.program[culprit.index], f"deadlock; waiting: {waits}")

    def step(self, clock: Clock) -> bool:
        """Carry out one instruction; return False when what it waits for has not happened yet."""
        instruction = clock.program[clock.index]
        self.issue(clock)
        op, until_s = instruction.op, clock.now_s
        if op is Op.GATHER or (op is Op.REDUCE and self.costs.reduce_blocks):
            place = clock.slots[clock.index]
            if place >= len(self.collected_s):
                return False
            until_s = self.collected_s[place]
        elif op in SENDER:
            if instruction not in self.arrived_s:
                return False
            until_s = self.arrived_s[instruction]
        elif op in (Op.SEND, Op.SEND_GRAD):
            self.send(clock, instruction)
        elif op in COMPUTE:
            until_s += self.compute_s(instruction)
        elif op is Op.RELEASE:
            clock.layers.append((-1, instruction.layer))
        if until_s > clock.now_s:
            self.events.append(Event(clock.rank, instruction, clock.now_s, until_s))
            clock.now_s = until_s
        self.count_states(clock, instruction)
        return True

    def issue(self, clock: Clock) -> None:
        """Join the collectives that this place in the program triggers."""
        while clock.issued < len(clock.order) and clock.order[clock.issued][0] <= clock.index:
            instruction = clock.program[clock.order[clock.issued][1]]
            self.joined[clock.issued].append(clock.now_s)
            clock.issued += 1
            if instruction.op is Op.GATHER:
                clock.layers.append((1, instruction.layer))
            place = len(self.collected_s)
            while place < len(self.joined) and len(self.joined[place]) == self.grid.sp:
                # One communicator: collectives run one after another, in the order of issue.
                start_s = max(self.joined[place] + self.collected_s[-1:])
                op = clock.program[clock.order[place][1]].op
                self.collected_s.append(start_s + (self.costs.gather_s if op is Op.GATHER else self.costs.reduce_s))
                place += 1

    def compute_s(self, instruction: Instruction) -> float:
        """Return the time of a RUN, RERUN, BACK or WEIGHT."""
        costs, cells = self.costs, self.sizes[instruction.block]
        again = (1 - costs.keep) * cells
        weights = left_over(cells) * costs.weight_ratio
        share = {
            Op.RUN: cells,
            Op.RERUN: min(again, 1) * costs.rerun_ratio,
            Op.BACK: cells * costs.backward_ratio + max(again - 1, 0) * costs.rerun_ratio - weights,
            Op.WEIGHT: weights,
        }
        return share[instruction.op] * costs.cell_s / self.grid.chunks

    def send(self, clock: Clock, instruction: Instruction) -> None:
        """Start the transfer of a state without waiting; messages of one link follow one another."""
        receive, to = self.received_as(instruction)
        if to == clock.rank:
            self.arrived_s[receive] = clock.now_s
            return
        link = (clock.rank, to, instruction.op)
        start_s = max(clock.now_s, self.link_free_s[link])
        self.link_free_s[link] = start_s + self.costs.state_bytes / self.grid.chunks / self.costs.bytes_per_s
        self.arrived_s[receive] = self.link_free_s[link] + self.costs.latency_s

    def received_as(self, send: Instruction) -> tuple[Instruction, int]:
        """Return the receive that matches a send, and its rank."""
        forward = send.op is Op.SEND
        layer = (target_layer if forward else source_layer)(self.arrows, send.layer, self.grid.layers)
        assert layer is not None, f"{send}: no arrow leads from this layer"
        block = send.block + (1 if forward else -1)
        op = Op.RECV if forward else Op.RECV_GRAD
        return Instruction(op, layer, block, send.chunk), block_owner(self.grid, block)

    def count_states(self, clock: Clock, instruction: Instruction) -> None:
        """Count the states on ranks: a unit's outgoing state stays on its rank until the next rank takes it."""
        op, layer, block, _ = instruction
        if op in SENDER:
            sender = self.clocks[block_owner(self.grid, block + SENDER[op])]
            sender.states.append((clock.now_s, -1))
            clock.states.append((clock.now_s, 1))
        elif op in (Op.RUN, Op.BACK):
            enters = block > 0 and source_layer(self.arrows, layer, self.grid.layers) is not None
            leaves = block < len(self.sizes) - 1 and target_layer(self.arrows, layer, self.grid.layers) is not None
            clock.states.append((clock.now_s, leaves - enters if op is Op.RUN else enters - leaves))


def peak_layers(clock: Clock) -> int:
    """Return the most layers held at a time; one gathered ahead for the backward while still live counts once."""
    held: Counter[int] = Counter()
    peak = 0
    for change, layer in clock.layers:
        held[layer] += change
        held += Counter()
        peak = max(peak, len(held))
    return peak


def peak_states(clock: Clock) -> int:
    """Return the most states held at a time; at any one instant, states are freed before others are taken."""
    total = peak = 0
    for _, change in sorted(clock.states):
        total += change
        peak = max(peak, total)
    return peak


def simulate(
    grid: Grid,
    programs: Sequence[Sequence[Instruction]],
    costs: Costs = FREE,
    arrows: Sequence[str] = ARMT_ARROWS,
) -> Report:
    """Run the programs of all sp ranks (forward alone, or forward and backward) against `costs`.

    Raises ScheduleError naming rank, position and instruction for a wrong order, a cell missing or run twice,
    collectives in different orders on different ranks, or a deadlock.
    """
    if len(programs) != grid.sp:
        raise ValueError(f"{len(programs)} programs for sp={grid.sp} ranks; give one per rank")
    for rank, program in enumerate(programs):
        verify_program(grid, program, rank, arrows)
    group = Group(grid, programs, costs, arrows)
    group.run()
    makespan_s = max([clock.now_s for clock in group.clocks] + group.collected_s)
    busy_s = sum(event.end_s - event.start_s for event in group.events if event.instruction.op in COMPUTE)
    exposed, skew, gather = waits_s(group.events, grid.sp)
    return Report(
        makespan_s,
        1 - busy_s / (grid.sp * makespan_s),
        tuple(exposed),
        tuple(skew),
        tuple(gather),
        max(map(peak_layers, group.clocks)),
        max(map(peak_states, group.clocks)),
        tuple(group.events),
    )


def simulate_step(
    name: str,
    grid: Grid,
    costs: Costs = FREE,
    arrows: Sequence[str] = ARMT_ARROWS,
) -> Report:
    """Simulate forward and backward of one sequence under schedule `name`, with a WEIGHT if it has a cost.

    Raises ConfigError as `fit_grid` does.
    """
    fitted = fit_grid(name, grid, arrows)
    forwards = [build_program(name, grid, rank, arrows) for rank in range(grid.sp)]
    weights = costs.weight_ratio > 0
    return simulate(fitted, [forward + backward_program(forward, weights) for forward in forwards], costs, arrows)
