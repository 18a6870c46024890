"""Checkpoints without an engine: what damage is noticed, which ones are kept, what a background save writes."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from support.checkpoints import TAGS, write_checkpoints

from armt_dist.checkpoint import folder as checkpoint
from armt_dist.checkpoint.folder import CheckpointError
from armt_dist.checkpoint.save import Writer


@pytest.fixture
def root(tmp_path):
    """Two whole checkpoints, `latest` at the second."""
    write_checkpoints(tmp_path)
    return tmp_path


def truncated(folder: Path) -> None:
    (folder / "shard_0.pt").write_bytes(bytes(99))


def flipped(folder: Path) -> None:
    content = bytearray((folder / "shard_1.pt").read_bytes())
    content[50] ^= 1
    (folder / "shard_1.pt").write_bytes(content)


def shard_gone(folder: Path) -> None:
    (folder / "shard_1.pt").unlink()


def manifest_gone(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def manifest_cut(folder: Path) -> None:
    content = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(content[: len(content) // 2])


def outside(name: str):
    """A manifest that names a file somewhere else."""

    def point_outside(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name] = manifest["files"].pop("shard_0.pt")
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return point_outside


DAMAGE = {
    "truncated shard": (truncated, "shard_0.pt has 99 bytes, not 100"),
    "flipped bit": (flipped, "shard_1.pt is damaged"),
    "shard gone": (shard_gone, "shard_1.pt is missing"),
    "manifest gone": (manifest_gone, "no readable manifest.json"),
    "manifest cut": (manifest_cut, "no readable manifest.json"),
    "above": (outside("../step_00000002/shard_0.pt"), "outside the folder"),
    "absolute": (outside("/etc/passwd"), "outside the folder"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(root, name):
    damage, says = DAMAGE[name]
    checkpoint.verify_checkpoint(root / TAGS[1])
    damage(root / TAGS[1])
    with pytest.raises(CheckpointError, match=says) as caught:
        checkpoint.verify_checkpoint(root / TAGS[1])
    assert str(root / TAGS[1]) in str(caught.value) and "\n" not in str(caught.value)
    checkpoint.verify_checkpoint(root / TAGS[0])


def test_what_is_kept(root):
    for tag in ("step_00000006", "step_00000008"):
        (root / tag).mkdir()
    checkpoint.prune(root, keep={"step_00000002"}, keep_last=1, keep_every=6)
    assert checkpoint.tags(root) == ["step_00000002", "step_00000006", "step_00000008"]


def test_what_the_background_writes_is_the_state_of_the_step_that_saved(tmp_path):
    """The run goes on while the file is written: weights, moments and counters change under the writer."""
    weights, path = torch.arange(6.0), tmp_path / "shard.pt"
    writer = Writer(copy=True)
    writer.save({"module": {"weights": weights}, "shape": weights.shape}, str(path))
    weights.zero_()
    entries = writer.write({"torch": torch.get_rng_state()}, tmp_path, rank=0)
    found = torch.load(path, weights_only=True)
    assert torch.equal(found["module"]["weights"], torch.arange(6.0)) and found["shape"] == torch.Size([6])
    assert sorted(entries) == ["rank_0.safetensors", "shard.pt"]
    assert entries == checkpoint.hash_files(tmp_path, [tmp_path / name for name in entries])


def test_files_are_hashed_side_by_side_and_the_damaged_one_is_named(root, monkeypatch):
    monkeypatch.setattr(checkpoint.os, "sched_getaffinity", lambda _: {0, 1})
    both, real = threading.Barrier(2, timeout=20), checkpoint.sha256

    def waiting(path, flush=False):
        both.wait()
        return real(path, flush)

    monkeypatch.setattr(checkpoint, "sha256", waiting)
    folder = root / TAGS[-1]
    checkpoint.verify_checkpoint(folder)
    (folder / "shard_1.pt").write_bytes(bytes(100))
    with pytest.raises(checkpoint.CheckpointError, match=r"shard_1\.pt is damaged \(SHA-256 differs\)"):
        checkpoint.verify_checkpoint(folder)
    files = [folder / "shard_1.pt", folder / "shard_0.pt"]
    assert list(checkpoint.hash_files(folder, files)) == ["shard_1.pt", "shard_0.pt"]


def test_a_damaged_checkpoint_is_replaced_by_its_successor(root, monkeypatch):
    """The run that passed it over saves the same step again: every restart failed there, for ever."""
    monkeypatch.setattr(checkpoint.dist, "get_world_size", lambda: 1)
    truncated(root / TAGS[-1])
    staged = checkpoint.staging(root / TAGS[-1])
    checkpoint.make_anew(staged)
    (staged / "shard_0.pt").write_bytes(b"whole")
    checkpoint.publish(root, TAGS[-1], [checkpoint.hash_files(staged, [staged / "shard_0.pt"])], {})
    checkpoint.verify_checkpoint(root / TAGS[-1])
    assert (root / TAGS[-1] / "shard_0.pt").read_bytes() == b"whole"
    assert {path.name for path in root.iterdir()} == {*TAGS, "latest"}, "nothing else is left"


def test_all_files_of_a_rank_may_be_read_by_the_same_people(tmp_path):
    writer = Writer(copy=False)
    writer.save({"x": torch.zeros(2)}, str(tmp_path / "x.pt"))
    before = os.umask(0o022)
    try:
        writer.write({"cpu": torch.zeros(3, dtype=torch.uint8)}, tmp_path, 0)
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "x.pt": 0o644,
        "rank_0.safetensors": 0o644,
    }


def test_an_old_checkpoint_that_cannot_be_deleted_costs_a_warning(root, monkeypatch):
    from types import SimpleNamespace

    from armt_dist.training import trainer

    def refuse(*_):
        raise PermissionError(13, "Permission denied", "step_00000001")

    said = []
    monkeypatch.setattr(trainer, "prune", refuse)
    run = SimpleNamespace(
        root=root, say=said.append, config=SimpleNamespace(train=SimpleNamespace(keep_last=1, keep_every=None))
    )
    trainer.Trainer.prune(run, {"step_00000002"})
    (line,) = said
    assert line.startswith("warning: an old checkpoint cannot be deleted") and "the run continues" in line
