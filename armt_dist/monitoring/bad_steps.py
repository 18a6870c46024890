"""Steps that must not be made because of non-finite numbers, and losses that spike.

DeepSpeed's ZeRO-3 takes the norm of the gradients over all ranks before it touches parameters or moments. If that norm
is not finite, every rank drops its gradients and leaves `step`. So a non-finite loss only has to reach the gradients,
which `weigh` ensures; no extra decision is needed.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..distributed.collectives import gather_json
from .sections import Rollback


class BadRows(NamedTuple):
    """Rows of a global batch, and the samples in them."""

    rows: list[int]
    sample_ids: list[int]


def weigh(nll: Tensor, factor: Tensor) -> Tensor:
    """Return nll * factor, bit for bit if nll is finite; otherwise its gradients are NaN. Does not wait for the device.

    A loss may be infinite while its gradients are finite: a target whose probability is exactly 0.
    """
    return nll * (factor + 0 * nll.detach())


def find_bad_rows(parts: Sequence[tuple[range, Sequence[int], Tensor]]) -> BadRows:
    """Return the rows of micro-batches with a non-finite loss, or all rows if only gradients were bad. Collective.

    parts: rows, sample ids and summed loss of each micro-batch of this rank.
    """
    own = [(list(rows), list(ids), math.isfinite(nll.detach())) for rows, ids, nll in parts]
    found = [part for parts in gather_json(own) for part in parts]
    bad = [part for part in found if not part[2]] or found
    # The ranks of an sp group share their rows.
    samples = {row: sample for rows, ids, _ in bad for row, sample in zip(rows, ids, strict=True)}
    return BadRows(sorted(samples), [samples[row] for row in sorted(samples)])


def spiked(loss: float, before: Sequence[float], rollback: Rollback | None) -> bool:
    """Return whether `loss` is far above the median of the steps `before` it; false while there are too few."""
    if rollback is None or len(before) < rollback.over:
        return False
    return loss > rollback.factor * statistics.median(before[-rollback.over :])
