"""Lay gathered parameters and gradients to be reduced out in a few operations each, whatever the number of ranks.

DeepSpeed takes one operation for every parameter and rank: at 512 ranks tens of milliseconds of the host for a layer.
A buffer of all ranks' shards is a matrix, in which a parameter is a range of columns.

Shapes: W ranks, n elements of a parameter's shard, N of all shards of a bucket.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def unpacked(shards: Tensor, offset: int, size: int, numel: int) -> Tensor:
    """Return a parameter of `numel` elements, flat: `size` columns at `offset` of all ranks' shards [W, N]."""
    return shards[:, offset : offset + size].reshape(-1)[:numel]


def packed(tensors: Sequence[Tensor], world: int) -> Tensor:
    """Return the shards [W, N] of tensors of any shapes; what pads them is left as it is."""
    sizes = [math.ceil(tensor.numel() / world) for tensor in tensors]
    shards = tensors[0].new_empty(world, sum(sizes))
    offset = 0
    for tensor, size in zip(tensors, sizes, strict=True):
        flat, columns = tensor.reshape(-1), shards[:, offset : offset + size]
        rows, rest = divmod(tensor.numel(), size) if size else (0, 0)
        columns[:rows] = flat[: rows * size].view(rows, size)
        if rest:
            columns[rows, :rest] = flat[rows * size :]
        offset += size
    return shards


def own_parts(own: Tensor, tensors: Sequence[Tensor], rank: int, world: int) -> list[Tensor]:
    """Return this rank's part of each of some tensors, without padding, from its row [N] of their shards."""
    parts, offset = [], 0
    for tensor in tensors:
        size = math.ceil(tensor.numel() / world)
        parts.append(own.narrow(0, offset, min(size, max(0, tensor.numel() - rank * size))))
        offset += size
    return parts


def one_buffer(partitions: Sequence[Tensor]) -> Tensor | None:
    """Return shards [W, N] of which `partitions` are the rows; None where they are not rows of one buffer."""
    first, size = partitions[0], partitions[0].numel()
    last = partitions[-1].data_ptr() - first.data_ptr()
    if last != (len(partitions) - 1) * size * first.element_size():
        return None
    return first.as_strided((len(partitions), size), (size, 1))


def wait_and_unpack(handle: Any, original: Any, available: Any, handle_dependency: bool = True) -> None:
    """Wait for a gather and lay its parameters out; `AllGatherCoalescedHandle.wait`, whose `original` takes the rest.

    available: DeepSpeed's status of a parameter that is whole.
    """
    shards = None
    if not (handle.complete or handle.quantization or handle.use_secondary_tensor):
        shards = one_buffer(handle.partitions)
    if shards is None or not (handle_dependency or shards.device.type == "cpu"):
        return original(handle, handle_dependency)
    handle.allgather_handle.wait()
    offset = 0
    for parameter in handle.params:
        size = parameter.ds_tensor.ds_numel
        values = unpacked(shards, offset, size, parameter.ds_numel)
        parameter.data = values.view(parameter.ds_shape).to(parameter.ds_tensor.dtype)
        parameter.ds_status = available
        offset += size
    if shards.is_cuda:
        # It may have been allocated on another stream.
        shards.record_stream(torch.cuda.current_stream())
    handle.complete = True


@torch.no_grad()
def reduce_scatter(tensors: Sequence[Tensor], rank: int, world: int, reduce: Any) -> list[Tensor]:
    """Return this rank's part of the mean of each tensor; `reduce(whole, own)` adds up shards [W·N] into a row [N].

    As DeepSpeed's, it may change a tensor that is alone and divides evenly.
    """
    alone = len(tensors) == 1 and tensors[0].numel() % world == 0
    shards = tensors[0].view(world, -1) if alone else packed(tensors, world)
    shards.div_(world)
    own = shards[rank]
    reduce(shards.view(-1), own)
    return own_parts(own, tensors, rank, world)
