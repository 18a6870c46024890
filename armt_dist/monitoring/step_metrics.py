"""What all ranks measure in a step, who looks at its cells, and which rank is slower than the others."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from ..distributed.collectives import gather
from ..runtime.executor import ScheduledLM
from ..runtime.piece import Piece
from ..runtime.segment_bptt import CellView
from ..schedule.grid import Grid, block_segments
from ..schedule.program import Op
from ..schedule.timeline import Event
from ..zero3.collective_bytes import Traffic
from . import profile as trace
from .smallest_read import SmallestRead
from .state_digests import Digests


class Vitals:
    """The measurements of one rank, over a whole run. `straggler_factor` is that of the watchdog's section."""

    def __init__(self, runner: ScheduledLM, straggler_factor: float, device: torch.device):
        self.runner, self.device = runner, device
        self.traffic, self.stragglers = Traffic(), Stragglers(straggler_factor)
        self.digests: Digests | None = None
        self.smallest = SmallestRead(device)

    def write_digests(self, out: Path) -> None:
        """From now on write those of every state that this rank makes in training."""
        self.digests = Digests(out, dist.get_rank())

    def observer(self, step: int, row: int, piece: Piece, closely: bool) -> Callable[[CellView], None] | None:
        """Who looks at the cells of a micro-batch of `step`, whose first row in the global batch is `row`."""
        watchers = [self.smallest] if closely else []
        if self.digests:
            watchers.append(self.digests.of(step, row, piece.grid))
        return (lambda seen: [watch(seen) for watch in watchers]) if watchers else None

    def measure(self, grid: Grid) -> dict[str, float]:
        """How the schedule went in the last pass, as means over ranks; bytes of this process so far. Collective."""
        events = self.runner.trace.events()
        found = {
            **trace.summary(events),
            "cell_s": cell_s(events, grid),
            "handoff_bytes": self.runner.link.sent_bytes,
            "gathered_bytes": self.traffic.gathered_bytes,
            "reduced_bytes": self.traffic.reduced_bytes,
        }
        *columns, lowest = gather([*found.values(), self.smallest.take()], self.device)
        means = {name: statistics.fmean(column) for name, column in zip(found, columns, strict=True)}
        means |= self.stragglers.add(columns[list(found).index("cell_s")])
        if self.digests:
            self.digests.flush()
        return means if math.isinf(min(lowest)) else {**means, "min_zq": min(lowest)}


class Stragglers:
    """Cell times of all ranks since the last report."""

    def __init__(self, factor: float):
        self.factor = factor
        self.sums: list[float] = []

    def add(self, times: Sequence[float]) -> dict[str, float]:
        """The mean cell time of each rank in one step; returns the step's metrics."""
        self.sums = [a + b for a, b in zip(self.sums, times, strict=True)] if self.sums else list(times)
        rank, ratio = slowest(times)
        return {"straggler_rank": rank, "slowest_over_median": ratio}

    def report(self) -> str | None:
        """A line about the slowest rank, where it is too slow over the steps since the last call."""
        if not self.sums:
            return None
        rank, ratio = slowest(self.sums)
        self.sums = []
        if ratio <= self.factor:
            return None
        return f"rank {rank} is a straggler: its cells take {ratio:.2f} times the median"


def slowest(times: Sequence[float]) -> tuple[int, float]:
    """The slowest rank, and its time over the median (of two ranks the faster one's)."""
    worst = max(times)
    return times.index(worst), worst / statistics.median_low(times)


def cell_s(events: Sequence[Event], grid: Grid) -> float:
    """Mean seconds that one of this rank's cells took in forward; blocks may differ by a segment."""
    blocks = block_segments(grid)
    runs = [event for event in events if event.instruction.op is Op.RUN]
    # A chunk is a part of each of its cells.
    cells = sum(len(blocks[event.instruction.block]) for event in runs) / grid.chunks
    return sum(event.end_s - event.start_s for event in runs) / cells
