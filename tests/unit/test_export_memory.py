"""What an export takes: host memory, and bytes from the disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.hostile import make_hashes_fit
from support.paths import ROOT

from armt_dist import files
from armt_dist.checkpoint import verified_copy
from armt_dist.checkpoint.export import PREFIX, export, skeleton
from armt_dist.checkpoint.folder import CheckpointError
from armt_dist.checkpoint.zero_shards import open_checkpoint
from armt_dist.model.configuration_armt import ARMTConfig

PEAK = """
import sys, threading, time
from pathlib import Path
from armt_dist.checkpoint.export import export

def anonymous_mb():
    # Pages of mapped files are the kernel's to take back; these are not.
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024

def watch():
    global peak
    while True:
        peak = max(peak, anonymous_mb())
        time.sleep(0.001)

def run(name):
    global peak
    start = peak = anonymous_mb()
    export(Path(sys.argv[1]), Path(sys.argv[1]) / name, dtype=name.split("_")[-1])
    return peak - start

peak = 0
threading.Thread(target=watch, daemon=True).start()
print(run("warm_bfloat16"), run("float32"), run("bfloat16"))
"""


def write_run(run, layers, moments=False):
    """A run of 2 ranks of a model of 13 MB a layer, as DeepSpeed lays it out. Returns the bytes of its weights."""
    base = {"model_type": "gpt2", "n_embd": 512, "n_layer": layers, "n_head": 2, "n_positions": 8, "vocab_size": 4096}
    config = ARMTConfig(base_config=base, segment_tokens=4, num_mem_tokens=2, d_mem=16)
    config.save_pretrained(run / "model")
    model = skeleton(run / "model", "float32")
    shapes = {PREFIX + name: parameter.shape for name, parameter in model.named_parameters()}
    part = sum(-(-shape.numel() // 2) for shape in shapes.values())
    folder = run / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True)
    for rank in range(2):
        prefix = folder / f"zero_pp_rank_{rank}_mp_rank_00"
        flat = torch.arange(rank * part, (rank + 1) * part, dtype=torch.float32)
        states = {"exp_avg": -flat, "exp_avg_sq": 2 * flat} if moments else {}
        # Sub-groups that end in the middle of parameters.
        groups = list(flat.split(10_000_019))
        state = {"zero_stage": 3, "partition_count": 2, "optimizer_state_dict": states, "fp32_flat_groups": groups}
        torch.save({"optimizer_state_dict": state}, f"{prefix}_optim_states.pt")
        torch.save({"param_shapes": [shapes]}, f"{prefix}_model_states.pt")
    make_hashes_fit(folder, world_size=2)
    return 8 * part


@pytest.mark.slow
def test_host_memory_is_a_layer_not_the_model(tmp_path):
    model_mb = write_run(tmp_path, 15) / 2**20
    assert model_mb > 190
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path], cwd=ROOT, env={"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # A layer has 12.7 MB; the last two runs have no imports left to make.
    for peak_mb in map(float, done.stdout.split()[1:]):
        assert peak_mb < 16, f"{peak_mb:.0f} MB for a model of {model_mb:.0f} MB"
    parameters = open_checkpoint(tmp_path / "checkpoints" / "step_00000001").parameters
    exported = load_file(tmp_path / "float32" / "model.safetensors")
    for name, tensor in exported.items():
        assert torch.equal(tensor.flatten(), torch.cat(parameters[PREFIX + name].pieces)), name


def forget(path, first=0, length=0):
    """Drop a file, or a part of it, from the page cache: what no process has mapped and touched."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), first, length, os.POSIX_FADV_DONTNEED)


def read_from_disk(work):
    """Bytes that this process had to have from the disk."""

    def so_far():
        return int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0])

    before = so_far()
    work()
    return so_far() - before


def test_every_byte_comes_from_the_disk_once(tmp_path, monkeypatch):
    """Even where memory holds only what has been read last."""
    write_run(tmp_path, 2, moments=True)
    shards = sorted(tmp_path.rglob("*_optim_states.pt"))
    held = sum(path.stat().st_size for path in shards)
    export(tmp_path, tmp_path / "warm")
    for path in shards:
        forget(path)
    if read_from_disk(lambda: [path.read_bytes() for path in shards]) < held:
        pytest.skip("these files are not on a disk whose reads are counted")
    hash_until = verified_copy.HashedFile.hash_until

    def forgetful(self, position):
        hash_until(self, position)
        forget(self.path, 0, max(1, self.position - 8 * verified_copy.WINDOW))

    monkeypatch.setattr(verified_copy.HashedFile, "hash_until", forgetful)
    for path in shards:
        forget(path)
    assert held <= read_from_disk(lambda: export(tmp_path, tmp_path / "cold")) <= 1.1 * held
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("cold", "warm"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_checkpoint_that_cannot_be_read_is_named_and_not_the_export(tmp_path, monkeypatch):
    write_run(tmp_path, 1)

    open_regular = files.open_regular

    def broken(path):
        if Path(path).suffix == ".pt":
            raise OSError(5, "Input/output error")
        return open_regular(path)

    monkeypatch.setattr(files, "open_regular", broken)
    with pytest.raises(CheckpointError, match=r"checkpoint=.*_states\.pt: cannot be read \(.*Input/output"):
        export(tmp_path, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "checkpoints"}
