"""It learns: a short version of benchmarks/learn.py through the real commands, from nothing to an evaluated export."""

import json
import subprocess
import sys

from support.commands import train
from support.paths import FP32, ROOT

# Three of eight keys, up to three pairs: clicks after 120 to 150 steps of the 500.
CURRICULUM = "[{pairs: 3, steps: 500, warmup_steps: 50, lr: 2.0e-3, until: {accuracy: 0.97, over: 20}}]"
SETTINGS = ["ds_config.train_batch_size=128", "data.retrieval.symbols=8", "train.validate_every=500"]
PAIRS = (1, 2, 3)


def evaluated(folder, out, *options):
    """Accuracy by number of pairs."""
    command = [
        sys.executable,
        ROOT / "launch/evaluate.py",
        "--model",
        folder,
        "--out",
        out,
        "--lengths",
        *PAIRS,
        *options,
    ]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    return {row["length"]: row["accuracy"] for row in json.loads((out / "evaluation.json").read_text())["rows"]}


def test_rewritten_keys_are_remembered(tmp_path):
    result = train("--ds_config", FP32, "--out", tmp_path / "run", f"curriculum={CURRICULUM}", *SETTINGS)
    assert result.returncode == 0, result.stderr[-3000:]
    command = [sys.executable, ROOT / "launch/consolidate.py", tmp_path / "run", "--out", tmp_path / "hf"]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    found = evaluated(tmp_path / "hf", tmp_path / "scores")
    assert min(found.values()) >= 0.85, found
    # Without memory the question is all there is; with values of eight symbols 0.125 is chance.
    without = evaluated(tmp_path / "hf", tmp_path / "without", "--zero-memory")
    assert max(without.values()) <= 0.3, without
