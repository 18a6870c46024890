"""Several ranks in one test: `spawn` runs a function on a world of gloo processes and returns each result."""

import multiprocessing
import os
import pickle
import queue
import time
import traceback
from collections.abc import Callable, Container

from armt_dist.distributed import rendezvous as parallel
from armt_dist.distributed.launchers import Ranks


def spawn(world: int, function: Callable, *args, timeout_s: float = 120) -> list:
    """Return `[function(ranks, *args) for each rank]`, with torch.distributed started around it.

    `function` must live at module level, and its result must be picklable. The traceback of the first rank that raises
    is raised here as AssertionError, marked with its rank. The others are then killed, as all are after `timeout_s`.
    """
    # One process imports what every rank imports, and each rank is a fork of it: a third of a short test's time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["armt_dist.training.trainer", "deepspeed"])
    results = context.Queue()
    port = parallel.free_port()
    # Its environment is that of the first test; each rank takes today's.
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = world, environment, timeout_s, results, function, args
    workers = [context.Process(target=run_rank, args=(rank, *started), daemon=True) for rank in range(world)]
    for worker in workers:
        worker.start()
    try:
        return collect(workers, results, time.monotonic() + timeout_s)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def collect(workers: list, results, deadline: float) -> list:
    """Collect each rank's result in rank order. AssertionError for a traceback, a silent death or a missed deadline."""
    done = {}
    while len(done) < len(workers):
        # Before the queue is read: what a rank put there before it died is then still found below.
        died = silent_deaths(workers, done)
        try:
            rank, value, trace = results.get(timeout=0.2)
        except queue.Empty:
            assert not died, "\n".join(died)
            waiting = [rank for rank in range(len(workers)) if rank not in done]
            assert time.monotonic() < deadline, f"ranks {waiting} did not finish in time"
            continue
        if trace is not None:
            # If a rank died, the traceback comes from another rank, which lost its peer: name both.
            lines = silent_deaths(workers, [*done, rank]) + [f"[rank {rank}] {line}" for line in trace.splitlines()]
            raise AssertionError("\n".join(lines))
        done[rank] = pickle.loads(value)
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
        parallel.stop()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
