"""What more ranks cost on one machine: a start, a step, a checkpoint; a tiny model, gloo, the real launcher and engine.

    OMP_NUM_THREADS=1 python benchmarks/scale_ranks.py [start] [step] [checkpoint] [--ranks 1 2 4 8] [--folder .]

start       torchrun and launch/train.py to the end of their first step: seconds from the launch to there; processor
            seconds and anonymous memory of a rank; files that a rank opened and folders that it listed or changed
            (imports, most of them); the same of all ranks together in the run folder
step        the engine's steps, every rank with a sequence (dp) and all with one (sp), 4 layers of width 128, 8 segments
            of 64 tokens
checkpoint  a model of width 256 saved and then verified by all ranks; MB/s are of all together

Ranks share the cores, so that seconds of the clock grow with them in any case; processor seconds of a rank need not,
and are those to look at. Prints a Markdown table for each piece with the fitted laws, and one JSON line last.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median

import torch
from measures import MB, FileEvents, exponent, memory
from ranks import ROOT, heading, spawn, table, tiny_engine

from armt_dist.runtime.sections import ParallelConfig

START = ["model.base_config.n_embd=32", "train.max_steps=1", "train.validation_steps=1", "model.d_mem=8"]
SEGMENTS, TOKENS, STEPS = 8, 64, 5
# Of a start or a world of ranks; with other work on the machine all takes several times as long.
LIMIT_S = 1800


def start(world: int, folder: Path) -> dict[str, float]:
    """Start a run of `world` ranks as a user does; the mean rank, the highest where it is time or memory."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
    arguments = ["--ds_config", str(ROOT / "ds_configs/zero3_fp32.json"), "--out", str(folder / "run"), *START]
    command = [*launcher, __file__, "--one", str(folder), "--", *arguments, f"ds_config.train_batch_size={world}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "STARTED": str(time.time())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S, cwd=folder)
    if done.returncode:
        sys.exit(f"start of {world} ranks: {done.stderr[-3000:]}")
    ranks = [json.loads(path.read_text()) for path in folder.glob("rank_*.json")]
    assert len(ranks) == world, f"{len(ranks)} of {world} ranks have reported"
    highest = {key: max(rank[key] for rank in ranks) for key in ("seconds", "rank_mb")}
    means = {key: fmean(rank[key] for rank in ranks) for key in ("cpu_s", "files")}
    return highest | means | {"run_folder_of_all": sum(rank["run_files"] for rank in ranks)}


def rank_of_start(folder: Path, arguments: list[str]) -> None:
    """Be one rank of `start`: the training command, which reports at the end of its first step."""
    events = FileEvents(folder / "run")
    # As tests/support/faults.py does.
    from armt_dist.training import trainer

    original = trainer.train_step

    def train_step(*args):
        result = original(*args)
        found = {
            "seconds": time.time() - float(os.environ["STARTED"]),
            "cpu_s": time.process_time(),
            "rank_mb": memory("RssAnon") / MB,
            "files": events.all,
            "run_files": events.inside,
        }
        (folder / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(found))
        return result

    trainer.train_step = train_step
    launch = str(ROOT / "launch/train.py")
    sys.argv = [launch, *arguments]
    runpy.run_path(launch, run_name="__main__")


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Seconds of some collective work by the clock, which begins for all ranks at once, and of this processor."""
    torch.distributed.barrier()
    began, used = time.perf_counter(), time.process_time()
    work()
    return {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - used}


def make_step(engine, armt, grid, mesh, tokens: torch.Tensor) -> None:
    """One optimizer step on the rank's part of some tokens."""
    from armt_dist.runtime.executor import run_backward
    from armt_dist.runtime.piece import cut_piece

    totals = engine(cut_piece(tokens, tokens, None, armt, grid, mesh.sp_rank))
    run_backward(engine, totals.nll / tokens.numel())
    engine.step()


def steps_of_rank(ranks, layout: ParallelConfig) -> dict[str, float]:
    """Medians over the steps after the first."""
    _, engine, armt, grid, mesh = tiny_engine(ranks, layout, 4, TOKENS, width=128)
    tokens = torch.randint(0, 64, (1, TOKENS * SEGMENTS))
    found = [timed(lambda: make_step(engine, armt, grid, mesh, tokens)) for _ in range(STEPS)][1:]
    return {key: median(step[key] for step in found) for key in found[0]}


def step(world: int, folder: Path) -> dict[str, float]:
    """Steps of `world` ranks, each with a sequence, and all with one; the clock of the slowest, the mean processor."""
    found = {}
    for name, layout in {"dp": ParallelConfig(), "sp": ParallelConfig(sp=world)}.items():
        ranks = spawn(world, steps_of_rank, layout, timeout_s=LIMIT_S)
        found |= {f"{name}_seconds": max(rank["seconds"] for rank in ranks)}
        found |= {f"{name}_cpu_s": fmean(rank["cpu_s"] for rank in ranks)}
    return found


def checkpoint_of_rank(ranks, folder: Path) -> dict[str, float]:
    """Save, and verify what was saved."""
    from armt_dist.checkpoint.folder import tag_of, verify_together
    from armt_dist.checkpoint.save import Saver

    _, engine, armt, grid, mesh = tiny_engine(ranks, ParallelConfig(), 8, TOKENS, width=256)
    # The moments exist from the first step on.
    make_step(engine, armt, grid, mesh, torch.randint(0, 64, (1, TOKENS)))
    saver = Saver(engine, folder, False, print)
    saved = timed(lambda: saver.save(tag_of(1), {"progress": {}}))
    verified = timed(lambda: verify_together(folder / tag_of(1)))
    held = [path.stat().st_size for path in (folder / tag_of(1)).iterdir()]
    named = {"save": saved, "verify": verified}
    times = {f"{name}_{key}": value for name, times in named.items() for key, value in times.items()}
    return {"mb": sum(held) / MB, "files": len(held), **times}


def checkpoint(world: int, folder: Path) -> dict[str, float]:
    """A checkpoint of `world` ranks; the clock of the slowest, the mean processor."""
    ranks = spawn(world, checkpoint_of_rank, folder, timeout_s=LIMIT_S)
    found = {key: (fmean if "cpu" in key else max)(rank[key] for rank in ranks) for key in ranks[0]}
    return found | {f"{name}_mb_per_s": found["mb"] / found[f"{name}_seconds"] for name in ("save", "verify")}


PIECES = {"start": start, "step": step, "checkpoint": checkpoint}
RANKS = {"start": [1, 2, 4, 8, 16, 32], "step": [1, 2, 4, 8], "checkpoint": [2, 4, 8]}


def show(name: str, rows: list[dict[str, float]]) -> str:
    """Return a piece's table, with the law of each column."""
    keys = [key for key in rows[0] if key != "ranks"]
    lines = [
        [row["ranks"], *(f"{row[key]:,.3g}" if row[key] < 1000 else f"{row[key]:,.0f}" for key in keys)] for row in rows
    ]
    if len(rows) > 2:
        lines.append(["grows to the power of", *(f"{exponent(rows, key, 'ranks'):.2f}" for key in keys)])
    return f"**{name}**\n\n" + table(["ranks", *(key.replace("_", " ") for key in keys)], lines)


def main() -> None:
    if "--one" in sys.argv[1:2]:
        rank_of_start(Path(sys.argv[2]), sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="*", metavar="PIECE", choices=[[], *PIECES], help="all, if none is named")
    parser.add_argument("--ranks", type=int, nargs="+", help="default: 1 to 32 of a start, to 8 of the others")
    parser.add_argument("--folder", default=".", help="where runs and checkpoints are written for a while")
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    for name in args.pieces or PIECES:
        for world in args.ranks or RANKS[name]:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                found.setdefault(name, []).append({"ranks": world, **PIECES[name](world, Path(folder).absolute())})
            print(name, found[name][-1], file=sys.stderr, flush=True)
    print(heading("scale_ranks.py"), *(show(name, rows) for name, rows in found.items()), sep="\n\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
