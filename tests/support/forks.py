"""Ranks of launch/train.py as forks of one process, which has imported what each of them imports.

An import of torch, transformers and DeepSpeed takes ten seconds of a core, and a launcher's own a further seven; a fork
takes none. The product is the same from its first line on. `test_train`, `test_launchers`, `tests/cluster` and others
start it by real launchers.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from armt_dist.distributed.rendezvous import free_port
from support.paths import ROOT

SCRIPT = str(ROOT / "launch/train.py")
# What a launcher leaves the other ranks once one has failed, and until it kills them.
OTHERS_END_S, KILL_S = 1, 30


def context() -> multiprocessing.context.BaseContext:
    """Return what starts processes as forks of the one that has imported everything; it is started at first use."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(["armt_dist.training.trainer", "deepspeed"])
    return forkserver


def run_forked(ranks: int, arguments: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess:
    """Run launch/train.py to its end; the exit code is that of the first rank that failed."""
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        workers = []
        for rank in range(ranks):
            own = {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1, **shared}
            environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
            workers.append(context().Process(target=run_script, args=(environment, arguments, outputs)))
        for worker in workers:
            worker.start()
        try:
            code = wait(workers, time.monotonic() + timeout_s)
        finally:
            end(workers)
        texts = [path.read_text() for path in outputs]
    if code is None:
        raise subprocess.TimeoutExpired([SCRIPT, *arguments], timeout_s, *texts)
    return subprocess.CompletedProcess([SCRIPT, *arguments], code, *texts)


def run_script(environment: Mapping[str, str], arguments: Sequence[str], outputs: Sequence[Path]) -> None:
    """Be one rank."""
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    for descriptor, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    sys.argv = [SCRIPT, *arguments]
    runpy.run_path(SCRIPT, run_name="__main__")


def wait(workers: Sequence, deadline: float) -> int | None:
    """Wait for the end of all ranks, or for the failure of one; return the exit code, or None if it is too late."""
    while time.monotonic() < deadline:
        codes = [worker.exitcode for worker in workers]
        if failed := next(filter(None, codes), 0):
            for worker in workers:
                worker.join(OTHERS_END_S)
            return failed
        if None not in codes:
            return 0
        time.sleep(0.1)
    return None


def end(workers: Sequence) -> None:
    """End what is left."""
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(KILL_S)
        worker.kill()
        worker.join()
