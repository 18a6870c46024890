"""DeepSpeed's private parts that training needs: one function each, and nothing else of ours touches them.

Each docstring says what the part does, why we need it and the version it was seen in. A test per part fails when
DeepSpeed changes it (tests/unit/test_deepspeed_private.py, tests/ranks/test_deepspeed_behaviour.py). The private parts
that concern files are those of `checkpoint/`.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from .unpacking import reduce_scatter, wait_and_unpack


class WholeTensor(NamedTuple):
    """The argument of a collective that holds the whole tensor, not a rank's share."""

    name: str
    position: int


def communication_backend() -> Any:
    """Return the object that carries out DeepSpeed's collectives, None before `deepspeed.init_distributed`.

    `deepspeed.comm.comm.cdb`, seen in DeepSpeed 0.19.8. Its methods can be replaced to count bytes.
    """
    import deepspeed.comm.comm as comm

    return comm.cdb


COUNTED = {
    "all_gather_into_tensor": WholeTensor("output_tensor", 0),
    "reduce_scatter_tensor": WholeTensor("input_tensor", 1),
}
"""Methods of the backend through which ZeRO-3 gathers parameters and reduces gradients. Seen in DeepSpeed 0.19.8."""


def operators() -> frozenset[str]:
    """Return the names of the operators that DeepSpeed may compile, which are those of their build folders.

    `deepspeed.ops.op_builder.all_ops.ALL_OPS`, seen in DeepSpeed 0.19.8.
    """
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    return frozenset(ALL_OPS)


def skip_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce when its communication starts on CPU.

    Compiling takes 27 s (0.01 s without), and every rank leaves 69 MB in /dev/shm. Only inference would use the
    operator; training goes through gloo. `deepspeed.ops.__compatible_ops__` says which operators can be built. Seen in
    DeepSpeed 0.19.8.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def use_collectives(all_gather: Any, reduce_scatter: Any) -> None:
    """Let DeepSpeed call these two functions of torch.distributed instead of those that it has chosen.

    It keeps them in the backend, under the names that torch 2.13 warns about. Seen in DeepSpeed 0.19.8.
    """
    backend = communication_backend()
    backend.all_gather_function, backend.reduce_scatter_function = all_gather, reduce_scatter


def secondary_group() -> Any:
    """Return the ranks that share a second copy of the parameters (`zero_hpz_partition_size`), None before it is made.

    `zero.Init` makes it, and fails where it is there already, unless it is told of it. Seen in DeepSpeed 0.19.8.
    """
    from deepspeed.utils import groups

    return groups._get_zero_param_intra_parallel_group()


def whole_numel(parameter: Tensor) -> int:
    """Count the elements of a parameter, of one that ZeRO-3 has partitioned as well.

    A partitioned parameter is empty, and `ds_numel` is its whole size. Seen in DeepSpeed 0.19.8.
    """
    return getattr(parameter, "ds_numel", parameter.numel())


def whole_dimensions(parameter: Tensor) -> int:
    """Count the dimensions of a parameter, of one that ZeRO-3 has partitioned as well.

    A partitioned parameter has one, and `ds_shape` is its whole shape. Seen in DeepSpeed 0.19.8.
    """
    return len(getattr(parameter, "ds_shape", parameter.shape))


def mark_gradients_ready(parameters: Iterable[Tensor], ready: bool) -> None:
    """Say whether ZeRO-3's hooks may reduce the next gradients of these parameters, or more are to be added first.

    `ds_grad_is_ready`, True where it is not set. Measured exact for several calls of a layer in a step, with gradient
    accumulation too. The public `engine.coalesce_grad_reduction()` is as exact, but keeps the gradients of all layers
    until the end of the backward pass and takes one backward call a step. Seen in DeepSpeed 0.19.8.
    """
    for parameter in parameters:
        parameter.ds_grad_is_ready = ready  # type: ignore[attr-defined]


def release_after_next_backward(module: nn.Module) -> None:
    """Let ZeRO-3 release the module's parameters after the backward pass of one more call.

    DeepSpeed resets its pending-gradient counter `ds_grads_remaining` at each forward. With several rounds only the
    first backward would release the layer, and prefetching would stop. Seen in DeepSpeed 0.19.8.
    """
    module.ds_grads_remaining = 1  # type: ignore[assignment]


def unpack_with_few_operations() -> None:
    """Let ZeRO-3 lay parameters and gradients out by `unpacking`, in place of one operation a parameter and rank.

    `AllGatherCoalescedHandle.wait` and `stage3.reduce_scatter_coalesced`; the same values, bit for bit. Seen in
    DeepSpeed 0.19.8.
    """
    import deepspeed.comm as dist
    from deepspeed.runtime.comm import coalesced_collectives
    from deepspeed.runtime.zero import stage3
    from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle, ZeroParamStatus

    original = AllGatherCoalescedHandle.wait
    if hasattr(original, "few_operations"):
        return

    def wait(handle: Any, handle_dependency: bool = True) -> None:
        """Wait for a gather and lay its parameters out."""
        wait_and_unpack(handle, original, ZeroParamStatus.AVAILABLE, handle_dependency)

    def reduce_scatter_coalesced(tensors: list[Tensor], group: Any = None) -> list[Tensor]:
        """Return this rank's part of the mean of each tensor."""
        send = coalesced_collectives._torch_reduce_scatter_fn
        return reduce_scatter(
            tensors, dist.get_rank(group), dist.get_world_size(group), lambda whole, own: send(whole, own, group=group)
        )

    wait.few_operations = original  # type: ignore[attr-defined]
    AllGatherCoalescedHandle.wait = wait
    stage3.reduce_scatter_coalesced = reduce_scatter_coalesced
