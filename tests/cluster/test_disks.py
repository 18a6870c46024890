"""Disks that fill up or become read-only during a run. Mounting one needs root."""

import subprocess
import time

import pytest
from support.commands import SAVE_OFTEN, curve, train
from support.faults import Plant, start
from support.paths import FP32

from armt_dist.checkpoint import folder as checkpoint

pytestmark = pytest.mark.needs("root")


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=True)
    try:
        settings = [*SAVE_OFTEN, "train.max_steps=8", "train.keep_last=100"]
        result = train("--ds_config", FP32, "--out", disk / "run", *settings)
        lines = [line for line in (result.stdout + result.stderr).splitlines() if "0 MB left on the disk" in line]
        assert any("the run continues, the newest checkpoint is step_" in line for line in lines), result.stderr[-3000:]
        assert result.returncode == 2 and lines[-1].startswith("error: checkpoint="), "the last one must not be missed"
        root = disk / "run/checkpoints"
        assert checkpoint.tags(root) and not list(root.glob("staging-*"))
        for tag in checkpoint.tags(root):
            checkpoint.verify_checkpoint(root / tag)
        assert (root / "latest").read_text() == checkpoint.tags(root)[-1]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_checkpoints_that_become_read_only_cost_no_step(tmp_path):
    """First the folder of checkpoints alone, then the whole place, which the next run must name at once."""
    out, root = tmp_path / "run", tmp_path / "run/checkpoints"
    root.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(root)], check=True)
    read_only = ["mount", "-o", "remount,ro", str(root)]
    try:
        settings = ["--ds_config", FP32, *SAVE_OFTEN, "train.max_steps=12"]
        ranks = start(2, [*settings, "--out", out], [Plant("slow", size=0.02)])
        deadline = time.monotonic() + 120
        # Refused while a checkpoint is being written.
        while not (root / "latest").exists() or subprocess.run(read_only, capture_output=True).returncode:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        before = (root / "latest").read_text()
        spoken = [rank.communicate(timeout=120) for rank in ranks]
        assert [rank.returncode for rank in ranks] == [2, 2], spoken
        said = spoken[0][0]
        assert "Read-only file system" in said and f"the run continues, the newest checkpoint is {before}" in said
        assert max(step for kind, step in curve(out) if kind == "train") == 12, "it did not go on"
        assert [line for line in spoken[0][1].splitlines() if line.startswith("error: checkpoint=")]
        assert (root / "latest").read_text() == before and checkpoint.verify_checkpoint(root / before)
        result = train(*settings, "--out", root / "another")
        lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
        assert result.returncode == 2 and len(lines) == 1, result.stderr[-2000:]
        assert str(root / "another") in lines[0] and "Traceback" not in result.stderr
    finally:
        subprocess.run(["umount", str(root)], check=True)


def test_a_disk_that_fills_up_with_tokens_is_named_and_left_empty(tmp_path):
    disk, text = tmp_path / "disk", tmp_path / "a.txt"
    disk.mkdir()
    text.write_text("Some words, again and again.\n" * 10**5)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=True)
    try:
        data = ["data.task=text", "data.retrieval=null", f"data.text.files={text}", "data.text.validation_fraction=0"]
        more = ["data.text.sequence_tokens=64", f"data.text.cache={disk}", "curriculum=[{segments: 4, steps: 2}]"]
        result = train("--ds_config", FP32, "--out", tmp_path / "run", *data, *more, "model.segment_tokens=16")
        says = (
            f"error: data.text.cache={disk}: tokens cannot be kept there (No space left on device); make room, or set"
        )
        assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr[-3000:]
        assert any(line.startswith(says) for line in result.stderr.splitlines()), result.stderr[-3000:]
        assert not [path for path in disk.iterdir() if path.is_dir()], "half of the tokens were kept"
        assert not (tmp_path / "run").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
