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
# The same where a teacher's distribution stands beside the model's: some seven tensors of float32 logits.
TAUGHT_POSITIONS = 256


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


def losses_beside(hidden: Tensor, teacher: Tensor, head: nn.Linear, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the negative log-likelihood of each target, and KL(teacher || model) in nats; 0 where it is IGNORE.

    hidden, teacher [n, D], targets [n] int64 -> two of [n] float32. No gradient reaches the teacher. Logits of neither
    are kept: chunks are checkpointed (non-reentrant).
    """
    chunks = zip(*(each.split(TAUGHT_POSITIONS) for each in (hidden, teacher.detach(), targets)), strict=True)
    parts = [
        checkpoint(chunk_losses_beside, *chunk, head.weight, head.bias, use_reentrant=False, preserve_rng_state=False)
        for chunk in chunks
    ]
    nll, divergence = zip(*parts, strict=True)
    return torch.cat(nll), torch.cat(divergence)


def chunk_losses_beside(
    hidden: Tensor, teacher: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return what `losses_beside` does, through the logits of all positions; for a few positions only."""
    model = F.linear(hidden, weight, bias).float().log_softmax(-1)
    with torch.no_grad():
        taught = F.linear(teacher, weight, bias).float().log_softmax(-1)
    divergence = F.kl_div(model, taught, reduction="none", log_target=True).sum(-1)
    nll = F.nll_loss(model, targets, ignore_index=IGNORE, reduction="none")
    return nll, divergence.masked_fill(targets == IGNORE, 0)


@torch.no_grad()
def hits(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Return where the most likely token is the target. [n, D], [n] -> [n] bool."""
    parts = [
        F.linear(h, head.weight, head.bias).argmax(-1) == t
        for h, t in zip(hidden.split(CHUNK_POSITIONS), targets.split(CHUNK_POSITIONS), strict=True)
    ]
    return torch.cat(parts)
