"""Start DeepSpeed's communication on top of torch.distributed, which `distributed.rendezvous` has started."""

import torch.distributed as dist

from ..distributed.collectives import all_gather_single, reduce_scatter_single
from .private import skip_shared_memory_op, unpack_with_few_operations, use_collectives


def start_communication() -> None:
    """Let DeepSpeed join the process group that there is, once per process; later calls do nothing.

    Must come before the first partitioned parameter. Raises RuntimeError where torch.distributed has not started.
    """
    import deepspeed

    if deepspeed.comm.is_initialized():
        return
    if not dist.is_initialized():
        # DeepSpeed would look for other ranks by itself, and find none under some launchers.
        raise RuntimeError("torch.distributed has not started; call distributed.rendezvous.start first")
    skip_shared_memory_op()
    deepspeed.init_distributed(dist.get_backend(), verbose=False)
    use_collectives(all_gather_single, reduce_scatter_single)
    unpack_with_few_operations()
