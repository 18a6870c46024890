"""How fast ranks of one node hand a state on, gather a layer and reduce its gradients, beside what the planner assumes.

    python benchmarks/node_ring.py [--ranks 2] [--mb 130]

A state is that of a layer of the Llama-3.2-1B shape, handed around a ring of all ranks by the edges that a run uses; a
layer has `--mb` megabytes. Medians over repetitions; on GPUs by the device's clock. Prints a table, and JSON last.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from node import run_ranks, this_rank
from ranks import table

from armt_dist.distributed import rendezvous
from armt_dist.distributed.launchers import Ranks
from armt_dist.distributed.mesh import make_mesh, ring
from armt_dist.schedule.hardware import CPU, H100
from armt_dist.schedule.model_sizes import MODELS

REPEATS, WARM_UP = 20, 3
STATE_BYTES = MODELS["llama-1b"].state_bytes
SMALL_BYTES = 4


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """Median seconds of `work` on this rank, all ranks beginning together."""
    found = []
    for _ in range(REPEATS + WARM_UP):
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found[WARM_UP:])


def measure(ranks: Ranks, megabytes: float) -> dict:
    """Seconds and bytes of each operation, the slowest rank's."""
    device = rendezvous.start(ranks, 60)
    before, after = ring(make_mesh(ranks, ranks.world_size), 60)
    assert before is not None and after is not None

    def hand_on(count: int) -> Callable[[], None]:
        sent, received = (torch.ones(count, device=device) for _ in range(2))

        def work() -> None:
            jobs = [dist.irecv(received, before.peer, before.group), dist.isend(sent, after.peer, after.group)]
            for job in jobs:
                assert job is not None
                job.wait()

        return work

    share = int(megabytes * 1e6) // 2 // ranks.world_size
    part = torch.ones(share, dtype=torch.bfloat16, device=device)
    whole = torch.ones(share * ranks.world_size, dtype=torch.bfloat16, device=device)
    works = {
        "hand-off": (hand_on(STATE_BYTES // 4), STATE_BYTES),
        "hand-off of 4 bytes": (hand_on(SMALL_BYTES // 4), SMALL_BYTES),
        "all-gather": (lambda: dist.all_gather_into_tensor(whole, part), whole.nbytes),
        "reduce-scatter": (lambda: dist.reduce_scatter_tensor(part, whole), whole.nbytes),
    }
    found = {}
    for name, (work, size) in works.items():
        slowest = torch.tensor(seconds(work, device), dtype=torch.float64, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        found[name] = {"us": float(slowest) * 1e6, "gb_per_s": size / float(slowest) / 1e9, "bytes": size}
    found["device"] = {"type": device.type}
    rendezvous.stop()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--mb", type=float, default=130.0, help="megabytes of a gathered layer")
    args = parser.parse_args()
    if ranks := this_rank():
        found = measure(ranks, args.mb)
        if ranks.rank == 0:
            print(json.dumps(found))
        return
    found = run_ranks(args.ranks, "node_ring.py", "--mb", str(args.mb))
    hardware = CPU if found.pop("device")["type"] == "cpu" else H100
    assumed = {
        "hand-off": hardware.handoff_bytes_per_s,
        "all-gather": hardware.gather_bytes_per_s,
        "reduce-scatter": hardware.gather_bytes_per_s,
    }
    latency = f"{hardware.handoff_latency_s * 1e6:g} us"
    said = {name: f"{assumed[name] / 1e9:g}" if name in assumed else latency for name in found}
    rows = [
        [name, row["bytes"], f"{row['us']:.0f}", f"{row['gb_per_s']:.3g}", said[name]] for name, row in found.items()
    ]
    print(table(["operation", "bytes", "us", "GB/s", "the planner assumes"], rows))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
