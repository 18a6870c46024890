"""Which positions of a batch count in the loss, beyond what its task scores.

Shapes: b rows, N tokens of a sequence.
"""

from itertools import accumulate

import torch

from ..data.task import IGNORE, Batch
from ..model.configuration_armt import ARMTConfig
from ..model.segment_rows import segment_lengths
from .run_config import LossConfig


def mask_labels(batch: Batch, loss: LossConfig, armt: ARMTConfig) -> Batch:
    """Return the batch with IGNORE at the labels [b, N] that `loss` leaves out.

    A label belongs to the segment that predicts it, so the first token of the second segment is the first one's.
    """
    if not (loss.skip_first_segment or loss.last_segment_only):
        return batch
    count, tokens = batch.labels.shape
    starts = torch.tensor([0, *accumulate(segment_lengths(tokens, armt.segment_tokens, armt.segment_alignment))][:-1])
    if loss.skip_first_segment:
        first = torch.full((count, 1), int(starts[1]) if len(starts) > 1 else tokens)
    else:
        mask = batch.attention_mask
        real = torch.full((count,), tokens) if mask is None else mask.sum(1)
        # The last segment with a real token.
        first = starts[(starts < real[:, None]).sum(1, keepdim=True) - 1]
    return batch._replace(labels=batch.labels.masked_fill(torch.arange(tokens) < first, IGNORE))
