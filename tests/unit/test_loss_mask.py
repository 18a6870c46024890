"""Positions that the loss leaves out, against the authors' masks and by hand."""

import pytest
import torch
from support.golden import load_case, load_model
from support.models import small_model

from armt_dist.config import ConfigError, validate
from armt_dist.data.task import IGNORE, Batch
from armt_dist.training.checks import check_loss
from armt_dist.training.loss_mask import mask_labels
from armt_dist.training.run_config import LossConfig

SKIP, LAST = LossConfig(skip_first_segment=True), LossConfig(last_segment_only=True)


@pytest.mark.parametrize("name", ["armt_v2_llama_nocorr_ragged_nfs", "armt_sw_llama_sink_nfs"])
def test_the_first_segment_is_left_out_as_the_authors_do(name):
    case, config = load_case(name), load_model(name).config
    ids = case.io["input_ids"]
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE)], dim=1)
    masked = mask_labels(Batch(ids, labels, None, [0, 1]), SKIP, config).labels
    assert torch.equal((masked != IGNORE)[:, :-1], case.io["labels_mask"][:, :-1] > 0)


@pytest.mark.parametrize(
    ("alignment", "loss", "scored"),
    [
        ("left", SKIP, [range(8, 21), range(8, 13), []]),
        ("left", LAST, [range(16, 21), range(8, 13), range(8)]),
        ("right", SKIP, [range(5, 21)]),
        ("right", LAST, [range(13, 21)]),
        ("center", LAST, [range(14, 21)]),
    ],
)
def test_by_hand(alignment, loss, scored):
    """Rows of 21, 13 and 8 real tokens in segments of 8."""
    real = torch.tensor([21, 13, 8])[: len(scored)]
    mask = (torch.arange(21) < real[:, None]).long()
    labels = torch.arange(21).repeat(len(real), 1).masked_fill(mask == 0, IGNORE)
    batch = Batch(labels, labels, mask, list(range(len(real))))
    masked = mask_labels(batch, loss, small_model(segment_alignment=alignment).config).labels
    assert [[int(i) for i in (row != IGNORE).nonzero()] for row in masked] == [list(part) for part in scored]
    assert mask_labels(batch, LossConfig(), small_model().config) is batch


def test_mistakes():
    with pytest.raises(ConfigError, match="loss: set skip_first_segment or last_segment_only, not both"):
        validate(LossConfig, {"skip_first_segment": True, "last_segment_only": True})
    with pytest.raises(ConfigError, match="loss.skip_first_segment=true: curriculum.2 may draw samples of one segment"):
        check_loss(SKIP, 2, 1)
    check_loss(SKIP, 2, 2)
    check_loss(LAST, 2, 1)
