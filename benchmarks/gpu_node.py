"""Two to eight GPUs of one node, in ten minutes: do they hand states on as planned, and what happens when one is lost.

    bash benchmarks/gpu_node.sh                         # all GPUs of this machine
    bash benchmarks/gpu_node.sh --gpus 4 --only wavefront
    bash benchmarks/gpu_node.sh --device cpu --gpus 2   # the same steps with tiny shapes over gloo

Steps, each with a time limit of its own: the environment and the topology; hand-offs and collectives beside what the
planner assumes; one sequence over 2, 4, ... ranks and dp x sp, against one rank, the bound and the plan, with the order
of operations in NCCL's flight record; a rank killed in the middle of a training. Writes OUT/gpu_node_DATE.md and .json.
Exit code: how many steps failed.
"""

import argparse
import datetime
import sys
from pathlib import Path

import torch
from ranks import RESULTS
from steps import Step, run_steps


def environment(found: dict) -> str:
    return f"{found.get('GPU', found['host'])}; {found['product']}; copy {found['copy']}"


def ring(found: dict) -> str:
    hand_off, gather = found["hand-off"], found["all-gather"]
    return (
        f"hand-off {hand_off['gb_per_s']:.3g} GB/s, {hand_off['us']:.0f} us; all-gather {gather['gb_per_s']:.3g} GB/s"
    )


def wavefront(found: dict) -> str:
    rows = [f"sp {row['sp']} x dp {row['dp']}: {row['of_bound']:.0%} of the bound" for row in found["rows"]]
    order = "the same order on all ranks" if found["same_order"] else "OTHER ORDERS ON SOME RANKS"
    return f"{', '.join(rows)}; losses within {found['loss_off']:.1g}; flight record: {found['flight_record']}, {order}"


def killed(found: dict) -> str:
    bits = "same bits" if found["same bits after resume"] else "OTHER BITS"
    return (
        f"all ranks ended {found['ended_after_s']:.0f} s after a SIGKILL, saying: {found['said']}; resumed with {bits}"
    )


def steps(device: str, gpus: int) -> list[Step]:
    """All steps for a device; on a CPU with small shapes."""
    at, ranks = ("--device", device), ("--ranks", str(gpus))
    small = device == "cpu"
    shape = ("--shape", "tiny", "--tokens", "256") if small else ()
    return [
        Step("environment", ("gpu_environment.py", *at), 60, environment),
        Step("ring", ("node_ring.py", *ranks, *(("--mb", "1") if small else ())), 90, ring),
        Step("wavefront", ("node_wavefront.py", *ranks, *shape), 300, wavefront),
        Step("killed", ("node_killed.py", *ranks, *at), 180, killed),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--gpus", type=int, default=torch.cuda.device_count() or 2, help="ranks; all GPUs of the machine unless given")
    add("--out", type=Path, default=RESULTS)
    add("--only", nargs="+", help="names of steps")
    args = parser.parse_args()
    if args.gpus < 2:
        parser.error(f"--gpus {args.gpus}: needs at least two; for one there is benchmarks/gpu.sh")
    chosen = [step for step in steps(args.device, args.gpus) if not args.only or step.name in args.only]
    name = f"gpu_node_{datetime.date.today()}" if args.device == "cuda" else "gpu_node_on_cpu"
    return run_steps(f"{args.gpus} ranks of one node, {args.device}", chosen, args.out, name)


if __name__ == "__main__":
    sys.exit(main())
