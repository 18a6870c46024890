"""Numbers that went bad: a step that must not be made, a loss that jumped, a normaliser that comes close to zero.

A skipped step needs no decision of its own. DeepSpeed's ZeRO-3 takes the norm of the gradients over all ranks before it
touches parameters or moments, and where that norm is not finite every rank drops its gradients and leaves `step`. So a
loss that is not finite only has to reach the gradients, which `weigh` sees to.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from ..config import Section


class Rollback(Section):
    """Go back to the last checkpoint when the loss exceeds `factor` times the median of the last `over` steps."""

    factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 2.0
    over: Annotated[int, Field(ge=1)] = 50


class BadRows(NamedTuple):
    """Rows of a global batch, and which samples they are."""

    rows: list[int]
    sample_ids: list[int]


def weigh(nll: Tensor, factor: Tensor) -> Tensor:
    """nll * factor, bit for bit where nll is finite; elsewhere its gradients are NaN. Does not wait for the device.

    A loss may be infinite while its gradients are finite: a target whose probability is exactly 0.
    """
    return nll * (factor + 0 * nll.detach())


def culprits(parts: Sequence[tuple[range, Sequence[int], Tensor]]) -> BadRows:
    """Rows of the micro-batches whose loss is not finite; all rows where only gradients were. Collective.

    `parts`: of each micro-batch of this rank its rows, their sample ids and its summed loss.
    """
    own = [(list(rows), list(ids), math.isfinite(nll.detach())) for rows, ids, nll in parts]
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    found = [part for parts in everyone for part in parts]
    bad = [part for part in found if not part[2]] or found
    # The ranks of an sp group share their rows.
    samples = {row: sample for rows, ids, _ in bad for row, sample in zip(rows, ids, strict=True)}
    return BadRows(sorted(samples), [samples[row] for row in sorted(samples)])


def spiked(loss: float, before: Sequence[float], rollback: Rollback | None) -> bool:
    """Whether `loss` is far above the median of the steps `before` it; never with too few of them to tell."""
    if rollback is None or len(before) < rollback.over:
        return False
    return loss > rollback.factor * statistics.median(before[-rollback.over :])
