"""Run the product's commands, and read what a run wrote."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from armt_dist.distributed.rendezvous import free_port
from support.forks import run_forked
from support.paths import ROOT

# Arguments of a short run that saves every other step. Frozen memory projections are parameters that no optimizer
# knows.
SAVE_OFTEN = [
    "model.freeze_mem=true",
    "curriculum.0.at_least=1.0",
    "curriculum.0.warmup_steps=5",
    "curriculum.0.steps=12",
    "ds_config.train_batch_size=8",
    "train.validate_every=100",
    "train.save_every=2",
]


def train(*arguments, ranks=2, timeout_s=300) -> subprocess.CompletedProcess:
    """Run launch/train.py to its end, without a launcher."""
    return run_forked(ranks, list(map(str, arguments)), timeout_s)


def train_by_deepspeed(*arguments, ranks=2, timeout_s=300) -> subprocess.CompletedProcess:
    """Run launch/train.py to its end under the deepspeed launcher."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks)]
    command = [*launcher, "--master_port", str(free_port()), str(ROOT / "launch/train.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)


def run_script(name: str, *arguments, timeout_s: float = 300, **environ: str) -> subprocess.CompletedProcess:
    """Run launch/`name` to its end in a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / name), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environ,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def call_script(name: str, arguments, monkeypatch, capsys) -> tuple[int, str, str]:
    """Run launch/`name` in this process; return exit code, stdout and stderr."""
    # Drop what the test itself printed before.
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "launch" / name), run_name="__main__")
    return stop.value.code, *capsys.readouterr()


def records(run: Path, kind: str = "train") -> list[dict]:
    """Read the records of one kind from a run's metrics.jsonl."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if record["kind"] == kind]


def curve(run: Path) -> dict[tuple[str, int], tuple]:
    """Read loss and gradient norm of a run by kind and step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(r["kind"], r["step"]): (r["loss"], r.get("grad_norm")) for r in lines}
