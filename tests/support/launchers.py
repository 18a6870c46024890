"""The same short training under any launcher, and the losses that it must have, to the last bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

from support.paths import ROOT

# A step takes some 50 ms, so that what is sent to the run after a few steps comes well before the last.
STEPS = 100
# Ranks that share a sequence.
SP = 2
DS_CONFIG = {
    "train_batch_size": 8,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 3},
}
# Two segments or more, so that two ranks can share a sequence.
SETTINGS = ["curriculum.0.pairs=5", "curriculum.0.at_least=1.0", "train.save_every=5"]
ENVIRON = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner"]


def settings(folder: Path, steps: int, sp: int) -> list[str]:
    """Write a ds_config into `folder` and return the arguments of launch/train.py."""
    path = folder / "ds.json"
    path.write_text(json.dumps(DS_CONFIG))
    return ["--ds_config", str(path), *SETTINGS, f"train.max_steps={steps}", f"parallel.sp={sp}"]


def losses(run: Path) -> list[float]:
    """Read the training loss of every step so far."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    # The last line may be half-written.
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record["loss"] for record in found if record["kind"] == "train"]


def train_under(launcher: list[str], folder: Path, steps: int, sp: int, **environ: str) -> list[float]:
    """Run launch/train.py to its end under a launcher on this machine and return the losses."""
    command = [*launcher, str(ROOT / "launch/train.py"), "--out", str(folder / "run"), *settings(folder, steps, sp)]
    environ = os.environ | ENVIRON | environ
    result = subprocess.run(command, env=environ, cwd=folder, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return losses(folder / "run")
