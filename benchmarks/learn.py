"""What the recipes learn, through the product's own commands: train in legs, export, evaluate by length; seeds kept.

    OMP_NUM_THREADS=1 python benchmarks/learn.py rewrite [--seeds 0 1 2] [--ranks 2] [--work FOLDER] [--until LEG]

The experiments are those of experiments.py. Every leg's export is evaluated. Results go to results/learn_NAME.json, .md
and .png, with the commands; folders that are there already are not made again. Prints one JSON line last.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from experiments import EXPERIMENTS, Experiment, Leg
from ranks import RESULTS, ROOT, commit, heading, mean, table

from armt_dist.distributed.rendezvous import free_port
from armt_dist.evaluation.charts import Curve, Panel, draw

BIN = Path(sys.executable).parent
# Steps of training that make one point of a curve.
POINT = 20


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
    settings, of_a_new_model = [*experiment.settings, *leg.overrides], "model.base_config."
    if base is not None:
        settings = [setting for setting in settings if not setting.startswith(of_a_new_model)]
        settings = [f"model.base={base}", "model.base_config=null", "model.init=null", *settings]
    return [
        *(str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port())),
        *("launch/train.py", "--ds_config", "ds_configs/zero3_fp32.json"),
        *("--config", f"launch/configs/{experiment.recipe}", "--out", str(run)),
        *(f"train.seed={seed}", f"data.seed={seed}", f"ds_config.train_batch_size={leg.batch}"),
        *settings,
    ]


def legs(experiment: Experiment, work: Path, seed: int, ranks: int) -> Iterator[dict]:
    """Train, export and evaluate leg after leg; yield those that are evaluated."""
    base = None
    for leg in experiment.legs:
        run, hf, scores = (work / f"seed{seed}_{leg.name}{end}" for end in ("", "_hf", "_scores"))
        started_at = work / f"{run.name}.commit"
        command = train_command(experiment, leg, base, run, seed, ranks)
        if not (hf / "config.json").exists():
            work.mkdir(parents=True, exist_ok=True)
            started_at.write_text(commit())
            call(command, work / f"{run.name}.log")
            call([sys.executable, "launch/consolidate.py", str(run), "--out", str(hf)], work / f"{hf.name}.log")
        base = hf
        if not leg.evaluated:
            continue
        if not (scores / "evaluation.json").exists():
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
            "commit": started_at.read_text().strip() if started_at.exists() else commit(),
            "score": {row["length"]: row[experiment.metric] for row in rows},
            "curve": curve(steps),
            "command": " ".join(shlex.quote(word) for word in command[5:]).replace(str(work), "WORK"),
        }


def curve(steps: list[dict]) -> dict[str, list[float]]:
    """Means over every `POINT` training records of what they hold of a loss and an accuracy."""
    pieces = [steps[i : i + POINT] for i in range(0, len(steps), POINT)]
    names = [name for name in ("loss", "accuracy", "key_blind") if name in steps[0]]
    means = {name: [round(fmean(step[name] for step in piece), 4) for piece in pieces] for name in names}
    return {"step": [piece[-1]["step"] for piece in pieces], **means}


def held(lengths: Sequence[int], columns: list[list[float]], values: int) -> list[str]:
    """Pairs in the memory by the paper's estimate, the others being guessed among `values` ones (ARMT paper).

    Below the accuracy of a guess there are none.
    """
    return [
        f"{max(0.0, n * (values * fmean(c) - 1) / (values - 1)):.1f}" for n, c in zip(lengths, columns, strict=True)
    ]


def report(name: str, experiment: Experiment, found: list[dict]) -> None:
    """Table and plot: the mean over seeds, and its spread where there are several."""
    text = [f"# {name}: {experiment.metric} by length", heading("learn.py")]
    header = ["trained on at most", "seeds", "steps", "training s", *map(str, experiment.lengths)]
    lines, curves = [], []
    for leg in experiment.legs:
        rows = [row for row in found if row["leg"] == leg.name]
        if not rows:
            continue
        columns = [[row["score"][n] for row in rows] for n in experiment.lengths]
        steps, seconds = (", ".join(str(row[key]) for row in rows) for key in ("steps", "training_s"))
        seeds = ", ".join(str(row["seed"]) for row in rows)
        lines.append([leg.name, seeds, steps, seconds, *map(mean, columns)])
        curves.append(Curve(f"trained on at most {leg.name}", list(experiment.lengths), [fmean(c) for c in columns]))
        if experiment.values:
            name_of = f"pairs held after {leg.name}: n (vα - 1) / (v - 1)"
            lines.append([name_of, "", "", "", *held(experiment.lengths, columns, experiment.values)])
    commands = "\n".join(f"deepspeed --num_gpus 2 {row['command']}" for row in found)
    commits = ", ".join(sorted({row["commit"] for row in found}))
    spread = f"Mean ± standard deviation over seeds; up to {experiment.samples} samples a length; trained at {commits}."
    text += [table(header, lines), spread, f"![by length](learn_{name}.png)", f"```\n{commands}\n```"]  # fmt: skip
    (RESULTS / f"learn_{name}.md").write_text("\n\n".join(text) + "\n")
    (RESULTS / f"learn_{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    draw([Panel(experiment.unit, experiment.metric, curves)], RESULTS / f"learn_{name}.png", name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--until", help="the last leg to train (default: all)")
    parser.add_argument("--work", type=Path, help="folder of the runs (default: a temporary one)")
    args = parser.parse_args()
    experiment, found = EXPERIMENTS[args.name], []
    names = [leg.name for leg in experiment.legs]
    if args.until not in (None, *names):
        parser.error(f"--until {args.until}: no such leg of {args.name}; one of {', '.join(names)}")
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
                if row["leg"] == args.until:
                    break
    print(json.dumps({"benchmark": "learn", "name": args.name, "rows": found}))


if __name__ == "__main__":
    main()
