"""Resuming an older checkpoint, under DeepSpeed: what is damaged beside it heals, and is not taken."""

import pytest
from support.commands import SAVE_OFTEN, curve, train
from support.paths import FP32

from armt_dist.checkpoint import folder as checkpoint

pytestmark = pytest.mark.slow


def test_an_older_checkpoint_on_another_number_of_ranks(tmp_path):
    run = tmp_path / "run"
    root = run / "checkpoints"
    result = train("--ds_config", FP32, "--out", run, *SAVE_OFTEN, "train.keep_last=3", "train.max_steps=6", ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    whole = curve(run)
    older, damaged, newest = (checkpoint.tag_of(step) for step in (2, 4, 6))
    assert checkpoint.tags(root) == [older, damaged, newest]
    # The next save of step 4 meets it.
    shard = next((root / damaged).glob("*optim_states.pt"))
    shard.write_bytes(shard.read_bytes()[:-1])
    more = ["train.keep_last=4", "train.max_steps=5", "--resume", older]
    result = train("--ds_config", FP32, "--out", run, *SAVE_OFTEN, *more, ranks=1)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"resumed {root / older} at step 2" in result.stdout
    assert checkpoint.verify_checkpoint(root / damaged).world_size == 1, "step 4 is that of the run that goes on"
    assert checkpoint.read_pointer(root, "latest") == checkpoint.tag_of(5)
    again = curve(run)
    for step in (3, 4, 5):
        assert again["train", step][0] == pytest.approx(whole["train", step][0], rel=1e-5)
