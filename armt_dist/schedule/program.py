"""The order of work on one sequence, as data: which rank runs which cell when.

A sequence is a grid of cells (segment s, layer l). A cell needs the hidden states of (s, l-1) and a memory state
from segment s-1 (`Arrow` says of which layer); any order that respects the two is valid. The segments are cut
into sp * rounds consecutive blocks, block b on rank b % sp; a unit of work is one (layer, block, chunk), a chunk
being a slice of the micro-batch.

    wavefront       layer by layer over the block, the state handed to the next rank after each unit
    layer_major     the wavefront of one rank with one block: every layer is gathered once
    segment_major   blocks of one segment: every layer is gathered once per segment (the only order that RMT allows)

With U = rounds * layers * chunks units per rank and the last rank starting sp - 1 units late, the efficiency is at
most U / (U + sp - 1). Nothing here imports torch: planner, tests, executor and timeline share these objects.

Letters: S segments, L layers, U units of work per rank.
"""

from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from ..config import ConfigError
from .grid import ARMT_ARROWS, Arrow, Grid, check_grid, rank_blocks, source_layer, target_layer


class Op(StrEnum):
    """What a rank does in one step. ZeRO-3's hooks around a layer's call carry out GATHER, REDUCE and RELEASE."""

    GATHER = "GATHER"
    """All ranks together make the layer's parameters whole."""
    RECV = "RECV"
    """Wait for the state of block - 1; the first block has none."""
    RUN = "RUN"
    """Forward of one unit: the block's segments through the layer, in order."""
    SEND = "SEND"
    """Hand the state to block + 1 without waiting; the last block has none."""
    RELEASE = "RELEASE"
    """Drop the layer's gathered parameters."""
    RERUN = "RERUN"
    """Recompute the graph of the block's last cell; needs no gradient, so it fills the wait for one."""
    RECV_GRAD = "RECV_GRAD"
    """Wait for the state's gradient from block + 1."""
    BACK = "BACK"
    """Backward of one unit, segments in reverse; re-runs every cell but the last."""
    SEND_GRAD = "SEND_GRAD"
    """Hand the incoming state's gradient to block - 1."""
    WEIGHT = "WEIGHT"
    """Weight gradients of one unit, where BACK leaves them out: no other rank waits for them."""
    REDUCE = "REDUCE"
    """All ranks together reduce-scatter the layer's gradients, once per step."""


class Instruction(NamedTuple):
    """One step of one rank. `chunk` is -1 where it does not apply. Prints as ``RUN 3.0 b1`` (layer.chunk, block)."""

    op: Op
    layer: int
    block: int
    chunk: int = -1

    def __str__(self) -> str:
        return f"{self.op} {self.layer}{'' if self.chunk < 0 else f'.{self.chunk}'} b{self.block}"


def wavefront(grid: Grid, rank: int, arrows: Sequence[str] = ARMT_ARROWS) -> list[Instruction]:
    """Build the forward program of `rank`: per round and layer GATHER, for each chunk RECV, RUN, SEND, then RELEASE."""
    last = grid.sp * grid.rounds - 1
    program = []
    for block in rank_blocks(grid, rank):
        for layer in range(grid.layers):
            program.append(Instruction(Op.GATHER, layer, block))
            for chunk in range(grid.chunks):
                if block > 0 and source_layer(arrows, layer, grid.layers) is not None:
                    program.append(Instruction(Op.RECV, layer, block, chunk))
                program.append(Instruction(Op.RUN, layer, block, chunk))
                if block < last and target_layer(arrows, layer, grid.layers) is not None:
                    program.append(Instruction(Op.SEND, layer, block, chunk))
            program.append(Instruction(Op.RELEASE, layer, block))
    return program


MIRROR = {
    Op.RELEASE: (Op.GATHER,),
    Op.SEND: (Op.RECV_GRAD,),
    Op.RUN: (Op.RERUN, Op.BACK, Op.WEIGHT),
    Op.RECV: (Op.SEND_GRAD,),
    Op.GATHER: (Op.REDUCE, Op.RELEASE),
}
"""The backward instructions that take the place of a forward one when the list is reversed."""
HOISTED = {Op.RERUN: Op.RECV_GRAD, Op.SEND_GRAD: Op.WEIGHT}
"""Instructions that come before the one that reversing puts before them: a re-run needs no gradient from the next
block, and the previous block needs no weight gradients."""


def backward_program(forward: Sequence[Instruction], weights: bool = False) -> list[Instruction]:
    """Build the backward program by reversing the forward one: a unit becomes RERUN, RECV_GRAD, BACK, SEND_GRAD.

    weights: whether BACK leaves weight gradients to a WEIGHT of their own, after SEND_GRAD. A layer is reduced once,
    after the rank's first block (its last contribution), and after dState has been sent.
    """
    first = min(instruction.block for instruction in forward)
    program: list[Instruction] = []
    for instruction in reversed(forward):
        for op in MIRROR[instruction.op]:
            if (op is Op.REDUCE and instruction.block != first) or (op is Op.WEIGHT and not weights):
                continue
            hoist = bool(program) and program[-1].op is HOISTED.get(op)
            program.insert(len(program) - hoist, instruction._replace(op=op))
    return program


class Schedule(NamedTuple):
    """A row of the table of schedules."""

    fit: Callable[[Grid], Grid]  # cuts the grid into the schedule's blocks
    arrows: tuple[Arrow, ...]  # that the schedule respects


def _one_rank(name: str, grid: Grid) -> None:
    """Raise ConfigError for more than one rank per sequence."""
    if grid.sp > 1:
        raise ConfigError(f"sp={grid.sp}: schedule={name} runs a sequence on one rank; use sp=1 or schedule=wavefront")


def _one_block(grid: Grid) -> Grid:
    """Return the grid if it has one block, else raise ConfigError."""
    _one_rank("layer_major", grid)
    if grid.rounds > 1:
        raise ConfigError(f"rounds={grid.rounds}: schedule=layer_major has one block; use rounds=1")
    return grid


def _block_per_segment(grid: Grid) -> Grid:
    """Cut the grid into one block per segment. Raises ConfigError for any other number of rounds but 1."""
    _one_rank("segment_major", grid)
    if grid.rounds not in (1, grid.segments):
        raise ConfigError(f"rounds={grid.rounds}: schedule=segment_major has a block per segment; leave out rounds")
    return grid._replace(rounds=grid.segments)


SCHEDULES = {
    "wavefront": Schedule(lambda grid: grid, (Arrow.SAME_LAYER,)),
    "layer_major": Schedule(_one_block, (Arrow.SAME_LAYER,)),
    "segment_major": Schedule(_block_per_segment, (Arrow.SAME_LAYER, Arrow.LAST_LAYER)),
}


def fit_grid(name: str, grid: Grid, arrows: Sequence[str]) -> Grid:
    """Cut the grid as schedule `name` does, into the blocks of its program (segment_major: one per segment).

    `arrows` are those that the memory kind declares, values of `Arrow`. Raises ConfigError for an unknown schedule, one
    that an arrow forbids, or a grid that it cannot run.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"schedule={name}: unknown; use one of {', '.join(SCHEDULES)}")
    for arrow in arrows:
        if arrow in SCHEDULES[name].arrows:
            continue
        allowed = [other for other, row in SCHEDULES.items() if arrow in row.arrows]
        raise ConfigError(
            f"schedule={name}: forbidden for a memory whose state comes from the {arrow.replace('_', ' ')} of the "
            f"previous segment; use schedule={' or '.join(allowed)}"
        )
    check_grid(grid)
    return SCHEDULES[name].fit(grid)


def default_schedule(arrows: Sequence[str]) -> str:
    """Return the first schedule of the table that `arrows` allow."""
    return next(name for name, row in SCHEDULES.items() if set(arrows) <= set(row.arrows))


def build_program(name: str, grid: Grid, rank: int, arrows: Sequence[str] = ARMT_ARROWS) -> list[Instruction]:
    """Build the forward program of `rank` under schedule `name`; `backward_program` derives the other half.

    Raises ConfigError as `fit_grid` does.
    """
    return wavefront(fit_grid(name, grid, arrows), rank, arrows)


def segment_major(grid: Grid, rank: int = 0, arrows: Sequence[str] = ARMT_ARROWS) -> list[Instruction]:
    """Build the program that takes one segment at a time through all layers (the authors' loop)."""
    return build_program("segment_major", grid, rank, arrows)


def layer_major(grid: Grid, rank: int = 0) -> list[Instruction]:
    """Build the program of each layer over all segments, then the next: the wavefront of one rank and one round."""
    return build_program("layer_major", grid, rank)


class Call(NamedTuple):
    """The instructions of one call of a layer, in each direction those from its GATHER to the next one.

    `backward` ends with the GATHER that follows, because ZeRO-3's hooks carry it out before the next call begins.
    """

    gather: Instruction
    forward: tuple[Instruction, ...]
    backward: tuple[Instruction, ...]


HANDED_ON = (Op.RECV, Op.SEND)


def layer_calls(name: str, grid: Grid, rank: int, arrows: tuple[str, ...], weights: bool = False) -> tuple[Call, ...]:
    """Cut the program of `rank` into layer calls, in forward order; weights: as `backward_program`.

    A state that comes from the last layer is hidden states, so it goes from call to call in autograd's own graph.
    """
    fitted = fit_grid(name, grid, arrows)
    # Blocks of any length have the same program.
    return cut_calls(name, fitted._replace(segments=fitted.sp * fitted.rounds), rank, arrows, weights)


# Programs of RMT grow with the length: 27 MB for 1,024 segments of 32 layers. So those of two lengths are kept, such as
# a training batch's and a validation's.
@lru_cache(maxsize=2)
def cut_calls(name: str, grid: Grid, rank: int, arrows: tuple[str, ...], weights: bool) -> tuple[Call, ...]:
    """Return `layer_calls` of a grid with a segment in each block."""
    program = build_program(name, grid, rank, arrows)
    if Arrow.SAME_LAYER not in arrows:
        program = [instruction for instruction in program if instruction.op not in HANDED_ON]
    backward: list[list[Instruction]] = []
    for instruction in backward_program(program, weights):
        if instruction.op is Op.GATHER:
            if backward:
                backward[-1].append(instruction)
            backward.append([])
        elif instruction.op is not Op.RELEASE:
            backward[-1].append(instruction)
    forward = [tuple(group) for _, group in groupby(program, key=lambda i: (i.block, i.layer))]
    return tuple(Call(f[0], f[1:], tuple(b)) for f, b in zip(forward, reversed(backward), strict=True))


COMPUTE = (Op.RUN, Op.RERUN, Op.BACK, Op.WEIGHT)
