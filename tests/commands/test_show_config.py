"""`launch/train.py --show-config` and `--help` print and end: no ranks, no run folder."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.commands import call_script
from support.paths import FP32, ROOT

PLAYS = ROOT / "launch/configs/plays_cpu.yaml"


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run launch/train.py in this process, in an empty folder; exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: call_script("train.py", arguments, monkeypatch, capsys)


# Runs launch/train.py with the arguments, then looks at what it left in its process.
WATCHED = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
import torch
assert "deepspeed" not in sys.modules, "deepspeed was imported"
assert not torch.distributed.is_initialized(), "a process group was made"
"""


def test_show_config_starts_nothing(tmp_path):
    arguments = ["--config", PLAYS, "--show-config", "train.seed=3", "--out", tmp_path / "run"]
    command = [sys.executable, "-c", WATCHED, ROOT / "launch/train.py", *arguments]
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    shown = yaml.safe_load(result.stdout)
    assert shown["train"]["seed"] == 3 and shown["ds_config"]["train_batch_size"] == 2
    assert shown["ds_config"]["zero_optimization"]["stage"] == 3, "the file is in it"
    assert not (tmp_path / "run").exists()


def test_what_is_shown_can_be_shown_again(call):
    arguments = ("--ds_config", FP32, "ds_config.optimizer.params.lr=1e-5", "curriculum.0.steps=70", "--show-config")
    code, first, _ = call("--config", PLAYS, *arguments)
    assert code == 0
    Path("shown.yaml").write_text(first)
    assert call("--config", "shown.yaml", "--show-config")[:2] == (0, first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--help", "train.save_evry"], "error: help=train.save_evry: no such key; did you mean train.save_every"),
        (["--show-config", "train.save_evry=3"], "error: train.save_evry=3: unknown key; known here: "),
        (
            ["--show-config", "ds_config.fp16.enabled=true"],
            "error: ds_config fp16={'enabled': True}: not honoured; use",
        ),
        (["--show-config", "--ds_config", "none.json"], "error: ds_config=none.json: No such file or directory; for"),
    ],
)
def test_mistakes_are_one_line(call, arguments, message):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "") and err.startswith(message) and err.count("\n") == 1


def test_help(call):
    code, out, _ = call("--help")
    assert code == 0 and "--show-config" in out
    for section in ("model", "data", "bptt", "parallel", "train", "curriculum", "watchdog", "ds_config"):
        assert f"\n  {section} " in out, f"{section} has its line"


@pytest.mark.parametrize("key", ["train.save_every", "train", "ds_config.optimizer", "curriculum.0.lr"])
def test_help_key(call, key):
    code, out, _ = call("--help", key)
    assert code == 0 and "type" in out and "default" in out and "example" in out
