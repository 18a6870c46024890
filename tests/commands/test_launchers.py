"""Training under the deepspeed launcher: to the last bit the losses of the same world under torchrun."""

import os
import subprocess

from support.launchers import DEEPSPEED, ENVIRON, SP, train_under
from support.paths import ROOT

from armt_dist.distributed import rendezvous as parallel


def test_deepspeed_launcher(reference_losses, tmp_path):
    launcher = [*DEEPSPEED, "--num_gpus=2", f"--master_port={parallel.free_port()}"]
    assert train_under(launcher, tmp_path, 10, sp=SP) == reference_losses[:10]


def test_deepspeed_launcher_on_each_node_without_ssh(tmp_path):
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    options = ["--hostfile", "hosts", "--no_ssh", "--master_addr=127.0.0.1", f"--master_port={parallel.free_port()}"]
    program = [str(ROOT / "launch/preflight.py"), "--nodes=2", "--need-gib=0", "--slow=1000"]
    nodes = [
        subprocess.Popen(
            [*DEEPSPEED, *options, f"--node_rank={node}", *program],
            env=os.environ | ENVIRON,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "preflight: 2 nodes fit" in outputs[0]
