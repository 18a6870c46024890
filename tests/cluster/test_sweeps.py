"""Arrays, odd job names, a name submitted twice, a mistake and a node that dies, on the private cluster."""

import os
import subprocess

import pytest
import yaml
from support.launchers import ENVIRON, losses, settings
from support.programs import find
from support.slurm_cluster import cluster, kill_node, log_of

pytestmark = pytest.mark.needs("slurm")
SCRIPT = "slurm/train_armt_8node.sh"


def submit(slurm, checkout, tmp_path, name, *arguments, nodes=1, steps=3, options=(), **environ):
    command = [f"--job-name={name}", f"--nodes={nodes}", *options, SCRIPT, *settings(tmp_path, steps, sp=1)]
    return slurm.submit(*command, *arguments, cwd=checkout, **ENVIRON, **environ)


def test_tasks_of_an_array_and_odd_names(slurm, checkout, tmp_path):
    (checkout / "grid").mkdir()  # Slurm does not make it for the log, and the job would fail without a word (0:53).
    names = {name: submit(slurm, checkout, tmp_path, name) for name in ("my run", "grid/lr3")}
    lost = submit(slurm, checkout, tmp_path, "nowhere/lr3")
    overrides = ["train.seed={array}", "data.seed={array}"]
    job = submit(slurm, checkout, tmp_path, "seeds", *overrides, options=["--array=3,5"])

    for name, named in names.items():
        assert slurm.wait(named, 90).state == "COMPLETED", log_of(checkout, name, named)
        assert len(losses(checkout / "runs" / name)) == 3
    fields = slurm.wait(lost, 60).fields
    assert (fields["JobState"], fields["ExitCode"], fields["Reason"]) == ("FAILED", "0:53", "JobLaunchFailure")

    curves = []
    for seed in (3, 5):
        end = slurm.wait(f"{job}_{seed}", 90)
        run = checkout / f"runs/seeds-{seed}"
        assert end.state == "COMPLETED", [path.read_text() for path in checkout.glob("seeds-*.log")]
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert config["train"]["seed"] == config["data"]["seed"] == seed
        curves.append(losses(run))
    assert curves[0] != curves[1]


def test_a_mistake_ends_the_job_in_one_line(slurm, checkout, tmp_path):
    job = submit(slurm, checkout, tmp_path, "wrong", "train.stpes=3")
    assert slurm.wait(job, 60).exit_code == 2
    assert [line[:36] for line in log_of(checkout, "wrong", job).splitlines()] == [
        "error: train.stpes=3: unknown key; k"
    ], log_of(checkout, "wrong", job)
    assert not (checkout / "runs").exists()


def test_nodes_with_four_gpus(checkout, tmp_path):
    """With the scripts' 8 sbatch refuses; with 4 a node has 4 ranks, and the preflight sees that they are made up."""
    (tmp_path / "bin").mkdir()
    show = tmp_path / "bin/nvidia-smi"
    show.write_text('#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: made up"; done\n')
    show.chmod(0o755)
    with cluster(gpus=4) as site:
        with pytest.raises(subprocess.CalledProcessError) as error:
            site.command("sbatch", f"--chdir={checkout}", f"{checkout}/{SCRIPT}")
        says = "sbatch: error: Batch job submission failed: Requested node configuration is not available"
        assert error.value.stdout.strip() == says
        path = f"{show.parent}:{os.environ['PATH']}"
        job = submit(site, checkout, tmp_path, "four", options=["--gpus-per-node=4"], PATH=path)
        end, log = site.wait(job, 60), log_of(checkout, "four", job)
        assert end.exit_code == 2 and "1 nodes x 4 ranks" in log and "n1: shows 0 GPUs of 4" in log, log


def test_a_name_submitted_twice_and_a_node_that_dies(slurm, checkout, tmp_path):
    run = checkout / "runs/twice"
    options = {"nodes": 2, "steps": 100_000, "LOST_NODE_S": "90"}
    first = submit(slurm, checkout, tmp_path, "twice", **options)
    slurm.until(lambda: len(losses(run)), lambda made: made > 10, "steps", 90)

    # The first one keeps its folder, and trains on.
    second = submit(slurm, checkout, tmp_path, "twice", **options)
    end, log = slurm.wait(second, 90), log_of(checkout, "twice", second)
    assert end.exit_code == 2, log
    assert f"error: out=runs/twice: job {first}, process " in log and f"stop it (scancel {first})" in log
    made = len(losses(run))
    slurm.until(lambda: len(losses(run)), lambda now: now > made, "more steps", 30)

    # A node is lost with all its processes: Slurm requeues the job, which goes on elsewhere in the same folder.
    nodes = slurm.command("squeue", "--noheader", f"--jobs={first}", "--format=%N").strip()
    lost = slurm.command("scontrol", "show", "hostnames", nodes).split()[1]
    # The job script hears of it before Slurm does, and waits.
    kill_node(slurm, lost, with_steps=False)
    slurm.until(lambda: slurm.job(first).restarts, lambda restarts: restarts == 1, "the requeue", 90)
    log = slurm.until(lambda: log_of(checkout, "twice", first), lambda log: "resumed" in log, "the resumption", 90)
    assert "a node does not answer: waiting up to 90 s for Slurm to requeue the job" in log
    assert f"takes over runs/twice from job {first}, process " in log and "which has ended" in log
    slurm.command("scancel", first)
    slurm.wait(first, 60)
    slurm.command(find("slurmd"), "-N", lost)
    slurm.until(lambda: slurm.command("sinfo", "-h", "-n", lost, "-o", "%t").strip(), "idle".__eq__, lost, 60)
