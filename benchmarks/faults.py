"""Faults for real: ranks killed at random moments, a rank stopped; and what saving costs.

    python benchmarks/faults.py [--kills 20] [--in_saves 6] [--seed 0] [--skip kills stop cost]

kills  A run of 2 ranks that saves after every step, in the background in every second life. A random rank gets SIGKILL
       at a random moment, `in_saves` times while a checkpoint is being written; the run is started again, until it has
       been killed often enough and comes to its end. After every death `latest` must name a whole checkpoint, and the
       losses of all lives together must be those of the uninterrupted run, bit for bit.
stop   A rank gets SIGSTOP; the others must be gone, with their stacks written, within the watchdog's limit.
cost   Seconds of a step, of a save, and of the pause when saving in the background, in one process of 2 ranks.
Prints a line for each event and one JSON line last.
"""

import argparse
import json
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from ranks import ROOT, model_bytes, spawn, tiny_engine

from armt_dist.checkpoint import folder as checkpoint

# ranks.py has put tests/ on the path.
from support.faults import start  # isort: skip

STEPS, WORLD = 150, 2
SETTINGS = [
    "--ds_config",
    str(ROOT / "ds_configs/zero3_fp32.json"),
    "ds_config.train_batch_size=8",
    "model.base_config.resid_pdrop=0.1",
    f"curriculum.0.steps={STEPS - 4}",
    "curriculum.0.warmup_steps=5",
    "curriculum.1.steps=4",
    "train.save_every=1",
    "train.validate_every=7",
    "train.validation_steps=1",
    "parallel.timeout_s=60",
]
LIMIT_S = 240


def losses(run: Path) -> dict:
    """Loss and gradient norm by kind and step."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {(r["kind"], r["step"]): (r["loss"], r.get("grad_norm")) for r in records if "loss" in r}


def end(ranks: list[subprocess.Popen], limit_s: float = LIMIT_S) -> list[int]:
    """Exit codes, once all have ended; whoever does not end by himself fails the benchmark."""
    deadline = time.monotonic() + limit_s
    for rank in ranks:
        rank.communicate(timeout=max(1, deadline - time.monotonic()))
    return [rank.returncode for rank in ranks]


def strike(ranks: list[subprocess.Popen], run: Path, draw: random.Random, in_save: bool) -> bool | None:
    """Kill a rank of a run that has made a step; whether a checkpoint was left unfinished. None: it ended before."""
    root, before = run / "checkpoints", len(losses(run))
    begun = time.monotonic()
    wait_s = draw.uniform(0.0, 0.7)
    while time.monotonic() - begun < LIMIT_S:
        if any(rank.poll() is not None for rank in ranks):
            return None
        staged = any(root.glob(checkpoint.STAGING + "*"))
        moving = len(losses(run)) > before
        if (in_save and moving and staged) or (not in_save and moving):
            break
        time.sleep(0.002)
    time.sleep(draw.uniform(0.0, 0.01) if in_save else wait_s)
    draw.choice(ranks).send_signal(signal.SIGKILL)
    end(ranks)
    return any(root.glob(checkpoint.STAGING + "*"))


def kills(folder: Path, count: int, in_saves: int, seed: int) -> dict:
    """The lives of one run."""
    draw, whole, killed = random.Random(seed), folder / "whole", folder / "killed"
    assert end(start(WORLD, [*SETTINGS, "--out", whole])) == [0] * WORLD
    deaths = unfinished = lives = 0
    while True:
        lives += 1
        background = f"train.save_in_background={str(lives % 2 == 0).lower()}"
        ranks = start(WORLD, [*SETTINGS, background, "--out", killed])
        if deaths >= count and unfinished >= in_saves:
            assert end(ranks) == [0] * WORLD
            break
        left = strike(ranks, killed, draw, unfinished < in_saves)
        assert left is not None, f"the run was over after {deaths} deaths; raise STEPS"
        deaths, unfinished = deaths + 1, unfinished + left
        tag = (killed / "checkpoints/latest").read_text() if (killed / "checkpoints/latest").exists() else None
        if tag:
            checkpoint.verify_checkpoint(killed / "checkpoints" / tag)
        print(f"death {deaths}: {'in a save' if left else 'between saves'}, latest {tag}, whole", flush=True)
    expected, found = losses(whole), losses(killed)
    assert found == expected, [key for key in expected if found.get(key) != expected[key]]
    return {"kills": deaths, "in_saves": unfinished, "lives": lives, "equal_losses": len(expected)}


def stop(folder: Path, limit_s: float = 20.0) -> dict:
    """A rank is stopped; seconds until the others are gone."""
    run = folder / "stopped"
    limits = [f"watchdog.step_s={limit_s}", f"watchdog.checkpoint_s={limit_s}", "parallel.timeout_s=600"]
    ranks = start(WORLD, [*SETTINGS, *limits, "--out", run])
    while len(losses(run)) < 4:
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    _, errors = ranks[0].communicate(timeout=LIMIT_S)
    gone_s = time.monotonic() - begun
    ranks[1].kill()
    end(ranks[1:])
    assert ranks[0].returncode not in (0, None) and (run / "stacks/rank_0.txt").stat().st_size > 0
    line = [line for line in errors.splitlines() if line.startswith("error")]
    print(f"stopped: gone after {gone_s:.1f} s of {limit_s:g}: {line}", flush=True)
    return {"limit_s": limit_s, "gone_s": round(gone_s, 1)}


def measure_cost(ranks, layout, folder: Path) -> dict | None:
    """Rank 0: seconds of a step, of a save, of the pause of a save in the background, and until that is whole."""
    from armt_dist.checkpoint.save import Saver
    from armt_dist.runtime.executor import run_backward
    from armt_dist.runtime.piece import cut_piece

    runner, engine, armt, grid, mesh = tiny_engine(ranks, layout, 8, 128, width=256)
    savers = {name: Saver(engine, folder / name, name == "background", print) for name in ("waiting", "background")}
    tokens = torch.randint(0, 64, (1, 128 * 8))
    found: dict[str, list[float]] = {}

    def timed(name: str, work) -> None:
        torch.distributed.barrier()
        begun = time.perf_counter()
        work()
        found.setdefault(name, []).append(time.perf_counter() - begun)

    def step() -> None:
        totals = engine(cut_piece(tokens, tokens, None, armt, grid, mesh.sp_rank))
        run_backward(engine, totals.nll / tokens.numel())
        engine.step()

    for number in range(5):
        timed("step", step)
        for name, saver in savers.items():
            timed(name, lambda saver=saver, number=number: saver.save(checkpoint.tag_of(number), {"progress": {}}))
        timed("written", savers["background"].wait)
    result = {name: median(seconds[1:]) for name, seconds in found.items()}
    size = sum(path.stat().st_size for path in (folder / "waiting" / checkpoint.tag_of(0)).iterdir())
    return {**result, "checkpoint_mb": size / 1e6, "model_mb": model_bytes(runner) / 1e6}


def cost(folder: Path) -> dict:
    """As fractions of a step."""
    from armt_dist.runtime.sections import ParallelConfig

    found = spawn(WORLD, measure_cost, ParallelConfig(), folder, timeout_s=500)[0]
    ratios = {name: round(found[name] / found["step"], 3) for name in ("waiting", "background")}
    print(f"saving {found['checkpoint_mb']:.0f} MB, in steps of {found['step']:.2f} s: {ratios}", flush=True)
    return {**{name: round(value, 3) for name, value in found.items()}, "of_a_step": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--in_saves", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", nargs="*", choices=("kills", "stop", "cost"), default=[])
    args = parser.parse_args()
    result: dict[str, object] = {"benchmark": "faults"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "cost" not in args.skip:
            result["cost"] = cost(folder / "cost")
        if "stop" not in args.skip:
            result["stop"] = stop(folder)
        if "kills" not in args.skip:
            result["kills"] = kills(folder, args.kills, args.in_saves, args.seed)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
