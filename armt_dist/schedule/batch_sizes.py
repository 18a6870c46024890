"""DeepSpeed's rule for the sizes of a batch: train_batch_size = micro-batch x accumulation x data-parallel ranks."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..config import ConfigError, one_line


class BatchSizes(NamedTuple):
    """Sequences: of one optimizer step, of one rank's micro-batch; and micro-batches a step."""

    global_batch: int
    micro: int
    accumulation: int


def batch_sizes(config: Mapping[str, Any], dp: int) -> BatchSizes:
    """Apply DeepSpeed's rule, train_batch_size = micro x accumulation x dp, with the missing one filled in.

    Raises ConfigError for sizes that are not positive integers or do not fit the world.
    """
    total = batch_size(config, "train_batch_size")
    micro = batch_size(config, "train_micro_batch_size_per_gpu")
    accumulation = batch_size(config, "gradient_accumulation_steps")
    if total is None and micro is None:
        raise ConfigError("ds_config train_batch_size: missing; set it, or train_micro_batch_size_per_gpu")
    if accumulation is None:
        accumulation = 1 if total is None or micro is None else max(1, total // (micro * dp))
    if micro is None:
        micro = max(1, (total or 1) // (accumulation * dp))
    if total is None:
        total = micro * accumulation * dp
    if total != micro * accumulation * dp:
        raise ConfigError(
            f"ds_config train_batch_size={total} is not {micro} (micro-batch) x {accumulation} (accumulation) x {dp} "
            f"(data-parallel ranks); try train_batch_size={micro * accumulation * dp} or another world size"
        )
    return BatchSizes(total, micro, accumulation)


def batch_size(config: Mapping[str, Any], name: str) -> int | None:
    """Return one of the batch sizes. Raises ConfigError where it is not a positive integer."""
    value = config.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ConfigError(f"ds_config {name}={one_line(value)}: expected a positive integer")
    return value
