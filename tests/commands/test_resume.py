"""Going on with another number of ranks, saving in the background, full disks, and files that want to run code."""

import json
import os
import shutil
import subprocess
import time

import pytest
import torch
from support.commands import curve, train
from support.faults import Plant, start
from support.paths import FP32

from armt_dist.checkpoint import folder as checkpoint

# Frozen memory projections: parameters that no optimizer knows.
SETTINGS = [
    "model.freeze_mem=true",
    "curriculum.0.at_least=1.0",
    "curriculum.0.warmup_steps=5",
    "curriculum.0.steps=12",
    "ds_config.train_batch_size=8",
    "train.validate_every=100",
    "train.save_every=2",
]
TEXT = [
    "data.task=text",
    "data.retrieval=null",
    "model.segment_tokens=16",
    "data.text.sequence_tokens=64",
    "model.base_config.n_positions=32",
    "curriculum=[{segments: 4, steps: 30, lr: 1.0e-3}]",
    "ds_config.train_batch_size=8",
    "train.validate_every=100",
]
# (ranks, sp) of each leg of two steps: 2 -> 1, 1 -> 4, 4 -> 2 and 2 -> 4 ranks, sp 1 -> 2 -> 4 -> 1.
LEGS = [(2, 1), (1, 1), (4, 2), (2, 2), (4, 4), (1, 1)]


@pytest.fixture(scope="module")
def journey(tmp_path_factory):
    """One run handed from world to world, and the same on one rank."""
    root = tmp_path_factory.mktemp("journey")
    for leg, (ranks, sp) in enumerate(LEGS, start=1):
        limits = [
            f"train.max_steps={2 * leg}",
            f"parallel.sp={sp}",
            f"train.save_in_background={str(leg % 2 == 0).lower()}",
        ]
        result = train("--ds_config", FP32, "--out", root / "moved", *SETTINGS, *limits, ranks=ranks)
        assert result.returncode == 0, result.stderr[-3000:]
        assert leg == 1 or f"at step {2 * leg - 2}" in result.stdout, "it did not go on from the leg before"
    whole = [*SETTINGS, f"train.max_steps={2 * len(LEGS)}"]
    result = train("--ds_config", FP32, "--out", root / "stayed", *whole, ranks=1)
    assert result.returncode == 0, result.stderr[-3000:]
    return root


def test_the_losses_are_those_of_one_rank_throughout(journey):
    moved, stayed = curve(journey / "moved"), curve(journey / "stayed")
    assert sorted(moved) == sorted(stayed) and len(stayed) >= 2 * len(LEGS)
    for key in stayed:
        assert moved[key][0] == pytest.approx(stayed[key][0], rel=1e-6), key


def test_the_universal_form_is_kept_and_pruned_with_its_checkpoint(journey):
    root = journey / "moved/checkpoints"
    kept = {path.name.removeprefix(checkpoint.UNIVERSAL) for path in root.glob(checkpoint.UNIVERSAL + "*")}
    assert kept and kept <= set(checkpoint.tags(root))
    for tag in kept:
        checkpoint.verify_checkpoint(root / (checkpoint.UNIVERSAL + tag))


class Touch:
    """What a checkpoint may not do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("ranks", [1, 2], ids=["as it was", "on other ranks"])
def test_nothing_in_a_checkpoint_is_run(journey, tmp_path, ranks):
    shutil.copytree(journey / "stayed", tmp_path / "run")
    root = tmp_path / "run/checkpoints"
    newest = root / (root / "latest").read_text()
    victim, evidence = next(newest.glob("*optim_states.pt")), tmp_path / "evidence"
    content = torch.load(victim, weights_only=False)
    torch.save({**content, "more": Touch(evidence)}, victim)
    # Whoever plants code also makes the hashes fit.
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"].update(checkpoint.hash_files(newest, [victim]))
    (newest / "manifest.json").write_text(json.dumps(manifest))
    more = ["train.max_steps=13", "ds_config.train_batch_size=8"]
    result = train("--ds_config", FP32, "--out", tmp_path / "run", *SETTINGS, *more, ranks=ranks)
    assert result.returncode == 2, result.stderr[-2000:]
    assert not evidence.exists()
    assert "Traceback" not in result.stderr and result.stderr.count("error") >= 1
    # The test itself: without the restriction the file does what it wants.
    torch.load(victim, weights_only=False)
    assert evidence.exists()


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=True)
    try:
        settings = [*SETTINGS, "train.max_steps=8", "train.keep_last=100"]
        result = train("--ds_config", FP32, "--out", disk / "run", *settings)
        lines = [line for line in (result.stdout + result.stderr).splitlines() if "0 MB left on the disk" in line]
        assert any("going on, the newest checkpoint is step_" in line for line in lines), result.stderr[-3000:]
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
        settings = ["--ds_config", FP32, *SETTINGS, "train.max_steps=12"]
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
        assert "Read-only file system" in said and f"going on, the newest checkpoint is {before}" in said
        assert max(step for kind, step in curve(out) if kind == "train") == 12, "it did not go on"
        assert [line for line in spoken[0][1].splitlines() if line.startswith("error: checkpoint=")]
        assert (root / "latest").read_text() == before and checkpoint.verify_checkpoint(root / before)
        result = train(*settings, "--out", root / "another")
        lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
        assert result.returncode == 2 and len(lines) == 1, result.stderr[-2000:]
        assert str(root / "another") in lines[0] and "Traceback" not in result.stderr
    finally:
        subprocess.run(["umount", str(root)], check=True)


def test_texts_that_vanish_mid_run_cost_nothing_or_are_named(tmp_path):
    """Files are read before the first step; a stream reads as it goes."""
    words = [json.dumps({"text": f"line {i} " * 40}) for i in range(24)]
    for kind in ("files", "stream"):
        folder, out = tmp_path / f"{kind}_texts", tmp_path / kind
        folder.mkdir()
        for part in range(8):
            (folder / f"{part}.jsonl").write_text("\n".join(words[part::8]) + "\n")
        if kind == "files":
            data = [f"data.text.files={folder}/*.jsonl"]
        else:
            data = ["data.text.dataset.name=json", f"data.text.dataset.data_files={folder}/*.jsonl"]
        settings = [*TEXT, *data, "train.max_steps=30", "train.save_every=5"]
        ranks = start(2, ["--ds_config", FP32, "--out", out, *settings], [Plant("slow", size=0.02)])
        deadline = time.monotonic() + 120
        while not (out / "checkpoints/latest").exists():
            assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks)
            time.sleep(0.05)
        shutil.rmtree(folder)
        spoken = [rank.communicate(timeout=120) for rank in ranks]
        codes = [rank.returncode for rank in ranks]
        assert "Traceback" not in spoken[0][1] + spoken[1][1], spoken
        if kind == "files":
            assert codes == [0, 0], spoken
        else:
            assert set(codes) == {2} and str(folder) in spoken[0][1], (codes, spoken)
