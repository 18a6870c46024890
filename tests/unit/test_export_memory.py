"""The host memory that an export takes."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from support.hostile import make_hashes_fit
from support.paths import ROOT

from armt_dist.checkpoint.export import PREFIX, skeleton
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


def write_large_run(run):
    """A run of 2 ranks of a model of about 200 MB, as DeepSpeed lays it out. Returns its bytes."""
    base = {"model_type": "gpt2", "n_embd": 512, "n_layer": 15, "n_head": 2, "n_positions": 8, "vocab_size": 4096}
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
        # Sub-groups that end in the middle of parameters.
        state = {"zero_stage": 3, "partition_count": 2, "fp32_flat_groups": list(flat.split(10_000_019))}
        torch.save({"optimizer_state_dict": state}, f"{prefix}_optim_states.pt")
        torch.save({"param_shapes": [shapes]}, f"{prefix}_model_states.pt")
    make_hashes_fit(folder, world_size=2)
    return 8 * part


@pytest.mark.slow
def test_host_memory_is_a_layer_not_the_model(tmp_path):
    model_mb = write_large_run(tmp_path) / 2**20
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
