"""What the recipes learn, through the product's own commands: train in legs, export, evaluate by length; seeds kept.

    OMP_NUM_THREADS=1 python benchmarks/learn.py rewrite [--seeds 0 1 2] [--ranks 2] [--work FOLDER] [--list]

A leg is one run of launch/train.py on the recipe's YAML with a curriculum and a batch of its own, which starts from the
export of the leg before. Every leg's export is evaluated. Results go to results/learn_NAME.json, .md and .png, with the
commands; folders that are there already are not made again. Prints one JSON line last.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, pstdev
from typing import NamedTuple

from ranks import RESULTS, ROOT, heading

from armt_dist.parallel import free_port
from armt_dist.plots import Curve, Panel, draw

BIN = Path(sys.executable).parent


class Leg(NamedTuple):
    """One run: its name, its curriculum, its batch, and what else it sets."""

    name: str
    curriculum: str
    batch: int = 256
    settings: tuple[str, ...] = ()


class Experiment(NamedTuple):
    """A recipe of launch/configs, changed by `settings`, in legs; lengths at which each leg is evaluated."""

    recipe: str
    legs: tuple[Leg, ...]
    lengths: tuple[int, ...]
    settings: tuple[str, ...] = ()
    samples: int = 512
    metric: str = "accuracy"
    evaluation: tuple[str, ...] = ()  # more arguments of launch/evaluate.py


UNTIL = "until: {accuracy: 0.97, over: 50}"
START = f"{{pairs: 5, steps: 2500, warmup_steps: 100, {UNTIL}}}"
TO_10 = Leg("10", f"[{START}, {{pairs: 10, steps: 120}}]")
TO_40 = Leg(
    "40",
    "[{pairs: 20, at_least: 0.3, steps: 60, lr: 5.0e-4}, "
    "{pairs: 40, at_least: 0.3, steps: 120, lr: 5.0e-4, schedule: cosine, final: 0.1}]",
    batch=96,
)
TO_120 = Leg("120", "[{pairs: 120, at_least: 0.3, steps: 100, lr: 5.0e-4, schedule: cosine, final: 0.1}]", batch=24)
LONG_10 = Leg("10", f"[{START}, {{pairs: 10, steps: 400}}]")
LONG_20 = Leg("20", "[{pairs: 20, at_least: 0.3, steps: 300, lr: 5.0e-4, schedule: cosine, final: 0.1}]", batch=128)
REWRITE, REMEMBER = "retrieval_rewrite_cpu.yaml", "retrieval_remember_cpu.yaml"
PAIRS = (5, 10, 20, 50, 100, 200, 500)
TWO = ("data.retrieval.key_length=2", "model.d_mem=32")

EXPERIMENTS = {
    "rewrite": Experiment(REWRITE, (TO_10, TO_40, TO_120), PAIRS),
    "rewrite_no_denominator": Experiment(REWRITE, (TO_10, TO_40), PAIRS, ("model.use_denom=false",)),
    "rewrite_two_symbols": Experiment(REWRITE, (LONG_10, LONG_20), PAIRS[:-2], TWO),
    # RMT: a rate and an initialisation of its own, and four times the steps.
    **{
        f"rmt_rewrite_lr_{lr}": Experiment(
            REWRITE,
            (
                Leg(
                    "10",
                    f"[{{pairs: 5, steps: 1600, warmup_steps: 100, lr: {lr}, {UNTIL}}}, {{pairs: 10, steps: 480}}]",
                ),
            ),
            PAIRS[:-1],
            ("model.memory_kind=rmt", "parallel.schedule=segment_major", "model.base_config.n_positions=32"),
        )
        for lr in ("3.0e-4", "1.0e-3", "3.0e-3")
    },
    **{
        f"babilong_{task}": Experiment(
            "babilong_cpu.yaml",
            (
                Leg(
                    "4",
                    f"[{{segments: 2, at_least: 1.0, steps: 1200, warmup_steps: 100, {UNTIL}}}, "
                    "{segments: 4, steps: 300, schedule: cosine, final: 0.1}]",
                    128,
                ),
            ),
            (2, 4, 8, 16, 32, 64, 128, 256),
            (f"data.babilong.tasks=[{task}]",),
            samples=256,
        )
        for task in ("qa1", "qa2")
    },
    **{
        f"remember_d_mem_{d_mem}": Experiment(REMEMBER, (LONG_10, LONG_20), PAIRS[:-1], (f"model.d_mem={d_mem}",))
        for d_mem in (16, 32, 64)
    },
}


def call(command: list[str], log: Path) -> float:
    """Run a command of the product; seconds. Its output goes to `log`. Raises RuntimeError with the end of it."""
    started = time.monotonic()
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT).returncode
    if code:
        raise RuntimeError(f"{shlex.join(command)}: exit code {code}\n{log.read_text()[-2000:]}")
    return time.monotonic() - started


def train_command(experiment: Experiment, leg: Leg, base: Path | None, run: Path, seed: int, ranks: int) -> list[str]:
    """The training command of one leg."""
    fresh = [] if base is None else [f"model.base={base}", "model.base_config=null", "model.init=null"]
    return [
        *(str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port())),
        *("launch/train.py", "--ds_config", "ds_configs/zero3_fp32.json"),
        *("--config", f"launch/configs/{experiment.recipe}", "--out", str(run)),
        *(f"train.seed={seed}", f"data.seed={seed}", f"ds_config.train_batch_size={leg.batch}"),
        *(f"curriculum={leg.curriculum}", *fresh, *experiment.settings, *leg.settings),
    ]


def legs(experiment: Experiment, work: Path, seed: int, ranks: int) -> Iterator[dict]:
    """Train, export and evaluate leg after leg."""
    base = None
    for leg in experiment.legs:
        run, hf, scores = (work / f"seed{seed}_{leg.name}{end}" for end in ("", "_hf", "_scores"))
        command = train_command(experiment, leg, base, run, seed, ranks)
        if not (scores / "evaluation.json").exists():
            work.mkdir(parents=True, exist_ok=True)
            call(command, work / f"{run.name}.log")
            call([sys.executable, "launch/consolidate.py", str(run), "--out", str(hf)], work / f"{hf.name}.log")
            lengths = ["--lengths", *map(str, experiment.lengths), "--samples", str(experiment.samples)]
            evaluate = [sys.executable, "launch/evaluate.py", "--model", str(hf), "--out", str(scores), *lengths]
            call([*evaluate, *experiment.evaluation], work / f"{scores.name}.log")
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [record for record in records if record["kind"] == "train"]
        rows = json.loads((scores / "evaluation.json").read_text())["rows"]
        yield {
            "leg": leg.name,
            "seed": seed,
            "steps": len(steps),
            "training_s": round(sum(step["step_s"] for step in steps)),
            "score": {row["length"]: row[experiment.metric] for row in rows},
            "command": " ".join(shlex.quote(word) for word in command[5:]).replace(str(work), "WORK"),
        }
        base = hf


def report(name: str, experiment: Experiment, found: list[dict]) -> None:
    """Table and plot: the mean over seeds, and its spread where there are several."""
    text = [f"# {name}: {experiment.metric} by length", heading("learn.py")]
    header = ["trained on at most", "seeds", "steps", "training s", *map(str, experiment.lengths)]
    table, curves = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"], []
    for leg in experiment.legs:
        rows = [row for row in found if row["leg"] == leg.name]
        if not rows:
            continue
        columns = [[row["score"][n] for row in rows] for n in experiment.lengths]
        cells = [f"{fmean(c):.3f}" + (f" ± {pstdev(c):.3f}" if len(c) > 1 else "") for c in columns]
        steps, seconds = (", ".join(str(row[key]) for row in rows) for key in ("steps", "training_s"))
        seeds = ", ".join(str(row["seed"]) for row in rows)
        table.append(f"| {leg.name} | {seeds} | {steps} | {seconds} | " + " | ".join(cells) + " |")
        curves.append(Curve(f"trained on at most {leg.name}", list(experiment.lengths), [fmean(c) for c in columns]))
    commands = "\n".join(f"deepspeed --num_gpus 2 {row['command']}" for row in found)
    text += ["\n".join(table), f"Mean ± standard deviation over seeds; {experiment.samples} samples a length.",
             f"![by length](learn_{name}.png)", f"```\n{commands}\n```"]  # fmt: skip
    (RESULTS / f"learn_{name}.md").write_text("\n\n".join(text) + "\n")
    (RESULTS / f"learn_{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    draw([Panel("pairs or segments", experiment.metric, curves)], RESULTS / f"learn_{name}.png", name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder of the runs (default: a temporary one)")
    args = parser.parse_args()
    experiment, found = EXPERIMENTS[args.name], []
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as scratch:
        work = (args.work or Path(scratch)).resolve() / args.name
        for seed in args.seeds:
            for row in legs(experiment, work, seed, args.ranks):
                found.append(row)
                print(
                    json.dumps({key: row[key] for key in ("leg", "seed", "steps", "training_s", "score")}),
                    flush=True,
                )
                # After each: the next may be cut short.
                report(args.name, experiment, found)
    print(json.dumps({"benchmark": "learn", "name": args.name, "rows": found}))


if __name__ == "__main__":
    main()
