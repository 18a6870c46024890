"""The spread of a global batch over ranks and accumulation steps, and the sums of its results.

Shapes: G rows of a global batch, ordered by accumulation step, then data-parallel rank, then row of the micro-batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from ..data.extensions import Rows, measured, transformed
from ..data.sampling import Split
from ..data.task import Batch, Difficulty, Task
from ..distributed.mesh import Mesh
from ..model.configuration_armt import ARMTConfig
from ..runtime.host_copy import copied
from ..runtime.piece import Piece, Totals, cut_piece
from ..runtime.teacher import Windows, cut_windows
from ..schedule.grid import Grid
from ..zero3.ds_config import BatchSizes
from .loss_mask import mask_labels
from .run_config import LossConfig


class RowLayout(NamedTuple):
    """Which group of ranks has which rows of a global batch."""

    dp: int  # groups of ranks
    sp: int  # ranks of a group
    micro: int  # rows of a micro-batch
    accumulation: int  # micro-batches of a step

    @classmethod
    def of(cls, mesh: Mesh, sizes: BatchSizes) -> "RowLayout":
        """Return the layout of a run."""
        return cls(mesh.dp, mesh.sp, sizes.micro, sizes.accumulation)

    def micro_rows(self, group: int) -> list[range]:
        """Return the rows of a group's micro-batches."""
        starts = [(a * self.dp + group) * self.micro for a in range(self.accumulation)]
        return [range(start, start + self.micro) for start in starts]

    def rows(self, group: int) -> list[int]:
        """Return the rows of a group, in their order there."""
        return [row for rows in self.micro_rows(group) for row in rows]

    def groups(self, rows: np.ndarray) -> np.ndarray:
        """Return the group that has each of some rows."""
        return rows // self.micro % self.dp

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Return the position of each of some rows among those of its group."""
        return rows // (self.micro * self.dp) * self.micro + rows % self.micro


class MicroBatch(NamedTuple):
    """This data-parallel rank's samples of one accumulation step."""

    rows: range  # of the global batch
    batch: Batch


class MicroResult(NamedTuple):
    """A micro-batch after its forward pass on one rank."""

    rows: range
    batch: Batch
    totals: Totals  # over this rank's blocks
    grid: Grid  # of its piece


class Sums(NamedTuple):
    """Sums over a global batch on all ranks."""

    nll: float
    scored: int
    right_tokens: int
    right_rows: int
    rows: int
    stop: bool  # whether any rank was told to stop
    by_row: Rows
    divergence: float | None = None

    def metrics(self) -> dict[str, float]:
        """Return means over tokens and samples, and the metrics of extensions."""
        return {
            "loss": self.nll / max(1, self.scored),
            "accuracy": self.right_rows / max(1, self.rows),
            "token_accuracy": self.right_tokens / max(1, self.scored),
            **({} if self.divergence is None else {"divergence": self.divergence / max(1, self.scored)}),
            **measured(self.by_row),
        }


class Batches(NamedTuple):
    """The batches of one rank."""

    task: Task
    armt: ARMTConfig
    grid: Grid  # of this run; the number of segments is that of each batch
    schedule: str | None  # ParallelConfig.schedule
    mesh: Mesh
    sizes: BatchSizes
    device: torch.device
    loss: LossConfig = LossConfig()

    @property
    def layout(self) -> RowLayout:
        """Which group of ranks has which rows."""
        return RowLayout.of(self.mesh, self.sizes)

    def micro_batches(self, split: Split, step: int, difficulty: Difficulty) -> list[MicroBatch]:
        """Return this rank's rows of a global batch, one micro-batch for each accumulation step."""
        parts = self.layout.micro_rows(self.mesh.dp_rank)
        batches = (transformed(self.task.batch(split, step, rows, difficulty), split, step) for rows in parts)
        masked = (mask_labels(batch, self.loss, self.armt) for batch in batches)
        return [MicroBatch(rows, batch) for rows, batch in zip(parts, masked, strict=True)]

    def piece(self, batch: Batch) -> Piece:
        """Cut this rank's blocks out of a micro-batch, and copy the token ids to the device."""
        rows = batch.input_ids, batch.labels, batch.attention_mask
        piece = cut_piece(*rows, self.armt, self.grid, self.mesh.sp_rank, self.schedule, batch.document_starts)
        return piece._replace(input_ids=copied(piece.input_ids, self.device))

    def windows(self, batch: Batch, piece: Piece) -> Windows | None:
        """Return what the teacher reads for the piece of a micro-batch; None without a teacher. Raises ConfigError."""
        distill = self.loss.distill
        return cut_windows(batch.input_ids, batch.document_starts, piece, distill.window) if distill else None

    def sum_up(self, results: Sequence[MicroResult], told_to_stop: bool) -> Sums:
        """Sum the results of all ranks. Collective; the only point of a step where the host waits for the device."""
        rows = self.sizes.global_batch
        nll, told, divergence, wrong, scored = 0, 1, 2, slice(3, 3 + rows), slice(3 + rows, 3 + 2 * rows)
        sums = torch.zeros(3 + 2 * rows, dtype=torch.float64, device=self.device)
        sums[told] = float(told_to_stop)
        for part in results:
            own = slice(part.rows.start, part.rows.stop)
            sums[nll] += part.totals.nll.detach()
            if part.totals.divergence is not None:
                sums[divergence] += part.totals.divergence.detach()
            sums[wrong][own] += part.totals.wrong
            # Every rank of an sp group counts the labels of whole rows.
            sums[scored][own] += copied(part.batch.labels.ge(0).sum(1), self.device) / self.mesh.sp
        dist.all_reduce(sums)
        sums = sums.cpu()
        scored_rows = sums[scored].round() > 0
        right_rows = int(((sums[wrong] == 0) & scored_rows).sum())
        total = int(sums[scored].sum().round())
        taught = all(part.totals.divergence is not None for part in results)
        return Sums(
            sums[nll].item(),
            total,
            total - int(sums[wrong].sum()),
            right_rows,
            int(scored_rows.sum()),
            bool(sums[told] > 0),
            Rows(sums[scored].round().numpy(), sums[wrong].numpy()),
            sums[divergence].item() if taught else None,
        )


def add_up(parts: Sequence[Sums]) -> Sums:
    """Add the sums of several global batches."""
    return Sums(
        sum(part.nll for part in parts),
        sum(part.scored for part in parts),
        sum(part.right_tokens for part in parts),
        sum(part.right_rows for part in parts),
        sum(part.rows for part in parts),
        any(part.stop for part in parts),
        Rows(*(np.concatenate(values) for values in zip(*(part.by_row for part in parts), strict=True))),
    )
