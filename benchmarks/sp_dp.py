"""One sequence over two ranks against two sequences on two ranks and one on one rank, computing for real.

    OMP_NUM_THREADS=1 python benchmarks/sp_dp.py [--segments 16] [--steps 5] [--rounds 3]

The engine with ZeRO-3 over gloo, the shape `wide` of plain_loop.py (8 layers), a row a rank group. On a machine of
two cores, dp 2 is what the two cores can do: there ranks wait for gathers only. All settings take turns, `--rounds`
times, each with new processes; a setting's speed is the median over rounds of its tokens/s over those of dp 2 in the
same round. The bound of sp 2, without halves, is L / (L + sp - 1) = 0.889. Prints a table and one JSON line last.
"""

import argparse
import json
import time
from statistics import median
from typing import NamedTuple

import torch
from plain_loop import SHAPES
from ranks import CPU, real_engine, spawn, table

from armt_dist.schedule.kept_cells import Keep

SHAPE = SHAPES["wide"]
WARM_UP = 2


class Setting(NamedTuple):
    """How many ranks, and how they are used."""

    world: int
    sp: int
    grouped: bool = False
    keep: float = 0.0

    def __str__(self) -> str:
        ranks = "one rank" if self.world == 1 else f"sp {self.sp}" if self.sp > 1 else f"dp {self.world}"
        return f"{ranks}, keep {self.keep:g}" + ", grouped" * self.grouped


SETTINGS = [
    Setting(world, sp, grouped, keep)
    for world, sp in ((2, 1), (1, 1), (2, 2))
    for grouped in (False, True)
    for keep in (0.0, 1.0)
]


def measure(ranks, setting: Setting, segments: int, steps: int) -> float:
    """Tokens per second of all ranks together, of the median step."""
    from armt_dist.runtime.executor import run_backward
    from armt_dist.runtime.piece import cut_piece
    from armt_dist.runtime.sections import ParallelConfig

    layout = ParallelConfig(sp=setting.sp, timeout_s=120)
    ds = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
    }
    options = {"states": "store", "grouped": setting.grouped, "keep": Keep(setting.keep)}
    parts = real_engine(ranks, layout, SHAPE.base, SHAPE.memory, ds, CPU, **options)
    _, engine, armt, grid, mesh = parts
    torch.manual_seed(mesh.dp_rank)
    ids = torch.randint(0, armt.vocab_size, (1, segments * armt.segment_tokens))
    seconds = []
    for _ in range(WARM_UP + steps):
        torch.distributed.barrier()
        start = time.perf_counter()
        totals = engine(cut_piece(ids, ids, None, armt, grid, mesh.sp_rank))
        run_backward(engine, totals.nll * setting.sp / ids.numel())
        engine.step()
        torch.distributed.barrier()
        seconds.append(time.perf_counter() - start)
    return mesh.dp * ids.numel() / median(seconds[WARM_UP:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    speeds: dict[Setting, list[float]] = {setting: [] for setting in SETTINGS}
    for _ in range(args.rounds):
        for setting, found in speeds.items():
            found.append(spawn(setting.world, measure, setting, args.segments, args.steps, timeout_s=300)[0])
    base = speeds[SETTINGS[0]]
    rows = [
        {
            "setting": str(setting),
            "tokens/s": round(median(found)),
            "of dp 2, keep 0": round(median(own / other for own, other in zip(found, base, strict=True)), 3),
        }
        for setting, found in speeds.items()
    ]
    columns = list(rows[0])
    print(table(columns, [[row[column] for column in columns] for row in rows]))
    print(json.dumps({"segments": args.segments, "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
