"""Opening the files of many ranks."""

from pathlib import Path

import pytest
import torch

from armt_dist.checkpoint.zero_shards import open_checkpoint
from armt_dist.config import ConfigError

WORLD = 5


def write_shards(folder, prefix):
    """Write what DeepSpeed leaves of a parameter with two values a rank."""
    shapes = {"weight": torch.Size([2 * WORLD])}
    for rank in range(WORLD):
        flat = torch.tensor([2.0 * rank, 2.0 * rank + 1])
        states = {"zero_stage": 3, "partition_count": WORLD, "fp32_flat_groups": [flat]}
        torch.save({"optimizer_state_dict": states}, folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        torch.save({"param_shapes": [shapes]}, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")


@pytest.mark.parametrize("prefix", ["", "bf16_"])
def test_no_rank_lists_the_folder(prefix, tmp_path, monkeypatch):
    write_shards(tmp_path, prefix)

    def listed(*_):
        raise AssertionError("a list of all files for one of them")

    for name in ("glob", "rglob", "iterdir"):
        monkeypatch.setattr(Path, name, listed)
    (parameter,) = open_checkpoint(tmp_path).parameters.values()
    assert torch.equal(torch.cat(parameter.pieces), torch.arange(2.0 * WORLD))


def test_a_missing_rank_is_named(tmp_path):
    write_shards(tmp_path, "bf16_")
    (tmp_path / "bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(ConfigError, match=r"zero_pp_rank_3_mp_rank_00_optim_states\.pt of rank 3 is missing"):
        open_checkpoint(tmp_path)
