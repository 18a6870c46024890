"""Host time to lay out a gathered layer, and gradients to be reduced, by number of ranks: DeepSpeed's and ours.

    OMP_NUM_THREADS=1 python benchmarks/unpacking.py [--worlds 8 64 512 4096] [--parameters 13] [--repeats 20]

No ranks take part: gathers are over at once, and shards have two elements, so that what is measured is the host's part.
13 parameters are those of a Llama layer with memory. Prints a table and one JSON line last.
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace

import torch
from ranks import heading, table

from armt_dist.zero3 import unpacking


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Median time."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return median(times) * 1e3


def measure(world: int, parameters: int, repeats: int) -> dict[str, float]:
    """Milliseconds at one number of ranks."""
    from deepspeed.runtime.comm import coalesced_collectives as collectives
    from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle, ZeroParamStatus

    flat, size = torch.zeros(world * 2 * parameters), 2 * parameters
    made = [torch.nn.Parameter(torch.empty(0)) for _ in range(parameters)]
    for parameter in made:
        parameter.ds_numel, parameter.ds_shape, parameter.ds_tensor = 2 * world, (2, world), torch.empty(0)
        parameter.ds_tensor.ds_numel = 2

    def handle() -> AllGatherCoalescedHandle:
        for parameter in made:
            parameter.ds_status = ZeroParamStatus.INFLIGHT
        rows = [flat.narrow(0, i * size, size) for i in range(world)]
        return AllGatherCoalescedHandle(SimpleNamespace(wait=lambda: None), made, rows, world)

    gradients = [torch.zeros(2, world) for _ in range(parameters)]
    collectives._torch_reduce_scatter_fn = lambda whole, own, group=None: None
    collectives.dist = SimpleNamespace(get_rank=lambda group: 1, get_world_size=lambda group: world)
    wait = AllGatherCoalescedHandle.wait
    return {
        "gather, DeepSpeed": milliseconds(lambda: wait(handle()), repeats),
        "gather": milliseconds(lambda: unpacking.wait_and_unpack(handle(), wait, ZeroParamStatus.AVAILABLE), repeats),
        "reduce, DeepSpeed": milliseconds(lambda: collectives.reduce_scatter_coalesced(gradients), repeats),
        "reduce": milliseconds(lambda: unpacking.reduce_scatter(gradients, 1, world, lambda *_: None), repeats),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument("--parameters", type=int, default=13)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    found = {world: measure(world, args.parameters, args.repeats) for world in args.worlds}
    print(heading("unpacking.py"))
    rows = [[world, *(f"{value:.2f}" for value in row.values())] for world, row in found.items()]
    print(table(["ranks", *(f"{name} (ms)" for name in next(iter(found.values())))], rows))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
