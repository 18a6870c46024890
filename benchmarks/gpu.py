"""The first hour on a GPU, in ten minutes: is everything right, how fast is it, how long a sequence fits.

    bash benchmarks/gpu.sh                              # one GPU, a Llama-3.2-1B shape
    bash benchmarks/gpu.sh --device cpu                 # the same steps with tiny shapes, on a CPU
    bash benchmarks/gpu.sh --only parity kernels --out /tmp/found

Steps, each with a time limit of its own: the environment; parity of every path with the plain loop; attention kernels,
launches and host waits of a step; tokens/s and peak memory beside a plain loop and the planner; the longest sequence;
the product's own commands, killed and resumed. Writes OUT/gpu_DATE.md and .json. Exit code: how many steps failed.
"""

import argparse
import datetime
import sys
from pathlib import Path

from ranks import RESULTS
from steps import Step, run_steps


def environment(found: dict) -> str:
    return f"{found.get('GPU', found['host'])}; {found['product']}; copy {found['copy']}"


def parity(found: dict) -> str:
    wrong = ", ".join(f"{row['path']} {row['dtype']}" for row in found["wrong"])
    return f"{found['right']} of {found['paths']} paths are right" + (f"; wrong: {wrong}" if wrong else "")


def kernels(found: dict) -> str:
    plain = found["as it is"]
    waits = sum(sum(each["waits_inside"].values()) for each in found.values())
    return (
        f"a cell: {plain['forward']:.2f} ms forward, {plain['backward']:.2f} ms backward, "
        f"{plain['launches_per_cell']:.0f} launches, device {plain['device_ms_per_cell']:.2f} ms; "
        f"host waits inside: {waits}"
    )


def speed(found: dict) -> str:
    fast = {name: row["measured"] for name, row in found["fast"].items() if row["measured"]}
    plain = {name: row for name, row in found["plain"].items() if row}
    best = max(fast.values(), key=lambda row: row["tokens_per_s"])
    other = max(plain.values(), key=lambda row: row["tokens_per_s"], default=None)
    longest = max(fast, key=lambda name: int(name.split()[-1]))
    against = f", plain loop {other['tokens_per_s']:,.0f}" if other else ""
    return f"{best['tokens_per_s']:,.0f} tokens/s{against}; longest sequence that ran: {longest}"


def training(found: dict) -> str:
    bits = "same bits" if found["same bits after the kill"] else "OTHER BITS"
    return f"{bits} after a kill; accuracy {found['accuracy']}; {found['train_s']:.0f} s of training and start"


def steps(device: str, quick: bool) -> list[Step]:
    """All steps for a device; on a CPU, or quickly, with small shapes."""
    at = ("--device", device)
    small = device == "cpu"
    tiny = ("--shape", "tiny") if small else ()
    lengths = ("--tokens", "128", "256", "--plain-tokens", "128", "--longest", "512")
    if not small:
        lengths = ("--tokens", "32768", "--plain-tokens", "8192", "16384", "--longest") if quick else ()
    grid = ("--segments", "4", "--layers", "2") if small else ()
    few = ("--steps", "26", "--samples", "16") if small or quick else ()
    light = ("ds_config.train_batch_size=16",) if small else ()
    return [
        Step("environment", ("gpu_environment.py", *at), 60, environment),
        # A slow CPU needs two minutes for the first.
        Step("parity", ("gpu_parity.py", *at), 400 if small else 120, parity),
        Step("kernels", ("gpu_kernels.py", *at, *tiny, *grid), 200 if small else 90, kernels),
        Step("speed", ("gpu_speed.py", *at, *tiny, *lengths), 100 if quick else 280, speed),
        Step("train", ("gpu_train.py", *at, *few, *light), 500 if small else 240, training),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--out", type=Path, default=RESULTS)
    add("--only", nargs="+", help="names of steps")
    add("--quick", action="store_true", help="one length, a few training steps")
    args = parser.parse_args()
    chosen = [step for step in steps(args.device, args.quick) if not args.only or step.name in args.only]
    name = f"gpu_{datetime.date.today()}" if args.device == "cuda" else "gpu_on_cpu"
    return run_steps("One GPU" if args.device == "cuda" else "The steps for a GPU, on a CPU", chosen, args.out, name)


if __name__ == "__main__":
    sys.exit(main())
