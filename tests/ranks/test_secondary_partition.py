"""hpZ, a second copy of the parameters in each node: the same steps, and fewer bytes between nodes."""

import pytest
import torch
from support.commands import curve
from support.models import TINY_LLAMA
from support.ranks import spawn

pytestmark = pytest.mark.slow

NODE = 2


class BetweenNodes:
    """Bytes that each rank gets from ranks of other nodes in gathers; nodes of NODE ranks one after another."""

    def __init__(self):
        from armt_dist.zero3.private import communication_backend

        backend = communication_backend()
        self.bytes, self.original = 0, backend.all_gather_into_tensor
        backend.all_gather_into_tensor = self.gather

    def gather(self, output_tensor, input_tensor, group=None, async_op=False):
        ranks = torch.distributed.get_process_group_ranks(group or torch.distributed.group.WORLD)
        own = torch.distributed.get_rank() // NODE
        self.bytes += sum(rank // NODE != own for rank in ranks) * input_tensor.nbytes
        return self.original(output_tensor, input_tensor, group=group, async_op=async_op)


def train(ranks, out, copies: int, sp: int) -> int:
    """Three steps; the bytes that came from other nodes."""
    from armt_dist.config import validate
    from armt_dist.monitoring.lease import Lease
    from armt_dist.training.run_config import RunConfig
    from armt_dist.training.trainer import Trainer

    config = {
        "model": {"base_config": TINY_LLAMA, "num_mem_tokens": 2, "d_mem": 4},
        "data": {"task": "rewrite", "retrieval": {"symbols": 8}},
        "parallel": {"sp": sp},
        "train": {"save_every": 10, "validate_every": 10},
        "curriculum": [{"pairs": 3, "steps": 3}],
    }
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "zero_hpz_partition_size": copies}
    ds = {"train_batch_size": 8, "zero_optimization": zero}
    trainer = Trainer(validate(RunConfig, config), ds, out, ranks, torch.device("cpu"), Lease(out))
    counted = BetweenNodes()
    assert trainer.run("never") == 0
    trainer.engine.destroy()
    return counted.bytes


@pytest.mark.parametrize("sp", [1, 2])
def test_a_second_copy_in_each_node(sp, tmp_path):
    without = spawn(4, train, tmp_path / "without", 1, sp)
    copied = spawn(4, train, tmp_path / "with", NODE, sp)
    assert curve(tmp_path / "with") == curve(tmp_path / "without")
    # Forward gathers alone cross the nodes, where backward ones did too: three of each, and a validation's forward.
    for with_copy, plain in zip(copied, without, strict=True):
        assert 0 < with_copy <= 0.62 * plain
