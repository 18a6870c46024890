"""The scripts in slurm/, unchanged, on a real Slurm of eight nodes on this machine (support/slurm_cluster.py)."""

import re
import subprocess
import sys

import pytest
from support.paths import ROOT
from support.slurm_cluster import log_of

pytestmark = pytest.mark.needs("slurm")

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
ENVIRON = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}

# Counts steps instead of training, with launch/train.py's manners: resumes, and exits with 75 on SIGUSR1.
COUNTER = """
import argparse, os, signal, sys, time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path)
parser.add_argument("--resume")
parser.add_argument("--fail", action="store_true")
parser.add_argument("--check")
args = parser.parse_args()
if args.check:
    sys.exit(0)
stop = []
signal.signal(signal.SIGUSR1, lambda *_: stop.append(1))
saved = args.out / "steps"
start = int(saved.read_text()) if saved.exists() else 0
print(f"starts at {start}", flush=True)
for step in range(start + 1, 1000):
    time.sleep(0.1)
    if (args.out / "stop").exists():
        sys.exit(0)
    if stop:
        saved.write_text(str(step))
        sys.exit(1 if args.fail else 75)
"""


@pytest.fixture
def counting(checkout):
    """The same with the counter in the place of launch/train.py."""
    (checkout / "launch").unlink()
    (checkout / "launch").mkdir()
    for name in ("node.py", "preflight.py"):
        (checkout / "launch" / name).symlink_to(ROOT / "launch" / name)
    (checkout / "launch/train.py").write_text(COUNTER)
    return checkout


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.name != "env.sh"], ids=lambda path: path.name)
def test_sbatch_accepts_the_script_as_it_is(slurm, checkout, script):
    slurm.command("sbatch", "--test-only", f"--chdir={checkout}", f"slurm/{script.name}")


def test_more_gpus_than_a_node_has_are_refused(slurm, checkout):
    with pytest.raises(subprocess.CalledProcessError) as error:
        slurm.command("sbatch", "--test-only", "--gpus-per-node=9", str(ROOT / "slurm/train_armt_8node.sh"))
    assert "Requested node configuration is not available" in error.value.stdout


def test_submitted_from_elsewhere_the_script_says_so(slurm, tmp_path):
    job = slurm.submit(str(ROOT / "slurm/train_armt_8node.sh"), cwd=tmp_path, **ENVIRON)
    assert slurm.wait(job, 30).exit_code == 2
    assert log_of(tmp_path, "armt", job).splitlines()[-1].startswith("error: SLURM_SUBMIT_DIR=")


def test_array_tasks_requeue_as_themselves(slurm, counting):
    job = slurm.submit("--array=1-2", "--job-name=a", "slurm/train_armt_1node.sh", cwd=counting, **ENVIRON)
    # Until it runs, a task has no id of its own.
    both = lambda: [slurm.job(f"{job}_{task}") for task in (1, 2)]  # noqa: E731
    running = slurm.until(both, lambda now: {task.state for task in now} == {"RUNNING"}, "both tasks to run", 30)
    ids = [task.fields["JobId"] for task in running]

    def starts(task):
        return log_of(counting, "a", ids[task - 1]).count("starts at")

    slurm.until(lambda: (starts(1), starts(2)), lambda now: now == (1, 1), "both tasks to train", 60)
    # Slurm gives one of the two the id of the whole array; neither may take the other with it.
    slurm.command("scancel", "--signal=USR1", "--batch", f"{job}_1")
    slurm.until(lambda: starts(1), lambda now: now == 2, "task 1 to start again", 60)
    slurm.command("scancel", "--signal=USR1", "--batch", f"{job}_2")
    slurm.until(lambda: starts(2), lambda now: now == 2, "task 2 to start again", 60)
    for task in (1, 2):
        (counting / f"runs/a-{task}/stop").touch()
    ended = [slurm.wait(f"{job}_{task}", 60) for task in (1, 2)]
    assert [(end.state, end.restarts) for end in ended] == [("COMPLETED", 1)] * 2
    for task in (1, 2):
        saved = (counting / f"runs/a-{task}/steps").read_text()
        assert log_of(counting, "a", ids[task - 1]).splitlines()[-2].endswith(f"starts at {saved}")


@pytest.mark.parametrize(
    ("arguments", "environ", "exit_code", "words"),
    [
        (["--fail"], {}, 1, "ended with exit code 1; see runs/a/logs"),
        ([], {"MAX_RESTARTS": "0"}, 75, "MAX_RESTARTS=0 reached"),
    ],
    ids=["a failure while it checkpoints", "too many restarts"],
)
def test_not_requeued(slurm, counting, arguments, environ, exit_code, words):
    job = slurm.submit("--job-name=a", "slurm/train_armt_1node.sh", *arguments, cwd=counting, **ENVIRON, **environ)
    slurm.until(lambda: log_of(counting, "a", job), lambda log: "starts at" in log, "training", 60)
    slurm.command("scancel", "--signal=USR1", "--batch", job)
    end = slurm.wait(job, 60)
    assert (end.state, end.exit_code, end.restarts) == ("FAILED", exit_code, 0)
    assert words in log_of(counting, "a", job)


def fake_transformers(checkout):
    """A folder that shows another version of transformers."""
    fake = checkout / "site/transformers-0.0.1.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 0.0.1\n")
    return fake.parent


def test_an_unfit_node_is_excluded_once(slurm, counting):
    python = counting / "python"
    python.write_text(
        f"#!/bin/bash\ncase $SLURMD_NODENAME in n[$UNFIT]) export PYTHONPATH={fake_transformers(counting)};; esac\n"
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    own = {**ENVIRON, "PYTHON": str(python)}
    (counting / "runs/a").mkdir(parents=True)
    (counting / "runs/a/stop").touch()
    options = ("--nodes=3", "--exclude=n8", "slurm/train_armt_8node.sh")
    job = slurm.submit("--job-name=a", *options, cwd=counting, **own, UNFIT="2")
    end, log = slurm.wait(job, 120), log_of(counting, "a", job)
    assert (end.state, end.restarts) == ("COMPLETED", 1), log
    assert "n2: transformers=0.0.1" in log and f"requeue {job} without n8,n2" in log
    assert end.fields["ExcNodeList"] in ("n8,n2", "n[2,8]") and "n2" not in end.fields["NodeList"]
    # Asked for by name, it cannot be left out.
    job = slurm.submit("--job-name=b", "--nodelist=n2", *options, cwd=counting, **own, UNFIT="2")
    end, log = slurm.wait(job, 120), log_of(counting, "b", job)
    assert (end.state, end.restarts) == ("FAILED", 0) and "without" not in log, log


def test_one_gpu_for_each_task_is_refused(slurm, checkout):
    job = slurm.submit("slurm/train_armt_1node.sh", cwd=checkout, **ENVIRON, SLURM_GPUS_PER_TASK="1")
    assert slurm.wait(job, 30).exit_code == 2
    assert log_of(checkout, "armt", job).splitlines()[-1].endswith("use --gpus-per-node")


def test_preflight_by_plain_srun_names_the_slow_node_and_the_odd_one(slurm, checkout):
    fake = fake_transformers(checkout)
    slow = checkout / "slow/sitecustomize.py"
    slow.parent.mkdir()
    slow.write_text(
        "import time, torch\n"
        "multiply = torch.Tensor.__matmul__\n"
        "torch.Tensor.__matmul__ = lambda a, b: time.sleep(0.1) or multiply(a, b)\n"
    )
    script = (
        f"case $SLURMD_NODENAME in n2) export PYTHONPATH={slow.parent};; n3) export PYTHONPATH={fake};; esac; "
        f"export PYTHONPATH=$PYTHONPATH:{ROOT}; exec {sys.executable} launch/preflight.py --nodes=4 --need-gib=0"
    )
    with pytest.raises(subprocess.CalledProcessError) as error:
        slurm.command("srun", "--nodelist=n[1-4]", "--ntasks-per-node=1", f"--chdir={checkout}", "bash", "-c", script)
    (line,) = [line for line in error.value.stdout.splitlines() if line.startswith("error: ")]
    assert "n3: transformers=0.0.1, the other nodes have" in line
    assert re.search(r"n2: slow, computes in 1\d\d\.", line), line
