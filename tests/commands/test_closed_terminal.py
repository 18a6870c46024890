"""Printing never ends a run: stdout and stderr on a full disk, or a reader that has gone."""

import subprocess
import sys

from support.commands import SAVE_OFTEN, records
from support.paths import FP32, ROOT

RUN = [ROOT / "launch/train.py", *SAVE_OFTEN, "train.max_steps=3", "train.log_every=1", "--ds_config", FP32, "--out"]


def test_a_run_whose_terminal_is_full(tmp_path):
    command = [str(part) for part in (sys.executable, *RUN, tmp_path / "run")]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=full, timeout=120, check=False)
    assert len(records(tmp_path / "run")) == 3 and (tmp_path / "run/report.md").exists()
    assert (tmp_path / "run/checkpoints/step_00000003").is_dir() and result.returncode == 0


def test_a_run_whose_reader_has_gone(tmp_path):
    command = [str(part) for part in (sys.executable, *RUN, tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.close()
    process.wait(timeout=120)
    assert len(records(tmp_path / "run")) == 3 and (tmp_path / "run/checkpoints/step_00000003").is_dir()
    assert process.returncode == 0
