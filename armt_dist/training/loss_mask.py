"""Which positions of a batch count in the loss, beyond what its task scores.

Shapes: b rows, N tokens of a sequence.
"""

from itertools import accumulate

import torch
from pydantic import model_validator

from ..config import ConfigError, Section
from ..data.task import IGNORE, Batch
from ..model.configuration_armt import ARMTConfig
from ..model.segment_rows import segment_lengths


class LossConfig(Section):
    """Segments whose tokens are not scored, in training and validation."""

    skip_first_segment: bool = False
    """Whether the loss leaves out the first segment, which has no memory to read (the authors' choice for text)."""
    last_segment_only: bool = False
    """Whether the loss counts each sample's last segment only."""

    @model_validator(mode="after")
    def one_of_them(self) -> "LossConfig":
        """Refuse both: the last segment is never the first where the first is left out."""
        if self.skip_first_segment and self.last_segment_only:
            raise ValueError("loss: set skip_first_segment or last_segment_only, not both")
        return self


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


def check_loss(loss: LossConfig, stage: int, segments: int) -> None:
    """Raise ConfigError where the shortest samples of a stage, of `segments` segments, would have no scored token."""
    if loss.skip_first_segment and segments < 2:
        raise ConfigError(
            f"loss.skip_first_segment=true: curriculum.{stage} may draw samples of one segment, which would not be "
            "scored at all; raise its at_least"
        )
