"""What ranks do together: gather numbers, run work as one, and turn an error on one rank into the same error on all."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from ..config import ConfigError, one_line


def gather(own: Sequence[float], device: torch.device) -> list[list[float]]:
    """Each number of all ranks, by rank. Collective; waits for the device."""
    row = torch.tensor(own, dtype=torch.float64, device=device)
    table = row.new_empty(dist.get_world_size() * len(row))
    all_gather_single(table, row)
    return table.view(-1, len(row)).T.tolist()


# torch 2.13 renamed the two collectives and warns of their old names.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def device() -> torch.device:
    """Where the tensors of collectives are: this rank's GPU under NCCL, else the CPU."""
    cuda = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def agree(error: Exception | None) -> None:
    """Collective: where any rank passes an error, all ranks raise the lowest such rank's as ConfigError.

    Without it, the rank that fails leaves and the others wait for it until the timeout.
    """
    kind = "" if error is None or isinstance(error, ConfigError) else f"{type(error).__name__}: "
    message = None if error is None else f"{kind}{one_line(error, limit=2000)}"
    messages = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    failed = [rank for rank, message in enumerate(messages) if message is not None]
    if failed:
        where = "" if len(failed) == len(messages) or failed[0] == 0 else f" (on rank {failed[0]})"
        raise ConfigError(messages[failed[0]] + where) from error


def together(work: Callable[[], object], only: int | None = None) -> object:
    """Run `work` on every rank (or on rank `only`) and wait; a failure on any rank is raised on all. Collective."""
    error, result = None, None
    try:
        if only is None or dist.get_rank() == only:
            result = work()
    except (OSError, RuntimeError, ConfigError) as problem:
        error = problem
    agree(error)
    return result
