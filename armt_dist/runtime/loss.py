"""Compute token cross-entropy from hidden states without ever holding the logits of a sequence.

Shapes: n scored positions, D model width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..model.segment_rows import IGNORE as IGNORE

# Positions whose logits exist at a time.
CHUNK_POSITIONS = 1024


def token_nll(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood of each target, 0 where it is IGNORE.

    hidden [n, D], targets [n] int64 -> [n] float32. torch >= 2.13 has the chunked operator; before it, the same chunks
    are checkpointed (non-reentrant).
    """
    if len(hidden) <= CHUNK_POSITIONS:
        return chunk_nll(hidden, head.weight, head.bias, targets)
    if hasattr(F, "linear_cross_entropy"):
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK_POSITIONS, chunking_method=None)
        # torch's own reductions return the compute dtype, off by percents in bfloat16; the caller sums in float32.
        return F.linear_cross_entropy(
            hidden, head.weight, targets, linear_bias=head.bias, reduction="none", options=options
        ).float()
    parts = [
        checkpoint(chunk_nll, h, head.weight, head.bias, t, use_reentrant=False)
        for h, t in zip(hidden.split(CHUNK_POSITIONS), targets.split(CHUNK_POSITIONS), strict=True)
    ]
    return torch.cat(parts)


def chunk_nll(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Return what `token_nll` does, through the logits of all positions; for a few positions only."""
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="none")


@torch.no_grad()
def hits(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Return where the most likely token is the target. [n, D], [n] -> [n] bool."""
    parts = [
        F.linear(h, head.weight, head.bias).argmax(-1) == t
        for h, t in zip(hidden.split(CHUNK_POSITIONS), targets.split(CHUNK_POSITIONS), strict=True)
    ]
    return torch.cat(parts)
