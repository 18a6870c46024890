"""Tokens/s and peak memory on one device by length of the sequence, beside a plain loop and the planner's prediction.

    python benchmarks/gpu_speed.py [--tokens 32768 65536 131072 262144] [--longest 1048576]
    python benchmarks/gpu_speed.py --device cpu --shape tiny --tokens 256 512 --longest 2048      # the script itself

The fast path is the real one: ZeRO-3 on one rank, bfloat16, AdamW, optimizer step included. The plain loop is forward
and backward alone, in one graph, and with one segment's graph alive at a time (torch's checkpointing); where it runs
out of memory, that is the result. Every point is the second of two steps. `--longest`: one step of one sequence with
rebuilt states and layer inputs in host memory. Prints tables and one JSON line last.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from ranks import real_engine
from shapes import SHAPES, build, plain_loss, random_ids

from armt_dist.config import validate
from armt_dist.distributed import rendezvous
from armt_dist.distributed.launchers import Ranks
from armt_dist.runtime.cell_graphs import CellGraphs
from armt_dist.runtime.piece import cut_piece
from armt_dist.runtime.sections import ParallelConfig
from armt_dist.schedule.hardware import HARDWARE
from armt_dist.schedule.model_sizes import StepWork, memory_fields, model_sizes
from armt_dist.schedule.planner import Layout, plan
from armt_dist.training.out_of_memory import is_out_of_memory

PLAIN = {"plain": False, "plain, checkpointed": True}
# states, offload, graphs
FAST = {
    "store, no graphs": ("store", False, False),
    "store": ("store", False, True),
    "rebuild": ("rebuild", False, True),
    "rebuild, offload": ("rebuild", True, True),
}


def waited(device: torch.device) -> float:
    """The time when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def point(step: Callable[[], Any], tokens: int, device: torch.device, warm_up: bool = True) -> dict | None:
    """Tokens/s, seconds and peak GB of the second of two steps; None where the device is too small for it."""
    try:
        if warm_up:
            step()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        started = waited(device)
        step()
        seconds = waited(device) - started
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    return {"tokens_per_s": tokens / seconds, "seconds": seconds, "peak_gb": peak}


def plain_points(shape: str, lengths: list[int], device: torch.device) -> dict:
    """Both plain loops by length, until one runs out of memory."""
    model, found = build(shape, device, torch.bfloat16), {}
    for name, checkpointed in PLAIN.items():
        for tokens in lengths:
            ids, labels = (each.to(device) for each in random_ids(model, 1, tokens))

            def step(ids=ids, labels=labels, checkpointed=checkpointed) -> None:
                model.zero_grad(set_to_none=True)
                plain_loss(model, ids, labels, checkpointed=checkpointed).backward()

            # The first step of all warms up; a long one takes as long again.
            found[f"{name} {tokens}"] = point(step, tokens, device, warm_up=tokens == lengths[0])
            show(name, tokens, found[f"{name} {tokens}"])
            if found[f"{name} {tokens}"] is None:
                break
    return found


def predicted(shape: str, tokens: int, states: str, offload: bool, hardware: str) -> dict:
    """What the planner says of the same step."""
    base, memory = SHAPES[shape]
    segment = memory["segment_tokens"]
    sizes = model_sizes(base, memory_fields({"memory_kind": "armt", "sliding_window": 0, **without(memory)}, segment))
    work = StepWork(tokens, segment, states=states, offload_activations=offload)
    made = plan(sizes, work, Layout(), HARDWARE[hardware])
    host = sum(made.host_bytes.values()) / 1e9
    return {"seconds": made.step_s, "peak_gb": sum(made.gpu_bytes.values()) / 1e9, "host_gb": host}


def without(memory: dict) -> dict:
    """The memory's fields for the planner."""
    return {name: value for name, value in memory.items() if name != "segment_tokens"}


def fast_points(shape: str, lengths: list[int], variants: list[str], longest: list[int], device: torch.device) -> dict:
    """The fast path behind the engine, by length and variant."""
    base, memory = SHAPES[shape]
    ds = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
    }
    started = time.perf_counter()
    ranks = Ranks(0, 1, 0, 1, "single")
    runner, engine, config, grid, _ = real_engine(ranks, validate(ParallelConfig, {}), base, memory, ds, device)
    print(f"engine: {waited(device) - started:.1f} s, {used_gb(device)}", flush=True)
    found, graphs = {}, CellGraphs()
    work = [(tokens, name, tokens == lengths[0]) for name in variants for tokens in lengths]
    for tokens, name, warm_up in [*work, *((tokens, "rebuild, offload", False) for tokens in longest)]:
        runner.states, runner.offload, graphed = FAST[name]
        runner.graphs = graphs if graphed else None
        ids, labels = random_ids(runner.model, 1, tokens)
        piece = cut_piece(ids.to(device), labels, None, config, grid)

        def step(piece=piece) -> None:
            totals = engine(piece)
            engine.backward(totals.nll / totals.scored)
            engine.step()

        said = predicted(shape, tokens, *FAST[name][:2], "cpu" if device.type == "cpu" else "h100")
        found[f"{name} {tokens}"] = {"measured": point(step, tokens, device, warm_up), "predicted": said}
        show(name, tokens, found[f"{name} {tokens}"]["measured"], said)
    return found


def used_gb(device: torch.device) -> str:
    """Allocated on the device."""
    return f"{torch.cuda.memory_allocated() / 1e9:.1f} GB in use" if device.type == "cuda" else "on the CPU"


def show(name: str, tokens: int, measured: dict | None, said: dict | None = None) -> None:
    """One line of the table."""
    if measured is None:
        text = "out of memory"
    else:
        peak = f"{measured['peak_gb']:.1f} GB" if measured["peak_gb"] is not None else ""
        text = f"{measured['tokens_per_s']:>9,.0f} tokens/s {measured['seconds']:>8.2f} s {peak:>9}"
    planned = f"   planned {said['seconds']:.2f} s, {said['peak_gb']:.1f} GB" if said else ""
    print(f"{name:<22}{tokens:>9}  {text}{planned}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cuda")
    add("--shape", choices=SHAPES, default="1b")
    add("--tokens", type=int, nargs="+", default=[32768, 65536, 131072, 262144])
    add("--plain-tokens", type=int, nargs="*", default=[8192, 16384, 32768, 65536])
    add("--variants", nargs="+", choices=FAST, default=["store", "rebuild"])
    add("--longest", type=int, nargs="*", default=[1048576])
    args = parser.parse_args()
    device = rendezvous.start(Ranks(0, 1, 0, 1, "single"), 60)
    assert device.type == args.device, f"this machine has {device.type}, not {args.device}"
    result = {"plain": plain_points(args.shape, args.plain_tokens, device)}
    gc.collect()
    result["fast"] = fast_points(args.shape, args.tokens, args.variants, args.longest, device)
    print(json.dumps(result))
    rendezvous.stop()


if __name__ == "__main__":
    main()
