"""One sequence over the GPUs of a node, and dp x sp: tokens/s, losses, exposed hand-off, order of operations.

    python benchmarks/node_wavefront.py [--ranks 8] [--shape 1b] [--tokens 131072]

Every layout of the ranks, sp = 1, 2, 4, ... with one sequence for each sp group, is a launch of its own: real engine,
ZeRO-3, bfloat16 (float32 on a CPU), recorded cells; the third of three steps counts. A layout's efficiency is its
tokens/s over those of sp = 1 on the same ranks, its bound that of the schedule. NCCL's flight record tells whether all
ranks called the operations of the world's communicator in one order. Prints a table, and JSON last.
"""

import argparse
import json
import pickle
import time

import torch
import torch.distributed as dist
from node import run_ranks, this_rank
from ranks import real_engine, table
from shapes import SHAPES

from armt_dist.config import validate
from armt_dist.distributed import rendezvous
from armt_dist.distributed.collectives import gather_json
from armt_dist.distributed.launchers import Ranks
from armt_dist.monitoring import profile
from armt_dist.runtime.cell_graphs import CellGraphs
from armt_dist.runtime.executor import run_backward
from armt_dist.runtime.piece import cut_piece
from armt_dist.runtime.sections import ParallelConfig
from armt_dist.schedule.grid import efficiency_bound

STEPS = 3


def flight_record() -> list[list] | None:
    """The operations of the default communicator in the order of their calls; None where nothing recorded them."""
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if dump is None or dist.get_backend() != "nccl":
        return None
    entries = pickle.loads(dump(includeCollectives=True, includeStackTraces=False, onlyActive=False))["entries"]
    return [[e["profiling_name"], e["input_sizes"]] for e in entries if e["process_group"][1] == "default_pg"]


def measure(ranks: Ranks, sp: int, shape: str, tokens: int) -> dict:
    """The last step of one layout."""
    device = rendezvous.start(ranks, 120)
    base, memory = SHAPES[shape]
    layout = validate(ParallelConfig, {"sp": sp})
    # Losses of all layouts are compared: nothing is learned.
    optimizer = {"type": "AdamW", "params": {"lr": 1e-20, "weight_decay": 0.0}}
    ds = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "optimizer": optimizer}
    ds["bf16"] = {"enabled": device.type == "cuda"}
    runner, engine, config, grid, mesh = real_engine(ranks, layout, base, memory, ds, device)
    runner.states = "store"
    runner.graphs = CellGraphs() if device.type == "cuda" else None
    torch.manual_seed(1)
    ids = torch.randint(0, base["vocab_size"], (mesh.dp, tokens))[mesh.dp_rank : mesh.dp_rank + 1]
    labels = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], dim=1)
    piece = cut_piece(ids.to(device), labels, None, config, grid, mesh.sp_rank)
    for _ in range(STEPS):
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        totals = engine(piece)
        run_backward(engine, totals.nll * ranks.world_size / (mesh.dp * (tokens - 1)))
        engine.step()
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()
        step_s = time.perf_counter() - started
    # Of the first sequence, which all layouts have.
    nll = totals.nll.detach() * (mesh.dp_rank == 0)
    dist.all_reduce(nll)
    events = profile.collect(runner.trace)
    parts = [profile.summary([e for e in events if e.rank == rank]) for rank in range(ranks.world_size)]
    orders = gather_json(flight_record())
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    rendezvous.stop()
    return {
        "sp": sp,
        "dp": mesh.dp,
        "step_s": step_s,
        "tokens_per_s": mesh.dp * tokens / step_s,
        "loss": float(nll) / (tokens - 1),
        "bound": efficiency_bound(piece.grid),
        "exposed": max(part["exposed_handoff_s"] for part in parts) / step_s,
        "peak_gb": peak,
        "recorded": len(orders[0] or []),
        "same_order": all(order == orders[0] for order in orders),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--sp", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if ranks := this_rank():
        found = measure(ranks, args.sp, args.shape, args.tokens)
        if ranks.rank == 0:
            print(json.dumps(found))
        return
    rows: list[dict] = []
    for sp in (d for d in range(1, args.ranks + 1) if args.ranks % d == 0):
        given = ("--sp", str(sp), "--shape", args.shape, "--tokens", str(args.tokens))
        row = run_ranks(args.ranks, "node_wavefront.py", *given)
        efficiency = row["tokens_per_s"] / rows[0]["tokens_per_s"] if rows else 1.0
        rows.append(row | {"efficiency": efficiency, "of_bound": efficiency / row["bound"]})
        print(f"sp {sp}: {row['step_s']:.2f} s", flush=True)
    columns = {
        "sp": "d", "dp": "d", "step_s": ".2f", "tokens_per_s": ",.0f", "efficiency": ".1%", "bound": ".1%",
        "of_bound": ".1%", "exposed": ".1%", "peak_gb": ".1f", "loss": ".5f",
    }  # fmt: skip
    print(table(list(columns), [[format(row[name], how) for name, how in columns.items()] for row in rows]))
    recorded = sum(row["recorded"] for row in rows)
    found = {
        "rows": rows,
        "loss_off": max(abs(row["loss"] / rows[0]["loss"] - 1) for row in rows),
        "flight_record": f"{recorded:,} operations" if recorded else "none",
        "same_order": all(row["same_order"] for row in rows),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
