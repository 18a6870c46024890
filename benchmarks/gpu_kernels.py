"""What one training step launches: attention kernels, launches of a cell, waits of the host, time of the device.

    python benchmarks/gpu_kernels.py [--device cpu --shape tiny] [--segments 16] [--layers 4]

Layers of the shape, bfloat16, without an engine: forward and backward of one sequence by the fast path, under torch's
profiler. Launches a cell are those of all segments and layers over their number, embedding, head and loss left in.
Prints a table and one JSON line last.
"""

import argparse
import json
import time
import traceback
import warnings
from collections import Counter

import torch
from shapes import SHAPES, build, random_ids
from torch.profiler import ProfilerActivity, profile

from armt_dist.runtime.cell_graphs import CellGraphs
from armt_dist.runtime.executor import ScheduledLM
from armt_dist.runtime.piece import cut_piece
from armt_dist.schedule.grid import Grid

VARIANTS = {
    "without graphs": {"graphs": False},
    "as it is": {},
    "window": {"sliding_window": 0.5},
    "transformer_xl": {"memory_kind": "transformer_xl", "num_mem_tokens": None, "d_mem": 64},
}
# In names of kernels.
ATTENTION = ("flash", "fmha", "attention", "softmax", "cudnn_generated")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
SHOWN = 8
# What the planner prices apart, by parts of names of kernels; the first that fits.
CLASSES = {
    "attention": ("sdpa", "flash", "fmha", "fusion"),
    "softmax of the head": ("softmax",),
    "products": ("nvjet", "gemm", "cutlass", "splitk", "gemv", "bmm", "dot_kernel"),
    "copies": ("copy", "memcpy", "memset", "fill"),
    "reductions": ("reduce",),
    "elementwise": ("elementwise", "cat", "vectorized"),
}


def runner_of(shape: str, layers: int, options: dict, device: torch.device) -> ScheduledLM:
    """The fast path over a model of so many layers."""
    given = dict(options)
    graphs = given.pop("graphs", True)
    if isinstance(given.get("sliding_window"), float):
        given["sliding_window"] = int(given["sliding_window"] * SHAPES[shape][1]["segment_tokens"])
    return ScheduledLM(build(shape, device, torch.bfloat16, {"num_hidden_layers": layers}, **given), graphs=graphs)


def measure(shape: str, layers: int, segments: int, options: dict, device: torch.device) -> dict:
    """One variant."""
    runner = runner_of(shape, layers, options, device)
    model = runner.model
    ids, labels = random_ids(model, 1, segments * model.config.segment_tokens)
    piece = cut_piece(ids.to(device), labels, None, model.config, Grid(1, layers))
    cuda = device.type == "cuda"
    parts: dict[str, float] = {}

    def step() -> None:
        model.zero_grad(set_to_none=True)
        started = time.perf_counter()
        totals = runner(piece)
        if cuda:
            torch.cuda.synchronize()
        between = time.perf_counter()
        (totals.nll / totals.scored).backward()
        if cuda:
            torch.cuda.synchronize()
        parts.update(forward=between - started, backward=time.perf_counter() - between)

    for _ in range(2):
        step()
    cells = segments * layers
    found: dict = {name: seconds / cells * 1e3 for name, seconds in parts.items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if cuda:
            torch.cuda.set_sync_debug_mode("warn")
        totals = runner(piece)
        (totals.nll / totals.scored).backward()
        if cuda:
            torch.cuda.set_sync_debug_mode("default")
    waits = Counter(f"{w.filename.rsplit('/', 2)[-2]}/{w.filename.rsplit('/', 1)[-1]}:{w.lineno}" for w in caught
                    if "called a synchronizing" in str(w.message))  # fmt: skip
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as profiler:
        step()
    averages = profiler.key_averages()
    kernels = [e for e in averages if e.device_type == torch.autograd.DeviceType.CUDA]
    if not cuda:
        kernels = [e for e in averages if e.key.startswith("aten::")]
    own_us = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in kernels}
    launched = sum(e.count for e in averages if e.key.startswith(("cudaLaunchKernel", "cuLaunchKernel"))) or sum(
        e.count for e in kernels
    )
    found |= {
        "launches_per_cell": launched / cells,
        "device_ms_per_cell": sum(own_us.values()) / cells / 1e3,
        "us_per_cell": by_class(own_us, cells),
        "waits_inside": dict(waits),
        "waits_of_the_runtime": sum(e.count for e in averages if e.key in WAITS),
        "attention": {e.key[:90]: e.count for e in kernels if any(part in e.key.lower() for part in ATTENTION)},
        "most_time": {e.key[:70]: [e.count, round(own_us[e.key] / 1e3, 2)] for e in
                      sorted(kernels, key=lambda e: -own_us[e.key])[:SHOWN]},
    }  # fmt: skip
    return found


def class_of(kernel: str) -> str:
    """The class of `CLASSES` that a kernel belongs to."""
    name = kernel.lower()
    return next((kind for kind, parts in CLASSES.items() if any(part in name for part in parts)), "other")


def by_class(own_us: dict[str, float], cells: int) -> dict[str, float]:
    """Microseconds of the device for each class, over the number of cells."""
    found: Counter = Counter()
    for kernel, us in own_us.items():
        found[class_of(kernel)] += us / cells
    return {kind: round(us, 1) for kind, us in found.most_common()}


def show_refusals() -> None:
    """Print in full why a cell cannot be recorded."""
    refuse = CellGraphs.refuse

    def shown(graphs: CellGraphs, error: RuntimeError) -> None:
        traceback.print_exception(error)
        refuse(graphs, error)

    CellGraphs.refuse = shown  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--segments", type=int, default=16)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args()
    device, result = torch.device(args.device), {}
    show_refusals()
    for name in args.variants:
        found = result[name] = measure(args.shape, args.layers, args.segments, VARIANTS[name], device)
        times = f"{found['forward']:.3f} ms forward, {found['backward']:.3f} ms backward"
        launches, device_ms = found["launches_per_cell"], found["device_ms_per_cell"]
        print(f"== {name}: a cell takes {times}; {launches:.0f} launches, {device_ms:.3f} ms of the device")
        print(f"   waits inside: {found['waits_inside'] or 'none'}; runtime: {found['waits_of_the_runtime']}")
        print(
            "   us of the device for a cell:", ", ".join(f"{kind} {us:g}" for kind, us in found["us_per_cell"].items())
        )
        for kernel, count in found["attention"].items():
            print(f"   attention: {count} x {kernel}")
        for kernel, (count, ms) in found["most_time"].items():
            print(f"   {ms:>8.2f} ms {count:>6} x {kernel}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
