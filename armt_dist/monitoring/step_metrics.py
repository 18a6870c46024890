"""What all ranks measure in a step: times of the schedule, bytes moved, the slowest rank, and the smallest read."""

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
from ..schedule.grid import Grid, block_range
from ..schedule.program import Op
from ..schedule.timeline import Event
from ..zero3.collective_bytes import CollectiveBytes
from .profile import summary
from .smallest_read import SmallestRead
from .state_digests import Digests


class StepMetrics:
    """The measurements of one rank over a whole run."""

    def __init__(self, runner: ScheduledLM, straggler_factor: float, device: torch.device):
        """straggler_factor: WatchdogConfig.straggler_factor."""
        self.runner, self.device = runner, device
        self.collectives, self.stragglers = CollectiveBytes(), Stragglers(straggler_factor)
        self.digests: Digests | None = None
        self.smallest = SmallestRead(device)

    def write_digests(self, out: Path) -> None:
        """Start writing digests of every state that this rank computes in training."""
        self.digests = Digests(out, dist.get_rank())

    def observer(self, step: int, row: int, piece: Piece, smallest_read: bool) -> Callable[[CellView], None] | None:
        """Return the observer of the cells of a micro-batch of `step`; None if nobody observes.

        row: the micro-batch's first row in the global batch; smallest_read: whether to observe that too, which is slow.
        """
        watchers: list[Callable[[CellView], None]] = [self.smallest] if smallest_read else []
        if self.digests:
            watchers.append(self.digests.of(step, row, piece.grid))
        if not watchers:
            return None

        def observe(seen: CellView) -> None:
            for watch in watchers:
                watch(seen)

        return observe

    def measure(self, grid: Grid) -> dict[str, float]:
        """Return the metrics of the last pass, as means over ranks; bytes count from the start. Collective."""
        trace = self.runner.trace
        assert trace is not None, "measure() before the first forward"
        events = trace.events()
        found = {
            **summary(events),
            "cell_s": cell_s(events, grid),
            "handoff_bytes": self.runner.link.sent_bytes,
            "gathered_bytes": self.collectives.gathered_bytes,
            "reduced_bytes": self.collectives.reduced_bytes,
        }
        if self.runner.keep.share:
            found["kept"] = self.runner.kept.kept_share
        *columns, lowest = gather([*found.values(), self.smallest.take()], self.device)
        means = {name: statistics.fmean(column) for name, column in zip(found, columns, strict=True)}
        means |= self.stragglers.add(columns[list(found).index("cell_s")])
        if self.digests:
            self.digests.flush()
        return means if math.isinf(min(lowest)) else {**means, "min_zq": min(lowest)}


class Stragglers:
    """Cell times of all ranks, summed since the last report."""

    def __init__(self, factor: float):
        self.factor = factor
        self.sums: list[float] = []

    def add(self, times: Sequence[float]) -> dict[str, float]:
        """Add the mean cell time of each rank in one step and return the step's metrics."""
        self.sums = [a + b for a, b in zip(self.sums, times, strict=True)] if self.sums else list(times)
        rank, ratio = slowest(times)
        return {"straggler_rank": rank, "slowest_over_median": ratio}

    def report(self) -> str | None:
        """Describe the slowest rank if it was too slow over the steps since the last call."""
        if not self.sums:
            return None
        rank, ratio = slowest(self.sums)
        self.sums = []
        if ratio <= self.factor:
            return None
        return f"rank {rank} is a straggler: its cells take {ratio:.2f} times as long as the median rank's"


def slowest(times: Sequence[float]) -> tuple[int, float]:
    """Return the slowest rank and its time over the median; the median of two ranks is the faster one's time."""
    worst = max(times)
    return times.index(worst), worst / statistics.median_low(times)


def cell_s(events: Sequence[Event], grid: Grid) -> float:
    """Return the mean seconds of this rank's forward cells. Blocks may differ by a segment."""
    runs = [event for event in events if event.instruction.op is Op.RUN]
    # A chunk is a part of each of its cells.
    cells = sum(len(block_range(grid, event.instruction.block)) for event in runs) / grid.chunks
    return sum(event.end_s - event.start_s for event in runs) / cells
