"""The wavefront against its bound: real engine, hand-off and gathers over gloo, cells of an emulated length.

    OMP_NUM_THREADS=1 python benchmarks/wavefront.py [--sp 2 4 8 16] [--cell_ms 100] [--profile]

Every rank is a process. From outside, sleeps are put in the place of every cell (`ranks.emulate`), so that 16 ranks
fit on 2 cores: forward, re-run, gradients of inputs and gradients of weights of a chunk take a cell's time each, four
units of work. All around the cells is the product's. Measured from the third step on, from the first rank's start to
the last rank's end, as a share of the time in which one rank would do the four units of each of its cells. Ways: weight
gradients per cell or grouped (put off by the schedule), all graphs kept or none, and a re-run that takes three quarters
of a cell, as one without a Llama layer's last product does. Writes results/wavefront.md, with --profile a timeline as
PNG and Chrome trace beside it, and prints one JSON line last.
"""

import argparse
import json
import time
from statistics import fmean
from typing import NamedTuple

import torch
from ranks import RESULTS, Emulated, emulate, heading, model_bytes, spawn, tiny_engine

from armt_dist.schedule.grid import Grid
from armt_dist.schedule.simulator import Costs, simulate_step

TITLE = "# The wavefront against its bound"
LAYERS, STEPS, WARM_UP = 16, 5, 2
SEGMENT_TOKENS = 8


class Way(NamedTuple):
    """How the cells of a layout are run."""

    grouped: bool = False
    keep: float = 0.0
    rerun: float = 1.0

    def __str__(self) -> str:
        return f"{'grouped' if self.grouped else 'per cell'}, keep {self.keep:g}, re-run {self.rerun:g}"


PER_CELL, GROUPED, SHORT, KEPT = Way(), Way(True), Way(True, rerun=0.75), Way(True, keep=1.0)
# sp, rounds, chunks -> ways
LAYOUTS = {
    (2, 1, 1): (PER_CELL, GROUPED, SHORT, KEPT),
    (4, 1, 1): (PER_CELL, GROUPED, SHORT, KEPT),
    (8, 1, 1): (PER_CELL, GROUPED, SHORT, KEPT),
    (16, 1, 1): (PER_CELL, GROUPED, SHORT, KEPT),
    (4, 1, 2): (PER_CELL, GROUPED),
    (4, 2, 1): (PER_CELL, GROUPED),
}
HEADER = (
    "| sp | R | M_c | weight gradients, kept graphs, a re-run over a cell | efficiency | simulated | makespan s "
    "| simulated s | exposed hand-off | skew s | gather wait | gathered / model | reduced / model | CPU s a rank |\n"
    + "|---" * 14
    + "|"
)


def measure(ranks, layout, way: Way, cell_s: float) -> list[tuple]:
    """Per measured step: all ranks' events; this rank's bytes gathered and reduced over the model's, CPU seconds."""
    from armt_dist.monitoring import profile
    from armt_dist.runtime.executor import run_backward
    from armt_dist.runtime.piece import cut_piece
    from armt_dist.schedule.kept_cells import Keep
    from armt_dist.zero3.collective_bytes import CollectiveBytes

    torch.manual_seed(ranks.rank)
    options = {"keep": Keep(way.keep), "grouped": way.grouped}
    runner, engine, armt, grid, mesh = tiny_engine(ranks, layout, LAYERS, SEGMENT_TOKENS, **options)
    emulate(runner, Emulated.units(cell_s, way.rerun))
    traffic, found = CollectiveBytes(), []
    tokens = torch.randint(0, 64, (layout.chunks, SEGMENT_TOKENS * layout.sp * layout.rounds))
    for step in range(STEPS):
        before, cpu_s = (traffic.gathered_bytes, traffic.reduced_bytes), time.process_time()
        totals = engine(cut_piece(tokens, tokens, None, armt, grid, mesh.sp_rank))
        run_backward(engine, totals.nll * ranks.world_size / tokens.numel())
        after, cpu_s = (traffic.gathered_bytes, traffic.reduced_bytes), time.process_time() - cpu_s
        engine.step()
        events = profile.collect(runner.trace)
        if step >= WARM_UP:
            moved = ((b - a) / model_bytes(runner) for a, b in zip(before, after, strict=True))
            found.append((events, *moved, cpu_s))
    return found


def row(layout, way: Way, cell_s: float, steps: list[tuple]) -> dict:
    """One line of the table: means over the measured steps."""
    from armt_dist.monitoring import profile

    grid = Grid(layout.sp * layout.rounds, LAYERS, layout.sp, layout.rounds, layout.chunks)
    costs = Costs(cell_s * layout.chunks, rerun_ratio=way.rerun, keep=way.keep, weight_ratio=float(way.grouped))
    simulated = simulate_step("wavefront", grid, costs)
    # Forward, re-run and backward of all units, and nothing else.
    ideal_s = 4 * cell_s * grid.units
    makespans, parts = [], []
    for events, *_ in steps:
        makespans.append(max(e.end_s for e in events) - min(e.start_s for e in events))
        parts += [profile.summary([e for e in events if e.rank == rank]) for rank in range(layout.sp)]
    makespan_s = fmean(makespans)
    return {
        "sp": layout.sp,
        "rounds": layout.rounds,
        "chunks": layout.chunks,
        "way": str(way),
        "efficiency": ideal_s / makespan_s,
        "simulated": ideal_s / simulated.makespan_s,
        "makespan_s": makespan_s,
        "slowest_s": max(makespans),
        "simulated_s": simulated.makespan_s,
        "exposed_handoff": fmean(part["exposed_handoff_s"] for part in parts) / makespan_s,
        "skew_s": fmean(part["skew_s"] for part in parts),
        "gather_wait": fmean(part["gather_wait_s"] for part in parts) / makespan_s,
        "gathered": max(step[1] for step in steps),
        "reduced": max(step[2] for step in steps),
        "cpu_s": fmean(step[3] for step in steps),
    }


def line(r: dict) -> str:
    return (
        f"| {r['sp']} | {r['rounds']} | {r['chunks']} | {r['way']} | **{r['efficiency']:.3f}** "
        f"| {r['simulated']:.3f} | {r['makespan_s']:.3f} | {r['simulated_s']:.3f} | {r['exposed_handoff']:.2%} "
        f"| {r['skew_s']:.2f} | {r['gather_wait']:.2%} | {r['gathered']:.2f} | {r['reduced']:.2f} | {r['cpu_s']:.2f} |"
    )


def main() -> None:
    from armt_dist.monitoring import profile
    from armt_dist.runtime.sections import ParallelConfig

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sp", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--cell_ms", type=float, default=100)
    parser.add_argument("--profile", action="store_true", help="also a timeline of the last step")
    args = parser.parse_args()
    rows = []
    for (sp, rounds, chunks), ways in LAYOUTS.items():
        for way in ways if sp in args.sp else ():
            layout = ParallelConfig(sp=sp, rounds=rounds, chunks=chunks, timeout_s=120)
            steps = spawn(sp, measure, layout, way, args.cell_ms / 1e3, timeout_s=500)[0]
            rows.append(row(layout, way, args.cell_ms / 1e3, steps))
            print(line(rows[-1]), flush=True)
            if args.profile and (rounds, chunks, way) == (1, 1, GROUPED):
                profile.write_profile(steps[-1][0], RESULTS, f"wavefront_sp{sp}")
            # After each row: the next may be cut short.
            text = "\n".join([HEADER, *map(line, rows)])
            (RESULTS / "wavefront.md").write_text(f"{TITLE}\n\n{heading('wavefront.py')}\n\n{text}\n")
    print(json.dumps({"benchmark": "wavefront", "cell_ms": args.cell_ms, "layers": LAYERS, "rows": rows}))


if __name__ == "__main__":
    main()
