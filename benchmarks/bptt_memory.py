"""Segment BPTT against a plain loop: peak memory added by each further segment.

    python benchmarks/bptt_memory.py [--segments 4 8 16 32]

The shape `wide` of plain_loop.py, a row. Each point in a process of its own: `rss` is the peak of the process, with
every large tensor mapped and unmapped by itself so that the allocator hides nothing; `live` is the peak of bytes in the
tensors that the step has made and that are alive. Prints a table and one JSON line last. Speed: speed.py.
"""

import argparse
import json
import os
import resource
import subprocess
import sys

from live_bytes import LiveBytes
from plain_loop import SHAPES, Batch, Step, make_batch

PLAIN, VARIANTS = "plain", ("store", "rebuild", "recompute")
# glibc then maps every tensor of a segment's size by itself, and gives it back when it is freed.
EXACT_RSS = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
FIGURES = {"rss": EXACT_RSS | ONE_THREAD, "live": ONE_THREAD}


def step_of(variant: str, segments: int) -> tuple[Batch, Step]:
    """A batch and the step that the variant takes on it."""
    batch = make_batch(SHAPES["wide"], segments)
    return batch, batch.plain if variant == PLAIN else batch.scheduled(states=variant)


def rss_point(variant: str, segments: int) -> float:
    """Peak MB of a process that takes one step."""
    step_of(variant, segments)[1]()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def live_point(variant: str, segments: int) -> float:
    """Peak MB in tensors made by one step."""
    batch, step = step_of(variant, segments)
    with LiveBytes(t for p in batch.model.parameters() for t in (p, p.grad)) as live:
        step()
    return live.peak_bytes / 1e6


def child(*arguments: object, **environment: str) -> float:
    """What this script's `--point` finds, in a fresh process."""
    command = [sys.executable, __file__, "--point", *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def per_segment(segments: list[int], peaks: list[float]) -> float:
    """The largest MB per further segment between neighbouring lengths."""
    pairs = list(zip(segments, peaks, strict=True))
    return max((b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(pairs, pairs[1:], strict=False))


def main() -> None:
    """Measure and print; MB per further segment by variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        kind, variant, segments = args.point
        print(json.dumps({"rss": rss_point, "live": live_point}[kind](variant, int(segments))))
        return
    print("| states | figure | " + " | ".join(f"S {n}" for n in args.segments) + " | MB per further segment, at most |")
    print("|---" * (len(args.segments) + 3) + "|", flush=True)
    slopes: dict[str, dict[str, float]] = {}
    for variant in (PLAIN, *VARIANTS):
        slopes[variant] = {}
        for figure, environment in FIGURES.items():
            peaks = [child(figure, variant, n, **environment) for n in args.segments]
            slopes[variant][figure] = round(per_segment(args.segments, peaks), 2)
            row = " | ".join(f"{peak:.0f}" for peak in peaks)
            print(f"| {variant} | {figure} MB | {row} | {slopes[variant][figure]:.2f} |", flush=True)
    print(json.dumps({"mb_per_segment": slopes}))


if __name__ == "__main__":
    main()
