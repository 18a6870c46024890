"""How a global batch is spread over ranks and accumulation steps, and its results summed up again.

Shapes: G rows of a global batch: accumulation steps, then data-parallel ranks, then micro-batch rows.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist

from ..data.sampling import Split
from ..data.task import Batch, Difficulty, Task
from ..distributed.mesh import Mesh
from ..model.configuration_armt import ARMTConfig
from ..runtime.piece import Piece, Totals, cut_piece
from ..schedule.grid import Grid
from ..zero3.ds_config import BatchSizes


class Sums(NamedTuple):
    """A global batch, summed over all ranks."""

    nll: float
    scored: int
    right_tokens: int
    right_rows: int
    rows: int
    stop: bool  # some rank was told to stop

    def metrics(self) -> dict[str, float]:
        """Means over tokens and samples."""
        return {
            "loss": self.nll / max(1, self.scored),
            "accuracy": self.right_rows / max(1, self.rows),
            "token_accuracy": self.right_tokens / max(1, self.scored),
        }


class Batches(NamedTuple):
    """The batches of one rank."""

    task: Task
    armt: ARMTConfig
    grid: Grid  # of this run; its segments are those of each batch
    schedule: str | None  # ParallelConfig.schedule
    mesh: Mesh
    sizes: BatchSizes
    device: torch.device

    def micro_batches(self, split: Split, step: int, difficulty: Difficulty) -> list[tuple[range, Batch]]:
        """This data-parallel rank's rows of a global batch, one micro-batch for each accumulation step."""
        micro, dp = self.sizes.micro, self.mesh.dp
        starts = [(a * dp + self.mesh.dp_rank) * micro for a in range(self.sizes.accumulation)]
        return [(range(s, s + micro), self.task.batch(split, step, range(s, s + micro), difficulty)) for s in starts]

    def piece(self, batch: Batch) -> Piece:
        """This rank's blocks of a micro-batch, inputs on the device."""
        rows = batch.input_ids, batch.labels, batch.attention_mask
        piece = cut_piece(*rows, self.armt, self.grid, self.mesh.sp_rank, self.schedule)
        mask = piece.attention_mask
        return piece._replace(
            input_ids=piece.input_ids.to(self.device, non_blocking=True),
            attention_mask=None if mask is None else mask.to(self.device, non_blocking=True),
        )

    def sum_up(self, parts: list[tuple[range, Batch, Totals]], stop: bool) -> Sums:
        """Sum what the ranks found; the only point of a step where the host waits for the device. Collective."""
        rows = self.sizes.global_batch
        nll, told, wrong, scored = 0, 1, slice(2, 2 + rows), slice(2 + rows, 2 + 2 * rows)
        sums = torch.zeros(2 + 2 * rows, dtype=torch.float64, device=self.device)
        sums[told] = float(stop)
        for where, batch, totals in parts:
            own = slice(where.start, where.stop)
            sums[nll] += totals.nll.detach()
            sums[wrong][own] += totals.wrong
            # Every rank of a group sees the whole rows' labels.
            sums[scored][own] += batch.labels.ge(0).sum(1).to(self.device) / self.mesh.sp
        dist.all_reduce(sums)
        sums = sums.cpu()
        scored_rows = sums[scored].round() > 0
        right_rows = int(((sums[wrong] == 0) & scored_rows).sum())
        total = int(sums[scored].sum().round())
        return Sums(
            sums[nll].item(),
            total,
            total - int(sums[wrong].sum()),
            right_rows,
            int(scored_rows.sum()),
            bool(sums[told] > 0),
        )
