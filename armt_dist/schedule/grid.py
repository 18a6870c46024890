"""The cells of one sequence, the blocks and ranks over which they are spread, and the bound on efficiency.

Letters: S segments, L layers, U units of work per rank.
"""

import math
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

from ..config import ConfigError


class Arrow(StrEnum):
    """Where the memory state of cell (s, l) comes from; it also needs the hidden states of (s, l-1)."""

    SAME_LAYER = "same_layer"
    """(s-1, l): ARMT, sliding window."""
    LAST_LAYER = "last_layer"
    """(s-1, L-1): RMT. The state enters at layer 0 and leaves from the last layer."""


ARMT_ARROWS = (Arrow.SAME_LAYER,)
RMT_ARROWS = (Arrow.LAST_LAYER,)


def source_layer(arrows: Sequence[str], layer: int, layers: int) -> int | None:
    """Return the layer of segment s-1 whose state enters cell (s, layer), None where no state enters."""
    if Arrow.SAME_LAYER in arrows:
        return layer
    return layers - 1 if layer == 0 else None


def target_layer(arrows: Sequence[str], layer: int, layers: int) -> int | None:
    """Return the layer of segment s+1 that the state of cell (s, layer) enters, None where no state leaves."""
    if Arrow.SAME_LAYER in arrows:
        return layer
    return 0 if layer == layers - 1 else None


class Grid(NamedTuple):
    """The cells of one sequence and how they are spread."""

    segments: int
    layers: int
    sp: int = 1  # ranks that share the sequence
    rounds: int = 1  # blocks of segments per rank
    chunks: int = 1  # parts of the micro-batch, handed on separately

    @property
    def units(self) -> int:
        """Number of units of work of one rank in one direction."""
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
    """Return the largest share of the time that ranks can be busy, for equal blocks and free communication.

    U / (U + sp - 1) with U = rounds * layers * chunks. A pipeline longer than layers * chunks stalls between
    rounds as well: then a round takes sp units instead of layers * chunks.
    """
    round_units = grid.layers * grid.chunks
    return grid.units / ((grid.rounds - 1) * max(round_units, grid.sp) + round_units + grid.sp - 1)


def pipeline_warning(grid: Grid) -> str | None:
    """Return one line when the pipeline never fills (sp > layers * chunks), else None."""
    if grid.sp <= grid.layers * grid.chunks:
        return None
    return (
        f"sp={grid.sp} > layers x chunks = {grid.layers * grid.chunks}: the pipeline never fills and ranks are busy "
        f"at most {efficiency_bound(grid):.0%} of the time; use a smaller sp, with fewer ranks or "
        "a larger batch, or more chunks"
    )


def prefetch_window(grid: Grid, handoff_units: float = 0.0) -> int:
    """Return how many layers to gather ahead so that ZeRO-3's collectives do not serialise the wavefront.

    (sp - 1) / chunks + 1: the first rank is that far ahead of the last, and further if a hand-off takes a notable share
    of a unit's time (`handoff_units`).
    """
    return math.ceil((grid.sp - 1) * (1 + handoff_units) / grid.chunks) + 1


# DeepSpeed's host blocks where so many reductions on CUDA are unfinished (0.19.8).
UNFINISHED_REDUCTIONS = 3


def reduction_layers(grid: Grid) -> int:
    """Return how many layers' gradients ZeRO-3 reduces at a time on CUDA, so that its waits do not stop the wavefront.

    A reduction ends when all ranks have come to it, and the first rank of an sp group is (sp - 1) / chunks layers ahead
    of the last: the reductions that may be unfinished have to cover them.
    """
    return max(2, math.ceil((grid.sp - 1) / grid.chunks / UNFINISHED_REDUCTIONS) + 1)


def block_range(grid: Grid, block: int) -> range:
    """Return the segments of a block, of B = sp * rounds; the first S mod B blocks have one segment more."""
    size, extra = divmod(grid.segments, grid.sp * grid.rounds)
    start = block * size + min(block, extra)
    return range(start, start + size + (block < extra))


def largest_block(grid: Grid) -> int:
    """Return the segments of the largest block."""
    return len(block_range(grid, 0))


def block_segments(grid: Grid) -> tuple[range, ...]:
    """Return the segments of each block."""
    return tuple(block_range(grid, block) for block in range(grid.sp * grid.rounds))


def block_owner(grid: Grid, block: int) -> int:
    """Return the rank of the sp group that runs `block` (block-cyclic)."""
    return block % grid.sp


def rank_blocks(grid: Grid, rank: int) -> range:
    """Return the blocks of `rank`, one per round."""
    return range(rank, grid.sp * grid.rounds, grid.sp)
