"""How time, memory and file operations grow with the size of a run, piece by piece, and the law that they follow.

    OMP_NUM_THREADS=1 python benchmarks/scale_growth.py [PIECE ...]

Every measurement is a process of its own: seconds, those of the processor and growth of resident memory of the work
alone, and the files that it opened and folders that it listed or changed. The law is the slope of a straight line
through the logarithms: 1 is linear, 2 quadratic. Each piece takes less than ten minutes. Prints a table
and one JSON line last.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from measures import FileEvents, exponent, memory
from ranks import ROOT, heading, table

Work = Callable[[], object]


@contextmanager
def schedule(sp: int) -> Iterator[Work]:
    """Programs of all ranks of `sp`, both directions, and their check; 16 layers, 64 segments a rank in two rounds."""
    from armt_dist.schedule.checker import check_collectives, verify_program
    from armt_dist.schedule.grid import Grid
    from armt_dist.schedule.program import Op, backward_program, build_program

    grid = Grid(64 * sp, 16, sp, 2)

    def work() -> None:
        programs = []
        for rank in range(sp):
            forward = build_program("wavefront", grid, rank)
            programs.append(forward + backward_program(forward))
            verify_program(grid, programs[-1], rank)
        gathers = [[(i, i) for i, each in enumerate(program) if each.op is Op.GATHER] for program in programs]
        check_collectives(programs, gathers)

    yield work


@contextmanager
def segment_major(segments: int) -> Iterator[Work]:
    """RMT: the program of one rank, two layers, as layer calls."""
    from armt_dist.schedule.grid import RMT_ARROWS, Grid
    from armt_dist.schedule.program import layer_calls

    yield lambda: layer_calls("segment_major", Grid(segments, 2), 0, RMT_ARROWS)


@contextmanager
def lengths(segments: int) -> Iterator[Work]:
    """RMT with 32 layers: programs of 16 lengths up to `segments`, as a curriculum of random lengths asks for them."""
    from armt_dist.schedule.grid import RMT_ARROWS, Grid
    from armt_dist.schedule.program import layer_calls

    def work() -> None:
        for n in range(16):
            layer_calls("segment_major", Grid(segments - n, 32), 0, RMT_ARROWS)

    yield work


@contextmanager
def cut(segments: int) -> Iterator[Work]:
    """RMT: one rank's part of a padded micro-batch with documents, cut into a block for each segment."""
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    from support.models import small_model

    from armt_dist.runtime.executor import Around, ScheduledLM
    from armt_dist.runtime.piece import cut_piece
    from armt_dist.schedule.grid import Grid

    model = small_model(memory_kind="rmt")
    runner = ScheduledLM(model)
    ids, starts = torch.zeros(1, 8 * segments, dtype=torch.int64), torch.zeros(1, 8 * segments, dtype=torch.bool)
    starts[0, 100] = True
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    for layer in model.layers:
        # What is left is laying out.
        layer.forward = lambda x, *, run: x

    def work() -> None:
        piece = cut_piece(ids, ids, mask, model.config, Grid(1, 2), document_starts=starts)
        rows = [[n + model.config.other_rows for n in block] for block in piece.lengths]
        x = torch.zeros(1, sum(map(sum, rows)), model.config.hidden_size)
        runner.run_layers(x, rows, piece, Around((None, None), None), None, False)

    with torch.no_grad():
        yield work


@contextmanager
def masks(segments: int) -> Iterator[Work]:
    """What the layers share of a padded micro-batch of 4 rows, segments of 256 tokens."""
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    from support.models import small_model

    from armt_dist.runtime.executor import Around, ScheduledLM
    from armt_dist.runtime.piece import cut_piece
    from armt_dist.schedule.grid import Grid

    model = small_model(segment_tokens=256)
    runner = ScheduledLM(model)
    for layer in model.layers:
        layer.forward = lambda x, *, run: (run.keywords["work"], x)[1]
    ids = torch.zeros(4, 256 * segments, dtype=torch.int64)
    mask = torch.ones_like(ids)
    for row in range(4):
        mask[row, ids.shape[1] * (row + 5) // 8 - 7 :] = 0

    def work() -> None:
        piece = cut_piece(ids, ids, mask, model.config, Grid(1, 2))
        rows = [[n + model.config.other_rows for n in block] for block in piece.lengths]
        x = torch.zeros(4, sum(map(sum, rows)), 1)
        runner.run_layers(x, rows, piece, Around((None, None), None), None, False)

    with torch.no_grad():
        yield work


def retrieval(name: str):
    """A retrieval task with enough keys."""
    from armt_dist.config import validate
    from armt_dist.data.sections import DataConfig
    from armt_dist.data.tasks import make_task

    sizes = {"key_length": 4, "symbols": 16}
    return make_task(validate(DataConfig, {"task": name, "retrieval": sizes}))


@contextmanager
def key_blind(pairs: int) -> Iterator[Work]:
    """The accuracy of guessing in a batch of two rows."""
    from armt_dist.data.lengths import Difficulty

    task = retrieval("rewrite")
    batch = task.batch("train", 0, range(2), Difficulty.fixed(pairs))
    yield lambda: task.key_blind(batch)


@contextmanager
def unique_keys(pairs: int) -> Iterator[Work]:
    """A batch of two rows whose keys differ."""
    from armt_dist.data.lengths import Difficulty

    task = retrieval("remember")
    yield lambda: task.batch("train", 0, range(2), Difficulty.fixed(pairs))


@contextmanager
def babilong(tokens: int) -> Iterator[Work]:
    """64 rows of 1,024 tokens out of a background of `tokens` tokens."""
    import numpy as np

    from armt_dist.config import validate
    from armt_dist.data.babilong.task import Background
    from armt_dist.data.lengths import Difficulty
    from armt_dist.data.sections import DataConfig
    from armt_dist.data.tasks import make_task

    task = make_task(validate(DataConfig, {"task": "babilong"}), 512)
    long = Background.of(np.ones(tokens, np.int32), np.arange(tokens) % 12 == 11)
    task.background = {"train": long, "validation": long}
    task.batch("train", 0, range(1), Difficulty.fixed(2))
    yield lambda: task.batch("train", 1, range(64), Difficulty.fixed(2))


@contextmanager
def shards(world: int) -> Iterator[Work]:
    """Open a ZeRO-3 checkpoint of `world` ranks with one parameter."""
    import torch

    from armt_dist.checkpoint.zero_shards import open_checkpoint

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = {"module.weight": torch.Size([world])}
        for rank in range(world):
            states = {"zero_stage": 3, "partition_count": world, "fp32_flat_groups": [torch.ones(1)]}
            optimizer = {"optimizer_state_dict": states}
            torch.save(optimizer, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
            torch.save({"param_shapes": [shape]}, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        yield lambda: open_checkpoint(folder)


def write_metrics(folder: Path, count: int) -> None:
    """A run folder with `count` training steps and a validation every 100."""
    (folder / "config.yaml").write_text("data: {task: rewrite}\ncurriculum: [{pairs: 4, steps: 1000000}]\n")
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, count + 1):
            facts = {"loss": 1 / step, "accuracy": 0.5, "stage": 0, "lr": 1e-3, "grad_norm": 1.0, "tokens": 512 * step}
            more = {"tokens_per_s": 1e5, "step_s": 0.01, "skipped": 0, "pairs": 4, "key_blind": 0.25, "cell_s": 1e-3}
            file.write(json.dumps({"kind": "train", "step": step, **facts, **more}) + "\n")
            if step % 100 == 0:
                file.write(json.dumps({"kind": "validation", "step": step, "loss": 1 / step, "accuracy": 0.5}) + "\n")


@contextmanager
def resume(steps: int) -> Iterator[Work]:
    """Open metrics.jsonl of a run that made `steps` steps, and resume it 50 steps before its end."""
    from armt_dist.monitoring import run_log

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_metrics(folder, steps)
        # Imports TensorBoard and takes its time apart.
        run_log.MetricsWriter(folder, steps, steps).close()
        yield lambda: run_log.MetricsWriter(folder, steps - 50, steps)


@contextmanager
def report(steps: int) -> Iterator[Work]:
    """The report of a run."""
    from armt_dist.evaluation.run_report import write_run_report

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_metrics(folder, 10)
        write_run_report(folder)
        write_metrics(folder, steps)
        yield lambda: write_run_report(folder)


@contextmanager
def hashing(megabytes: int) -> Iterator[Work]:
    """Verify a checkpoint of 8 files."""
    from armt_dist.checkpoint import folder as checkpoint

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [folder / f"{number}.pt" for number in range(8)]
        for path in files:
            path.write_bytes(bytes(megabytes * 2**20 // 8))
        entries = checkpoint.hash_files(folder, files)
        checkpoint.write_manifest(folder, entries, {"tag": "step_00000001", "world_size": 8, "state": {}})
        yield lambda: checkpoint.verify_checkpoint(folder)


@contextmanager
def heartbeats(beats: int) -> Iterator[Work]:
    """Heartbeats of one rank."""
    from armt_dist.config import validate
    from armt_dist.monitoring.sections import WatchdogConfig
    from armt_dist.monitoring.watchdog import Watchdog

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.yaml").write_text("")
        dog = Watchdog(validate(WatchdogConfig, {"heartbeat_s": 1e6}), folder, rank=1)
        yield lambda: [dog.has_run() and dog.beat(dog.phase) for _ in range(beats)]
        dog.close()


class Piece(NamedTuple):
    """What is measured, at which sizes, and what they count."""

    setting: Callable[[int], object]
    unit: str
    sizes: tuple[int, ...]


PIECES = {
    "schedule": Piece(schedule, "sp", (64, 256, 1024)),
    "segment_major": Piece(segment_major, "segments", (4096, 16384, 65536)),
    "lengths": Piece(lengths, "segments", (64, 256, 1024)),
    "cut": Piece(cut, "segments", (256, 512, 1024)),
    "masks": Piece(masks, "segments", (16, 64, 256)),
    "key_blind": Piece(key_blind, "pairs", (1024, 4096, 16384)),
    "unique_keys": Piece(unique_keys, "pairs", (1024, 4096, 16384)),
    "babilong": Piece(babilong, "background tokens", (10**6, 10**7, 10**8)),
    "shards": Piece(shards, "shards", (256, 1024, 4096)),
    "resume": Piece(resume, "steps", (10_000, 100_000, 1_000_000)),
    "report": Piece(report, "steps", (10_000, 100_000, 1_000_000)),
    "hashing": Piece(hashing, "MB", (256, 512, 1024)),
    "heartbeats": Piece(heartbeats, "heartbeats", (10, 100, 1000)),
}


def measure(name: str, size: int) -> dict[str, float]:
    """Measure one piece at one size in this process."""
    with PIECES[name].setting(size) as work:
        before = memory("VmRSS")
        # The peak begins anew.
        Path("/proc/self/clear_refs").write_text("5")
        files, started, computed = FileEvents(), time.perf_counter(), time.process_time()
        kept = work()
        took = {"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - computed}
        found = {"size": size, **took, "mb": max(0.0, memory("VmHWM") - before) / 2**20, "files": files.all}
        del kept
        return found


def run(name: str) -> list[dict[str, float]]:
    """Measure a piece at its sizes, each in a process of its own."""
    rows = []
    for size in PIECES[name].sizes:
        command = [sys.executable, __file__, "--one", name, str(size)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=590, check=False)
        if done.returncode:
            sys.exit(f"{name} at {size}: {done.stderr[-2000:]}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(name, rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="*", default=list(PIECES), help=f"of {', '.join(PIECES)} (default: all)")
    parser.add_argument("--one", nargs=2, metavar=("PIECE", "SIZE"), help="measure in this process and print JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]))))
        return
    if unknown := set(args.pieces) - set(PIECES):
        parser.error(f"no such piece: {', '.join(unknown)}; there are {', '.join(PIECES)}")
    found = {name: run(name) for name in args.pieces}
    print(heading("scale_growth.py"))
    lines = []
    for name, rows in found.items():
        figures = (" / ".join(f"{row[field]:.{digits}g}" for row in rows) for field, digits in FIELDS.items())
        sizes = " / ".join(f"{size:,}" for size in PIECES[name].sizes)
        laws = (f"{exponent(rows, field):.2f}" for field in ("cpu_s", "mb"))
        lines.append([name, f"{sizes} {PIECES[name].unit}", *figures, *laws])
    print(
        table(
            [
                "piece",
                "sizes",
                "seconds",
                "CPU seconds",
                "MB added",
                "file operations",
                "law of CPU time",
                "law of memory",
            ],
            lines,
        )
    )
    print(json.dumps(found))


# Digits shown of each figure.
FIELDS = {"seconds": 2, "cpu_s": 2, "mb": 3, "files": 6}

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
