"""What keeping graphs costs in memory and saves in time, against a plain loop that keeps everything.

    python benchmarks/speed.py [--segments 16 32] [--repeats 5] [--shape wide | quickstart] [VARIANT ...]

One process with torch's default number of threads; shapes and the loop: plain_loop.py. `again` runs cells again with
the last product of their layer, whose result is known; `grouped` puts weight gradients off; `half the bytes` has a
budget of half of what keeping everything adds. All variants take turns; a variant's speed is the median over turns of
the plain loop's time over its own, so noise common to a turn cancels. Memory: peak bytes in tensors that the step has
made, and how far that is above `keep 0`. Kernels of a cell: cell_kernels.py.
Prints a table per length and one JSON line last.
"""

import argparse
import json
import time
from statistics import median

import torch
from live_bytes import LiveBytes
from plain_loop import SHAPES, Batch, Shape, Step, make_batch
from ranks import table

from armt_dist.schedule.kept_cells import Keep

PLAIN, NOTHING, EVERYTHING, BYTES = "plain loop", "keep 0", "keep 1", "half the bytes"
AGAIN = "keep 0, again"
OPTIONS: dict[str, dict] = {
    NOTHING: {},
    "keep 0.25": {"keep": Keep(0.25)},
    "keep 0.5": {"keep": Keep(0.5)},
    "keep 0.75": {"keep": Keep(0.75)},
    EVERYTHING: {"keep": Keep(1.0)},
    "keep 0, grouped": {"grouped": True},
    "keep 0.5, grouped": {"keep": Keep(0.5), "grouped": True},
    "keep 1, grouped": {"keep": Keep(1.0), "grouped": True},
    "keep 0, rebuild": {"states": "rebuild"},
    "keep 0, recompute": {"states": "recompute"},
    AGAIN: {},
}


def with_last_product(batch: Batch) -> Step:
    """Return a step whose cells are run again as a whole."""
    step = batch.scheduled()

    def whole() -> torch.Tensor:
        names = [layer.last_product for layer in batch.model.layers]
        for layer in batch.model.layers:
            layer.last_product = ""
        loss = step()
        for layer, name in zip(batch.model.layers, names, strict=True):
            layer.last_product = name
        return loss

    return whole


def peak_mb(batch: Batch, step: Step) -> float:
    """Peak in tensors made by one step."""
    with LiveBytes(t for p in batch.model.parameters() for t in (p, p.grad)) as live:
        step()
    return live.peak_bytes / 1e6


def measured(shape: Shape, segments: int, names: list[str], repeats: int) -> list[dict]:
    """A row for the plain loop and each variant."""
    batch = make_batch(shape, segments)
    steps = {PLAIN: batch.plain, **{name: batch.scheduled(**OPTIONS[name]) for name in names if name in OPTIONS}}
    if AGAIN in names:
        steps[AGAIN] = with_last_product(batch)
    losses = {name: step() for name, step in steps.items()}
    peaks = {name: peak_mb(batch, step) for name, step in steps.items()}
    if BYTES in names:
        budget = (peaks[EVERYTHING] - peaks[NOTHING]) / 2
        steps[BYTES] = batch.scheduled(keep=Keep(1.0, budget * 1e6))
        losses[BYTES], peaks[BYTES] = steps[BYTES](), peak_mb(batch, steps[BYTES])
    assert all(torch.isclose(loss, losses[PLAIN], atol=1e-5) for loss in losses.values()), f"not the same: {losses}"
    seconds: dict[str, list[float]] = {each: [] for each in steps}
    for _ in range(repeats):
        for each, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[each].append(time.perf_counter() - start)
    return [
        {
            "variant": each,
            "segments": segments,
            "tokens/s": round(batch.tokens / median(times)),
            "of the plain loop": round(median(p / o for p, o in zip(seconds[PLAIN], times, strict=True)), 3),
            "peak MB": round(peaks[each], 1),
            "above keep 0": round(peaks[each] - peaks[NOTHING], 1),
        }
        for each, times in seconds.items()
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*OPTIONS, BYTES]
    parser.add_argument("variants", nargs="*", metavar="VARIANT", choices=[[], *known], help=", ".join(known))
    parser.add_argument("--segments", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shape", choices=SHAPES, default="wide")
    args = parser.parse_args()
    names = list(dict.fromkeys([NOTHING, EVERYTHING, *(args.variants or known)]))
    rows = [row for n in args.segments for row in measured(SHAPES[args.shape], n, names, args.repeats)]
    columns = list(rows[0])
    print(table(columns, [[row[column] for column in columns] for row in rows]))
    print(json.dumps({"shape": args.shape, "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
