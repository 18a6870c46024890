"""The product's own commands: train, kill and resume, export, evaluate, ask. No compiler is within reach.

    python benchmarks/gpu_train.py [--ranks 1] [--device cpu] [--steps 0] [--until 24] [--work FOLDER] [setting ...]

Trains the quickstart's recipe (`--steps`: so many steps of it), once as it is and once with a SIGKILL of all processes
in the middle of the first `--until` steps; both must have the same losses to the bit. Then consolidates, evaluates by
length and asks. CUDA_HOME leads nowhere, as on machines with pip wheels and a driver. Prints one JSON line last.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from ranks import ROOT

from armt_dist.distributed.rendezvous import free_port

LENGTHS = ("5", "10", "20", "50")


def train_command(out: Path, args: argparse.Namespace, *settings: str) -> list[str]:
    """The training command, run by DeepSpeed's launcher."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(args.ranks)]
    ds_config = "zero3.json" if args.device == "cuda" else "zero3_fp32.json"
    own = ["launch/train.py", "--ds_config", f"ds_configs/{ds_config}", "--out", str(out)]
    return [*launcher, "--master_port", str(free_port()), *own, "deterministic=true", *settings, *args.settings]


def losses(out: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm by step; of a step that was made twice, the last."""
    path = out / "metrics.jsonl"
    # A line without an end is being written.
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    steps = {r["step"]: (r["loss"], r["grad_norm"]) for r in records if r["kind"] == "train"}
    return [steps[step] for step in sorted(steps)]


def run(command: list[str], environment: dict) -> float:
    """Seconds of a command. Raises RuntimeError with the end of its output."""
    started = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-4000:]}")
    said = [line for line in done.stdout.splitlines() if line.startswith(("optimizer:", "resumed", "done:", "warning"))]
    print("\n".join(said), flush=True)
    return time.monotonic() - started


def killed(command: list[str], environment: dict, out: Path, step: int) -> int:
    """Start a command, kill all its processes once `step` steps are recorded. Returns the steps that were made."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    while process.poll() is None and len(losses(out)) < step:
        time.sleep(0.05)
    # The launcher puts every rank into a session of its own.
    pids = [json.loads(f.read_text())["pid"] for f in (out / "heartbeat").glob("rank_*.json")]
    for pid in (*pids, process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    return len(losses(out))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, default=1)
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--steps", type=int, default=0, help="0: the whole recipe")
    add("--until", type=int, default=24)
    add("--samples", type=int, default=256)
    add("--work", type=Path, default=None)
    add("settings", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    work = args.work or Path(tempfile.mkdtemp())
    environment = {**os.environ, "CUDA_HOME": "/nonexistent", "OMP_NUM_THREADS": "1"}
    found: dict = {}
    most = [f"train.max_steps={args.steps}"] if args.steps else []
    found["train_s"] = run(train_command(work / "whole", args, *most), environment)
    records = losses(work / "whole")
    found["steps"], found["last loss"] = len(records), records[-1][0]
    short = [f"train.max_steps={args.until}", f"train.save_every={args.until // 4}", "watchdog.heartbeat_s=0.2"]
    command = train_command(work / "killed", args, *short)
    found["killed after"] = killed(command, environment, work / "killed", args.until // 2)
    found["resume_s"] = run(command, environment)
    again = losses(work / "killed")
    found["same bits after the kill"] = again == records[: args.until] and len(again) == args.until
    model = str(work / "hf")
    found["export_s"] = run([sys.executable, "launch/consolidate.py", str(work / "whole"), "--out", model], environment)
    evaluate = [
        "--model",
        model,
        "--lengths",
        *LENGTHS,
        "--samples",
        str(args.samples),
        "--out",
        str(work / "evaluation"),
    ]
    found["evaluate_s"] = run([sys.executable, "launch/evaluate.py", *evaluate, "--device", args.device], environment)
    rows = json.loads((work / "evaluation/evaluation.json").read_text())["rows"]
    found["accuracy"] = {row["length"]: row["accuracy"] for row in rows}
    found["ask_s"] = run([sys.executable, "launch/ask.py", "--model", model, "a:3|7:c|a:5|a?"], environment)
    for name, value in found.items():
        print(f"{name:<28}{str(value)[:400]}")
    print(json.dumps(found))
    return 0 if found["same bits after the kill"] else 1


if __name__ == "__main__":
    sys.exit(main())
