"""Check programs before they run: one rank's order and completeness, and the order of collectives across ranks."""

from collections import Counter
from collections.abc import Iterator, Sequence

from .grid import ARMT_ARROWS, Grid, rank_blocks, source_layer, target_layer
from .program import COMPUTE, Instruction, Op, backward_program, wavefront

ONCE = (Op.RECV, Op.RUN, Op.SEND, Op.RERUN, Op.RECV_GRAD, Op.BACK, Op.SEND_GRAD, Op.WEIGHT, Op.REDUCE)
"""Instructions that a correct pair of programs has exactly once; layers may be gathered any number of times."""


class ScheduleError(ValueError):
    """A program that cannot run: a bug, not a user's mistake. Names rank, position and instruction."""

    def __init__(self, rank: int, index: int, instruction: Instruction, reason: str):
        super().__init__(f"rank {rank}, instruction {index}, {instruction}: {reason}")
        self.rank, self.index, self.instruction = rank, index, instruction


def requires(
    grid: Grid, instruction: Instruction, rank: int, arrows: Sequence[str], weights: bool
) -> Iterator[Instruction]:
    """Yield the instructions of the same rank that must come before `instruction`, apart from gathers."""
    op, layer, block, chunk = instruction
    top, last = grid.layers - 1, grid.sp * grid.rounds - 1
    receives = block > 0 and source_layer(arrows, layer, grid.layers) is not None
    returns = block < last and target_layer(arrows, layer, grid.layers) is not None
    if op is Op.RUN:
        yield from [instruction._replace(layer=layer - 1)] * (layer > 0)
        yield from [instruction._replace(op=Op.RECV)] * receives
    elif op in (Op.SEND, Op.RERUN):
        yield instruction._replace(op=Op.RUN)
    elif op is Op.BACK:
        yield instruction._replace(op=Op.RERUN)
        yield from [instruction._replace(layer=layer + 1)] * (layer < top)
        yield from [instruction._replace(op=Op.RECV_GRAD)] * returns
    elif op in (Op.SEND_GRAD, Op.WEIGHT):
        yield instruction._replace(op=Op.BACK)
    elif op is Op.REDUCE:
        gradients = Op.WEIGHT if weights else Op.BACK
        for own in rank_blocks(grid, rank):
            yield from (Instruction(gradients, layer, own, c) for c in range(grid.chunks))


def verify_program(grid: Grid, program: Sequence[Instruction], rank: int, arrows: Sequence[str] = ARMT_ARROWS) -> None:
    """Raise ScheduleError at the first fault in one rank's program.

    Faults: an instruction of another rank, out of order, missing or doubled, or work on a layer that is not gathered.
    """
    expected = wavefront(grid, rank, arrows)
    weights = any(instruction.op is Op.WEIGHT for instruction in program)
    if any(instruction.op is Op.BACK for instruction in program):
        expected += backward_program(expected, weights)
    expected_set = set(expected)
    seen: set[Instruction] = set()
    live: set[int] = set()
    for index, instruction in enumerate(program):
        op, layer = instruction.op, instruction.layer
        fault = None
        if instruction not in expected_set:
            fault = f"is not among the instructions of rank {rank} in {grid}"
        elif op in ONCE and instruction in seen:
            fault = "comes twice"
        elif (op is Op.GATHER) == (layer in live) and op in (Op.GATHER, Op.RELEASE, *COMPUTE):
            fault = f"layer {layer} is {'already' if layer in live else 'not'} gathered"
        else:
            missing = [other for other in requires(grid, instruction, rank, arrows, weights) if other not in seen]
            fault = f"needs {missing[0]} before it" if missing else None
        if fault:
            raise ScheduleError(rank, index, instruction, fault)
        seen.add(instruction)
        live = live | {layer} if op is Op.GATHER else live - {layer} if op is Op.RELEASE else live
    for instruction in expected:
        if instruction not in seen or (instruction.op is Op.RELEASE and instruction.layer in live):
            raise ScheduleError(rank, len(program), instruction, "is missing")


def check_collectives(programs: Sequence[Sequence[Instruction]], orders: Sequence[list[tuple[int, int]]]) -> None:
    """Raise ScheduleError where a rank issues a different collective from most ranks."""
    for place in range(max(map(len, orders))):
        found: list[tuple[int, Instruction | None]] = []
        for program, order in zip(programs, orders, strict=True):
            issued = place < len(order)
            index = order[place][1] if issued else len(program)
            found.append((index, program[index] if issued else None))
        usual = Counter(collective(instruction) for _, instruction in found).most_common(1)[0][0]
        for rank, (index, instruction) in enumerate(found):
            if collective(instruction) != usual:
                other = "no collective" if usual is None else f"{usual[0]} {usual[1]}"
                # A rank whose collectives have ended is shown the one that it lacks.
                shown = instruction or Instruction(*(usual or (Op.GATHER, 0)), rank)
                raise ScheduleError(rank, index, shown, f"is collective {place} here, but {other} on the other ranks")


def collective(instruction: Instruction | None) -> tuple[Op, int] | None:
    """Return what must be the same on all ranks: operation and layer."""
    return None if instruction is None else (instruction.op, instruction.layer)
