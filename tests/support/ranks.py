"""Several ranks in one test: `spawn` runs a function on a world of gloo processes and returns each result."""

import contextlib
import os
import pickle
import queue
import time
import traceback
from collections.abc import Callable, Container

import torch.distributed as dist

from armt_dist.distributed import rendezvous as parallel
from armt_dist.distributed.launchers import Ranks
from support.forks import context

# From the traceback of one rank to those of the others.
OTHERS_SPEAK_S = 5


def spawn(world: int, function: Callable, *args, timeout_s: float = 120) -> list:
    """Return `[function(ranks, *args) for each rank]`, with torch.distributed started around it.

    `function` must live at module level, and its result must be picklable. The tracebacks of ranks that raise are
    raised here as AssertionError, marked with their ranks. The others are then killed, as all are after `timeout_s`.
    """
    forks = context()
    results = forks.Queue()
    port = parallel.free_port()
    # Its environment is that of the first test; each rank takes today's.
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = world, environment, timeout_s, results, function, args
    workers = [forks.Process(target=run_rank, args=(rank, *started), daemon=True) for rank in range(world)]
    for worker in workers:
        worker.start()
    try:
        return collect(workers, results, time.monotonic() + timeout_s)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def collect(workers: list, results, deadline: float) -> list:
    """Collect each rank's result in rank order. AssertionError for tracebacks, a silent death or a missed deadline."""
    done, raised = {}, {}
    while len(done) + len(raised) < len(workers):
        # Before the queue is read: what a rank put there before it died is then still found below.
        died = silent_deaths(workers, {*done, *raised})
        try:
            rank, value, trace = results.get(timeout=0.2)
        except queue.Empty:
            if died or time.monotonic() > deadline:
                break
            continue
        if trace is None:
            done[rank] = pickle.loads(value)
        else:
            # A rank that lost its peer may report before the peer does.
            deadline = min(deadline, time.monotonic() + OTHERS_SPEAK_S)
            raised[rank] = trace
    lines = silent_deaths(workers, {*done, *raised})
    lines += [f"[rank {rank}] {line}" for rank, trace in sorted(raised.items()) for line in trace.splitlines()]
    waiting = [rank for rank in range(len(workers)) if rank not in {*done, *raised}]
    if waiting and not lines:
        lines = [f"ranks {waiting} did not finish in time"]
    assert not lines, "\n".join(lines)
    return [done[rank] for rank in range(len(workers))]


def silent_deaths(workers: list, reported: Container[int]) -> list[str]:
    """Return a line for each rank that ended without reporting."""
    return [
        f"rank {rank} died with exit code {worker.exitcode} and no traceback"
        for rank, worker in enumerate(workers)
        if worker.exitcode is not None and rank not in reported
    ]


def run_rank(
    rank: int, world: int, environment: dict, timeout_s: float, results, function: Callable, args: tuple
) -> None:
    """Run the function in one process and put its result, or its traceback, in the queue."""
    os.environ.clear()
    os.environ.update(environment)
    try:
        ranks = Ranks(rank, world, rank, world, "environment")
        parallel.start(ranks, timeout_s)
        # Pickled here: a queue passes tensors as memory of this process, which may be gone when they are read.
        results.put((rank, pickle.dumps(function(ranks, *args)), None))
        # A rank that closes its connections early resets them: what a slower one has not yet read of them is lost.
        with contextlib.suppress(RuntimeError):
            dist.barrier()
        parallel.stop()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
