"""The order of work on one sequence, as data: who runs which cell when. `timeline.py` simulates and draws it.

A sequence is a grid of cells (segment s, layer l). A cell needs the hidden states of (s, l-1) and a memory state
from segment s-1 (`Arrow`: of which layer); any order that respects the two is valid. The segments are cut
into sp * rounds consecutive blocks, block b on rank b % sp; a unit of work is one (layer, block, chunk), a chunk
being a slice of the micro-batch.

    wavefront       layer by layer over the block, the state handed to the next rank after each unit
    layer_major     the wavefront of one rank with one block: every layer is gathered once
    segment_major   blocks of one segment: every layer is gathered once per segment (all that RMT allows)

With U = rounds * layers * chunks units a rank and the last rank starting sp - 1 units late, the efficiency is at
most U / (U + sp - 1). Nothing here imports torch: planner, tests, executor and timeline share these objects.

Letters: S segments, L layers, U units of work a rank.
"""

import math
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import NamedTuple

from ..config import ConfigError


class Arrow(StrEnum):
    """Where the state that cell (s, l) needs comes from; the hidden states of (s, l-1) it needs in any case."""

    SAME_LAYER = "same_layer"
    """(s-1, l): ARMT, sliding window."""
    LAST_LAYER = "last_layer"
    """(s-1, L-1): RMT. The state enters at layer 0 and leaves from the last layer."""


ARMT_ARROWS = (Arrow.SAME_LAYER,)
RMT_ARROWS = (Arrow.LAST_LAYER,)


def source_layer(arrows: Sequence[str], layer: int, layers: int) -> int | None:
    """The layer of segment s-1 whose state enters cell (s, layer), or None where none enters."""
    if Arrow.SAME_LAYER in arrows:
        return layer
    return layers - 1 if layer == 0 else None


def target_layer(arrows: Sequence[str], layer: int, layers: int) -> int | None:
    """The layer of segment s+1 that the state leaving cell (s, layer) enters, or None where none leaves."""
    if Arrow.SAME_LAYER in arrows:
        return layer
    return 0 if layer == layers - 1 else None


class Op(StrEnum):
    """What a rank does next. GATHER, REDUCE and RELEASE are carried out by ZeRO-3's hooks around a layer's call."""

    GATHER = "GATHER"
    """All ranks together make the layer's parameters whole."""
    RECV = "RECV"
    """Wait for the state of block - 1; the first block has none."""
    RUN = "RUN"
    """Forward of one unit: the block's segments through the layer, in order."""
    SEND = "SEND"
    """Hand the state to block + 1 without waiting; the last block has none."""
    RELEASE = "RELEASE"
    """Drop the layer's whole parameters."""
    RERUN = "RERUN"
    """Recompute the graph of the block's last cell; needs no gradient, so it fills the wait for one."""
    RECV_GRAD = "RECV_GRAD"
    """Wait for the state's gradient from block + 1."""
    BACK = "BACK"
    """Backward of one unit, segments in reverse; re-runs every cell but the last."""
    SEND_GRAD = "SEND_GRAD"
    """Hand the incoming state's gradient to block - 1."""
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


class Grid(NamedTuple):
    """The cells of one sequence and how they are spread: sp ranks, rounds blocks a rank, chunks of the micro-batch."""

    segments: int
    layers: int
    sp: int = 1
    rounds: int = 1
    chunks: int = 1

    @property
    def units(self) -> int:
        """Units of work of one rank in one direction."""
        return self.rounds * self.layers * self.chunks


def check_grid(grid: Grid) -> None:
    """Raise ConfigError for a field below 1 or fewer segments than blocks."""
    for field, value in grid._asdict().items():
        if value < 1:
            raise ConfigError(f"{field}={value}: must be at least 1")
    if grid.segments < grid.sp * grid.rounds:
        raise ConfigError(
            f"segments={grid.segments} is fewer than sp={grid.sp} x rounds={grid.rounds}, so a rank would have no "
            f"block; use sp x rounds <= {grid.segments} or a longer sequence"
        )


def efficiency_bound(grid: Grid) -> float:
    """Largest share of the time that ranks can be busy, for equal blocks and free communication.

    U / (U + sp - 1) with U = rounds * layers * chunks. A pipeline longer than layers * chunks stalls between
    rounds as well: then a round takes sp units instead of layers * chunks.
    """
    round_units = grid.layers * grid.chunks
    return grid.units / ((grid.rounds - 1) * max(round_units, grid.sp) + round_units + grid.sp - 1)


def pipeline_warning(grid: Grid) -> str | None:
    """One line when the pipeline never fills (sp > layers * chunks), else None."""
    if grid.sp <= grid.layers * grid.chunks:
        return None
    return (
        f"sp={grid.sp} > layers x chunks = {grid.layers * grid.chunks}: the pipeline never fills and ranks are busy "
        f"at most {efficiency_bound(grid):.0%} of the time; use a smaller sp or more chunks"
    )


def prefetch_window(grid: Grid, handoff_units: float = 0.0) -> int:
    """Layers to gather ahead so that ZeRO-3's collectives do not serialise the wavefront.

    (sp - 1) / chunks + 1: the first rank is that far ahead of the last, further if a hand-off takes a notable share
    of a unit's time (`handoff_units`).
    """
    return math.ceil((grid.sp - 1) * (1 + handoff_units) / grid.chunks) + 1


def block_segments(grid: Grid) -> tuple[range, ...]:
    """The segments of each of the sp * rounds blocks; the first S mod B blocks hold one segment more."""
    size, extra = divmod(grid.segments, grid.sp * grid.rounds)
    starts = [b * size + min(b, extra) for b in range(grid.sp * grid.rounds + 1)]
    return tuple(range(start, end) for start, end in zip(starts, starts[1:], strict=False))


def block_owner(grid: Grid, block: int) -> int:
    """The rank of the sp group that runs `block` (block-cyclic)."""
    return block % grid.sp


def rank_blocks(grid: Grid, rank: int) -> range:
    """The blocks of `rank`, one per round."""
    return range(rank, grid.sp * grid.rounds, grid.sp)


def wavefront(grid: Grid, rank: int, arrows: Sequence[str] = ARMT_ARROWS) -> list[Instruction]:
    """Forward of `rank`: per round and layer GATHER, then RECV, RUN, SEND for each chunk, then RELEASE."""
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
    Op.RUN: (Op.RERUN, Op.BACK),
    Op.RECV: (Op.SEND_GRAD,),
    Op.GATHER: (Op.REDUCE, Op.RELEASE),
}
"""What becomes of a forward instruction when the list is reversed."""


def backward_program(forward: Sequence[Instruction]) -> list[Instruction]:
    """The backward of a forward list, by reversal: a unit becomes RERUN, RECV_GRAD, BACK, SEND_GRAD.

    A layer is reduced once, after the rank's first block (its last contribution), and after dState has been sent.
    """
    first = min(instruction.block for instruction in forward)
    program: list[Instruction] = []
    for instruction in reversed(forward):
        for op in MIRROR[instruction.op]:
            if op is Op.REDUCE and instruction.block != first:
                continue
            # The re-run needs no gradient from the next block, so it goes before the wait for one.
            hoist = op is Op.RERUN and bool(program) and program[-1].op is Op.RECV_GRAD
            program.insert(len(program) - hoist, instruction._replace(op=op))
    return program


class Schedule(NamedTuple):
    """A row of the table of schedules: how it cuts the grid, and the arrows that it respects."""

    fit_grid: Callable[[Grid], Grid]
    arrows: tuple[Arrow, ...]


def _one_rank(name: str, grid: Grid) -> None:
    if grid.sp > 1:
        raise ConfigError(f"sp={grid.sp}: schedule={name} runs a sequence on one rank; use sp=1 or schedule=wavefront")


def _one_block(grid: Grid) -> Grid:
    _one_rank("layer_major", grid)
    if grid.rounds > 1:
        raise ConfigError(f"rounds={grid.rounds}: schedule=layer_major has one block; use rounds=1")
    return grid


def _block_per_segment(grid: Grid) -> Grid:
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
    """The grid as schedule `name` cuts it (segment_major: one block per segment); its blocks are those of the program.

    `arrows` is what the memory kind declares, values of `Arrow`. Raises ConfigError for an unknown schedule, one
    that an arrow forbids, or a grid it cannot run.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"schedule={name}: unknown; known here: {', '.join(SCHEDULES)}")
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
    """The first schedule of the table that `arrows` allow."""
    return next(name for name, row in SCHEDULES.items() if set(arrows) <= set(row.arrows))


def build_program(name: str, grid: Grid, rank: int, arrows: Sequence[str] = ARMT_ARROWS) -> list[Instruction]:
    """The forward program of `rank` under schedule `name`; `backward` derives the other half. Raises as `fit`."""
    return wavefront(fit_grid(name, grid, arrows), rank, arrows)


def segment_major(grid: Grid, rank: int = 0, arrows: Sequence[str] = ARMT_ARROWS) -> list[Instruction]:
    """One segment at a time through all layers (the authors' loop)."""
    return build_program("segment_major", grid, rank, arrows)


def layer_major(grid: Grid, rank: int = 0) -> list[Instruction]:
    """Each layer over all segments, then the next: the wavefront with sp = 1 and one round."""
    return build_program("layer_major", grid, rank)
