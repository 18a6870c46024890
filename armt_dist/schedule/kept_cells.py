"""How many cells keep their graphs from the forward to the backward pass, and are not run again (bptt.keep).

Letters: K segments of a block, L layers.
"""

import math
from typing import NamedTuple

from pydantic import ByteSize, TypeAdapter, ValidationError

from ..config import ConfigError, one_line
from .grid import Grid, largest_block
from .model_sizes import ModelSizes, StepWork
from .step_memory import kept_graph_bytes

AUTO = "auto"


class Keep(NamedTuple):
    """Which part of a pass's cells keep their graphs."""

    share: float = 0.0  # of all cells, at most
    bytes: float = math.inf  # that their graphs hold, at most
    auto: bool = False  # whether the run finds out how many bytes are free


def parse_keep(value: object, name: str = "bptt.keep") -> Keep:
    """Read a share, a number of bytes, or `auto`. Raises ConfigError for anything else."""
    if value == AUTO:
        return Keep(1.0, 0.0, auto=True)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
        return Keep(float(value))
    if isinstance(value, str):
        try:
            return Keep(1.0, float(TypeAdapter(ByteSize).validate_python(value)))
        except ValidationError:
            pass
    raise ConfigError(f"{name}={one_line(value)}: use a share of the cells from 0 to 1, bytes such as 12GB, or {AUTO}")


def kept_share(model: ModelSizes, work: StepWork, grid: Grid) -> float:
    """Share of a rank's cells that keep their graphs; `auto` is planned as if nothing were free."""
    keep = parse_keep(work.keep)
    if not math.isfinite(keep.bytes):
        return keep.share
    cells = grid.layers * grid.rounds * largest_block(grid) * grid.chunks
    chunk_rows = -(-work.micro_batch // grid.chunks)
    return min(keep.share, keep.bytes / (cells * kept_graph_bytes(model, work, chunk_rows)))
