"""Training under Slurm: plain srun and the scripts in slurm/.

Under the same world size losses must be equal to the last bit, also where Slurm stopped, requeued or lost the run.
"""

import os
import signal
import sys
from pathlib import Path

import pytest
from support.launchers import ENVIRON, SP, STEPS, losses, settings, train_under
from support.slurm_cluster import log_of, processes_of

pytestmark = pytest.mark.needs("slurm")


def test_plain_srun(reference_losses, slurm, tmp_path):
    launcher = ["srun", "--ntasks=2", "--nodes=2", sys.executable]
    assert train_under(launcher, tmp_path, 10, sp=SP, **slurm.environ) == reference_losses[:10]


def test_eight_nodes_train_as_one_process_does_and_the_chain_exports_and_evaluates(slurm, checkout, tmp_path):
    arguments = settings(tmp_path, 10, sp=SP)
    job = slurm.submit("--job-name=eight", "slurm/train_armt_8node.sh", *arguments, cwd=checkout, **ENVIRON)
    arguments = ["slurm/consolidate.sh", "runs/eight", "--out", "runs/eight/export"]
    export = slurm.submit(f"--dependency=afterok:{job}", *arguments, cwd=checkout, **ENVIRON)
    arguments = ["--array=5,10", "slurm/evaluate.sh", "--model", "runs/eight/export", "--samples=4"]
    evaluation = slurm.submit(f"--dependency=afterok:{export}", *arguments, cwd=checkout, **ENVIRON)
    (tmp_path / "alone").mkdir()
    alone = train_under([sys.executable], tmp_path / "alone", 10, sp=1)

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
    reference_losses, slurm, checkout, tmp_path
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
    assert losses(run) == reference_losses


def test_a_world_that_does_not_fit_the_config_ends_in_one_line(slurm, checkout, tmp_path):
    arguments = ["--nodes=3", "--job-name=three", "slurm/train_armt_8node.sh", *settings(tmp_path, 10, sp=SP)]
    job = slurm.submit(*arguments, cwd=checkout, **ENVIRON)
    assert slurm.wait(job, 60).exit_code == 2
    log = log_of(checkout, "three", job)
    assert "sp=2 does not divide the world of 3 ranks" in log
    assert "Traceback" not in log
