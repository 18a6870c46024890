"""What the planner predicts against what small CPU runs measure: memory of tensors, and time of a step.

    python benchmarks/planner.py [--only NAME ...] [--skip memory|time] [--steps 8] [--keep FOLDER]

Every case is a run of launch/train.py (fp32, one thread a rank, byte-level text) that is planned from the same
arguments.
Memory: the largest number of bytes in live tensors of a rank within a step, of forward and backward and of the
optimizer's update; parameters, gradients, optimizer and buffers are included. A GPU's allocator would report the same;
neither allocator nor interpreter blurs it. It is counted in a run of its own, because counting slows every operation.
Time: the median of step_s, predicted after calibrating on one other run, `base`, and on two, `base` and `batch of 4`,
whose cells differ in size. A run of one rank is timed by the CPU seconds of its process, which other processes on the
machine lengthen little. A run of several ranks waits, so that only the wall clock times it; its calibration runs go on
beside it and share the load.
Prints both tables.
"""

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from armt_dist.records import markdown_table, read_json
from armt_dist.schedule.calibration import WARM_UP_STEPS, calibrated, read_run
from armt_dist.schedule.hardware import CPU
from armt_dist.schedule.planned_run import planned_run
from armt_dist.schedule.planner import SPARE_LAYERS, Plan, plan, schedule_name
from armt_dist.schedule.simulator import simulate_step
from armt_dist.schedule.step_memory import UPDATE, Held, phase_bytes
from armt_dist.zero3.run_trees import read_trees

TRAIN, DS_CONFIG = ROOT / "launch/train.py", ROOT / "ds_configs/zero3_fp32.json"
TEXT = ROOT / "benchmarks/data/plays/as_you_like_it.txt"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
COUNTED_STEPS = 3
CALIBRATION = ("base", "batch of 4")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 128,
    "n_head": 4,
    "n_layer": 6,
    "n_positions": 256,
    "activation_function": "gelu",
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}
RECIPE = {
    "model": {"base_config": LLAMA, "segment_tokens": 128, "num_mem_tokens": 8, "d_mem": 32},
    "data": {
        "task": "text",
        "text": {"sequence_tokens": 4096, "tokenizer": "byte", "validation_fraction": 0, "files": str(TEXT)},
    },
    "train": {"validate_every": 10**6, "save_every": 10**6},
    "curriculum": [{"segments": 8, "at_least": 1.0, "steps": 8}],
}


class Case(NamedTuple):
    """One run: how many ranks, and what differs from the recipe."""

    ranks: int
    batch: int
    overrides: tuple[str, ...] = ()
    base_config: dict | None = None


CASES = {
    "base": Case(1, 1),
    "rebuild": Case(1, 1, ("bptt.states=rebuild", "curriculum.0.segments=16")),
    "recompute": Case(1, 1, ("bptt.states=recompute",)),
    "batch of 4": Case(1, 4, ("curriculum.0.segments=4",)),
    "long segments": Case(1, 1, ("model.segment_tokens=256", "curriculum.0.segments=4")),
    "wide": Case(
        1,
        1,
        ("curriculum.0.segments=4",),
        {**LLAMA, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3},
    ),
    "deep": Case(1, 1, ("curriculum.0.segments=4",), {**LLAMA, "num_hidden_layers": 8}),
    "gpt2": Case(1, 1, (), GPT2),
    "dp 2": Case(2, 2),
    "sp 2": Case(2, 2, ("parallel.sp=2",)),
    "sp 2, rebuild, chunks": Case(2, 2, ("parallel.sp=2", "parallel.chunks=2", "bptt.states=rebuild")),
}


def arguments(case: Case, folder: Path, steps: int) -> list[str]:
    """The command line of launch/train.py, and of launch/plan.py but for --out."""
    recipe = json.loads(json.dumps(RECIPE))
    recipe["model"]["base_config"] = case.base_config or LLAMA
    recipe["curriculum"][0]["steps"] = steps
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return [
        *("--config", str(folder / "recipe.yaml"), "--ds_config", str(DS_CONFIG), "--out", str(folder / "run")),
        *(f"ds_config.train_batch_size={case.batch}", *case.overrides),
    ]


def start(case: Case, folder: Path, steps: int, mode: str) -> subprocess.Popen:
    """Start a run whose ranks do what `mode` says: count memory, or take their times by a clock."""
    several = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}")
    command = [sys.executable, *(several if case.ranks > 1 else ())]
    command += [__file__, "--rank", mode, str(folder), *arguments(case, folder, steps)]
    log = (folder / f"{mode}.log").open("w")
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)


def finish(run: subprocess.Popen, folder: Path) -> None:
    """Wait for a run. Raises RuntimeError with the end of its output where it failed."""
    if run.wait():
        logs = "\n".join(log.read_text()[-1500:] for log in folder.glob("*.log"))
        raise RuntimeError(f"{folder.name} ended with exit code {run.returncode}:\n{logs}")


def rank_main(mode: str, folder: Path, train_arguments: list[str]) -> None:
    """One rank of a run."""
    sys.argv = [str(TRAIN), *train_arguments]
    if mode == "memory":
        count_memory(folder / f"peak_{os.environ.get('RANK', 0)}.json")
    else:
        # The run's own measurements then count in seconds of this clock.
        time.perf_counter = CLOCKS[mode]
        runpy.run_path(str(TRAIN), run_name="__main__")


def count_memory(report: Path) -> None:
    """Train under a count of live bytes, and write the peaks of each step: before the optimizer's part, and in it."""
    import deepspeed
    from live_bytes import LiveBytes

    live, peaks = LiveBytes([]), []
    step = deepspeed.DeepSpeedEngine.step

    def counted(engine, *args, **kwargs):
        before, live.peak_bytes = live.peak_bytes, live.bytes
        result = step(engine, *args, **kwargs)
        peaks.append((before, live.peak_bytes))
        report.write_text(json.dumps({"peaks": peaks}))
        live.peak_bytes = live.bytes
        return result

    deepspeed.DeepSpeedEngine.step = counted
    with live:
        runpy.run_path(str(TRAIN), run_name="__main__")


def measured_bytes(name: str, case: Case, root: Path) -> tuple[float, float]:
    """The largest peaks of any rank, before the optimizer's part and in it, median over steps after the first two."""
    folder = root / f"{name} memory"
    finish(start(case, folder, COUNTED_STEPS, "memory"), folder)
    peaks = [read_json(path)["peaks"][WARM_UP_STEPS:] for path in folder.glob("peak_*.json")]
    passes, updates = (max(statistics.median(step[part] for step in rank) for rank in peaks) for part in (0, 1))
    return passes, updates


def predicted(case: Case, folder: Path, hardware=CPU) -> Plan:
    """The plan of a case, its pipeline simulated."""
    given = arguments(case, folder, 1)
    model, work, layout = planned_run(read_trees(folder / "recipe.yaml", DS_CONFIG, DS_CONFIG, given[6:]), case.ranks)
    result = plan(model, work, layout, hardware)
    report = simulate_step(schedule_name(model, layout), result.grid, result.costs, model.kind.arrows)
    return plan(model, work, layout, hardware, pipeline_s=report.makespan_s)


def memory_row(name: str, case: Case, root: Path) -> dict:
    """Measured and predicted memory of one case, the pass and the update apart."""
    passes, updates = measured_bytes(name, case, root)
    result = predicted(case, root / "plan")
    run = planned_run(
        read_trees(root / "plan/recipe.yaml", DS_CONFIG, DS_CONFIG, arguments(case, root / "plan", 1)[6:]), case.ranks
    )
    held = Held(run.model, run.work, result.grid, case.ranks, result.window + SPARE_LAYERS, CPU.device)
    totals = {phase: sum(items.values()) for phase, items in phase_bytes(held).items()}
    update = totals.pop(UPDATE)
    phase = max(totals, key=lambda name: totals[name])
    return {
        "case": name,
        "ranks": case.ranks,
        "largest in": phase,
        "predicted MB": totals[phase] / 1e6,
        "measured MB": passes / 1e6,
        "off by": f"{totals[phase] / passes - 1:+.1%}",
        "update: predicted MB": update / 1e6,
        "update: measured MB": updates / 1e6,
        "update: off by": f"{update / updates - 1:+.1%}",
    }


def time_rows(names: list[str], root: Path, steps: int) -> list[dict]:
    """Measured and predicted times. The runs of one rank all go at once, so that whatever slows them slows all."""
    alone = [name for name in names if CASES[name].ranks == 1]
    run_together(dict.fromkeys([*CALIBRATION, *alone]), root, steps, "cpu")
    rows = [time_row(name, "cpu", root, root) for name in alone if name not in CALIBRATION]
    for name in names:
        if CASES[name].ranks > 1:
            beside = root / f"{name} calibration"
            run_together(dict.fromkeys([*CALIBRATION, name]), beside, steps, "wall")
            rows.append(time_row(name, "wall", beside, beside))
    return rows


def run_together(names: Iterable[str], root: Path, steps: int, clock: str) -> None:
    """Run some cases at the same time, to their end."""
    runs = {name: start(CASES[name], root / f"{name} time", steps, clock) for name in names}
    for name, run in runs.items():
        finish(run, root / f"{name} time")


def time_row(name: str, clock: str, root: Path, calibration: Path) -> dict:
    """Measured and predicted time of one case."""
    measured = read_run(root / f"{name} time/run")
    runs = [calibration / f"{each} time/run" for each in CALIBRATION]
    one, two = (predicted(CASES[name], root / "plan", calibrated(CPU, chosen)) for chosen in (runs[:1], runs))
    return {
        "case": name,
        "clock": clock,
        "measured cell ms": measured.cell_s * 1e3,
        "measured step s": measured.step_s,
        "one run: predicted step s": one.step_s,
        "one run: off by": f"{one.step_s / measured.step_s - 1:+.1%}",
        "two runs: predicted cell ms": two.costs.cell_s * 1e3,
        "two runs: predicted step s": two.step_s,
        "two runs: off by": f"{two.step_s / measured.step_s - 1:+.1%}",
    }


def main() -> None:
    """Measure the cases asked for and print the tables."""
    if sys.argv[1:2] == ["--rank"]:
        rank_main(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--skip", choices=("memory", "time"))
    parser.add_argument("--steps", type=int, default=8, help="of a timed run (default %(default)s)")
    parser.add_argument("--keep", type=Path, help="folder for the runs; left out: a temporary one")
    options = parser.parse_args()
    root = options.keep or Path(tempfile.mkdtemp(prefix="planner_"))
    began = time.time()
    if options.skip != "memory":
        print(markdown_table(memory_row(name, CASES[name], root) for name in options.only), end="\n\n", flush=True)
    if options.skip != "time":
        print(markdown_table(time_rows(options.only, root, options.steps)), end="\n\n", flush=True)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{time.time() - began:.0f} s; load average at the end {load} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
