"""Steps with a bad loss: what counts as one, and how a run keeps count of them."""

import json
import math

import pytest
import torch

from armt_dist.config import ConfigError, validate
from armt_dist.monitoring.bad_steps import spiked, weigh
from armt_dist.monitoring.sections import Rollback
from armt_dist.training.progress import Progress


def test_only_a_bad_loss_changes_its_gradients():
    factor = torch.tensor(0.37)
    for value in (3.0, -0.0, math.inf, math.nan):
        nll = torch.tensor(value, requires_grad=True)
        weighed = weigh(nll, factor)
        weighed.backward()
        if math.isfinite(value):
            assert weighed.item() == (nll * factor).item() and nll.grad == factor
        else:
            assert nll.grad.isnan()


def test_a_loss_spikes_against_the_median_of_enough_steps():
    rollback = Rollback(factor=2.0, over=3)
    assert spiked(2.1, [1.0, 9.0, 1.0], rollback) and not spiked(2.0, [1.0, 9.0, 1.0], rollback)
    assert not spiked(2.1, [1.0, 1.0], rollback), "too few steps to tell"
    assert not spiked(2.1, [1.0, 1.0, 1.0, 3.0, 3.0], rollback), "steps too long ago"
    assert not spiked(100.0, [1.0] * 9, None)
    with pytest.raises(ConfigError, match="factor"):
        validate(Rollback, {"factor": 1.0})


def test_progress_counts_what_was_skipped_and_survives_json():
    step = {"accuracy": 0.5, "tokens": 10, "seconds": 1.0, "window": 2}
    progress = Progress().after_step(**step).after_loss(1.0, 2).after_step(**step).after_loss(2.0, 2)
    progress = progress.after_step(**step).after_loss(3.0, 2).after_step(**step).after_skip()
    assert (progress.losses, progress.skipped, progress.skipped_in_a_row) == ((2.0, 3.0), 1, 1)
    assert progress.after_step(**step).after_loss(1.0, 0).skipped_in_a_row == 0
    assert Progress.restored(json.loads(json.dumps(progress._asdict()))) == progress
    assert progress._replace(passed_over=3).batch == progress.step + 3 and progress.next_stage().losses == ()
