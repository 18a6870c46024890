"""A rank of a training is killed: how long until all others have ended, what is said, and are the bits the same later.

    python benchmarks/node_killed.py [--ranks 2] [--device cpu] [--steps 16] [setting ...]

Trains the quickstart's recipe once undisturbed. Then again, with a SIGKILL of the last rank in the middle, and once
more to the end. Prints one JSON line last; exit code 1 where a process is left or bits differ.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from gpu_train import losses, run, train_command
from ranks import ROOT

# Seconds that a rank may live on without the one that was killed.
LIMIT_S = 90


def ranks_of(out: Path) -> dict[int, int]:
    """Process of every rank of a run, from its heartbeats."""
    files = sorted((out / "heartbeat").glob("rank_*.json"))
    return {int(f.stem.split("_")[1]): json.loads(f.read_text())["pid"] for f in files}


def kill_last_rank(command: list[str], environment: dict, out: Path, step: int) -> tuple[float, str]:
    """Kill the last rank at a step. Returns the seconds until all others had ended, and the line that says why."""
    with (out.parent / "killed.log").open("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while len(losses(out)) < step:
                if process.poll() is not None:
                    raise RuntimeError(f"the training ended by itself:\n{Path(log.name).read_text()[-3000:]}")
                time.sleep(0.05)
            pids = ranks_of(out)
            os.kill(pids[max(pids)], signal.SIGKILL)
            killed = time.monotonic()
            others = [psutil.Process(pid) for rank, pid in pids.items() if rank != max(pids) and psutil.pid_exists(pid)]
            _, alive = psutil.wait_procs(others, timeout=LIMIT_S)
            ended_s = time.monotonic() - killed
            process.wait(timeout=LIMIT_S)
        finally:
            for pid in (*ranks_of(out).values(), process.pid):
                if psutil.pid_exists(pid):
                    os.kill(pid, signal.SIGKILL)
    if alive:
        raise RuntimeError(f"{len(alive)} ranks were still there {LIMIT_S} s after the last one was killed")
    lines = Path(log.name).read_text().splitlines()
    return ended_s, next((line for line in lines if "lost" in line), "nothing about a lost rank")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, default=2)
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--steps", type=int, default=16)
    add("settings", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    work = Path(tempfile.mkdtemp())
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    most = [f"train.max_steps={args.steps}", f"train.save_every={args.steps // 4}", "watchdog.heartbeat_s=0.2"]
    most.append(f"ds_config.train_batch_size={8 * args.ranks}")
    run(train_command(work / "whole", args, *most), environment)
    command = train_command(work / "killed", args, *most)
    ended_s, said = kill_last_rank(command, environment, work / "killed", args.steps // 2)
    print(f"all ranks had ended after {ended_s:.1f} s: {said}", flush=True)
    run(command, environment)
    whole, again = losses(work / "whole"), losses(work / "killed")
    found = {"ended_after_s": ended_s, "said": said, "same bits after resume": whole == again, "steps": len(again)}
    print(json.dumps(found))
    return 0 if whole == again and len(again) == args.steps else 1


if __name__ == "__main__":
    sys.exit(main())
