"""Collectives over all ranks: gather numbers, do work together, turn an error on one rank into the same on all."""

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar, overload

import torch
import torch.distributed as dist

from ..config import ConfigError, one_line

Result = TypeVar("Result")
# Seconds between two collectives of ranks that wait for one with much work.
SLOW_POLL_S = 1.0


# Signs of a lost rank in gloo's messages; NCCL raises DistBackendError.
LOST = ("gloo", "timed out", "timeout", "connection closed", "connection reset", "broken pipe")


def is_lost_rank(error: Exception) -> bool:
    """Return whether an error says that another rank is gone, or silent for too long."""
    return isinstance(error, dist.DistError) or any(sign in str(error).lower() for sign in LOST)


def gather(own: Sequence[float], device: torch.device) -> list[list[float]]:
    """Return for each number its values on all ranks, in rank order. Collective; waits for the device."""
    row = torch.tensor(own, dtype=torch.float64, device=device)
    table = row.new_empty(dist.get_world_size() * len(row))
    all_gather_single(table, row)
    return table.view(-1, len(row)).T.tolist()


# torch 2.13 renamed the two collectives and warns about their old names.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def device() -> torch.device:
    """Return the device that tensors of collectives must be on: this rank's GPU under NCCL, else the CPU."""
    cuda = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def gather_json(own: Any) -> list[Any]:
    """Return what every rank passes, in rank order, as JSON brings it back: tuples as lists. Collective.

    Not torch's all_gather_object, which unpickles what the other ranks send: whoever passed for a rank could run code.
    Raises ConfigError if a rank sends what is not JSON.
    """
    content = json.dumps(own).encode()
    # [ranks]
    (sizes,) = gather([len(content)], device())
    row = torch.zeros(int(max(sizes)), dtype=torch.uint8)
    row[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    table = torch.empty(len(sizes) * len(row), dtype=torch.uint8, device=device())
    all_gather_single(table, row.to(device()))
    rows = table.cpu().view(len(sizes), -1)
    try:
        return [json.loads(bytes(row[: int(size)].numpy())) for row, size in zip(rows, sizes, strict=True)]
    except ValueError as error:
        raise ConfigError(f"a rank sent what is not JSON ({one_line(error)}); is a stranger in the job?") from None


def agree(error: Exception | None) -> None:
    """Raise ConfigError on all ranks where any rank passes an error: that of the lowest such rank. Collective.

    Without it, the rank that fails leaves and the others wait for it until the timeout.
    """
    kind = "" if error is None or isinstance(error, ConfigError) else f"{type(error).__name__}: "
    messages = gather_json(None if error is None else f"{kind}{one_line(error, limit=2000)}")
    failed = {rank: message for rank, message in enumerate(messages) if message is not None}
    if failed:
        first = min(failed)
        where = "" if len(failed) == len(messages) or first == 0 else f" (on rank {first})"
        raise ConfigError(failed[first] + where) from error


@overload
def together(work: Callable[[], Result]) -> Result: ...


@overload
def together(work: Callable[[], Result], only: int) -> Result | None: ...


def together(work: Callable[[], Result], only: int | None = None) -> Result | None:
    """Run `work` on every rank (or on rank `only`), wait, and return its result, None on other ranks. Collective.

    A failure on any rank is raised on all of them as ConfigError.
    """
    error: Exception | None = None
    result = None
    try:
        if only is None or dist.get_rank() == only:
            result = work()
    except (OSError, RuntimeError, ConfigError) as problem:
        error = problem
    agree(error)
    return result


def together_slowly(work: Callable[[Callable[[], None]], Result], renew: Callable[[], None]) -> Result:
    """Run `work` on every rank as `together` does, even if it takes one rank far longer than a collective may take.

    A thread works; meanwhile ranks meet in short collectives, and `renew` is called where any rank has got on. work: is
    given a function to call when it gets on. Collective.
    """
    done: Future[Result] = Future()
    signs = 0

    def get_on() -> None:
        nonlocal signs
        signs += 1

    def run() -> None:
        try:
            done.set_result(work(get_on))
        except BaseException as problem:
            done.set_exception(problem)

    # One that does not keep the process from ending when another rank is lost.
    threading.Thread(target=run, name="slow work", daemon=True).start()
    before = None
    while True:
        wait([done], timeout=SLOW_POLL_S)
        finished, all_signs = gather([done.done(), signs], device())
        if all(finished):
            return together(done.result)
        if all_signs != before:
            renew()
        before = all_signs
