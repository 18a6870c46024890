"""What lies in a run's folder is not carried out by the job's shell, and does not make the job start again."""

import os
import subprocess
from typing import BinaryIO

import pytest
from support.paths import ROOT

# The programs of a cluster, as far as the script asks them. srun writes what it is told into the file of the first
# failure, as launch/node.py would, and ends with a code.
PROGRAMS = {
    "srun": """
        for argument in "$@"; do
            if [[ $argument = --log-dir=* ]]; then logs=${argument#*=}; fi
            if [[ $argument = *node.py ]]; then training=1; fi
        done
        if [[ -z ${training:-} ]]; then exit 0; fi
        ls -A "$logs" > "$SEEN"
        if [[ ${WRITES+x} ]]; then printf %s "$WRITES" > "$logs/exit_code"; fi
        if [[ ${FIFO+x} ]]; then mkfifo "$logs/exit_code"; fi
        if [[ ${FOLDER+x} ]]; then mkdir "$logs/exit_code"; fi
        exit "${ENDS:-1}"
    """,
    "scontrol": """
        if [[ $1 = requeue ]]; then echo "$2" > "$REQUEUED"; fi
        if [[ "$1 $2" = "show hostnames" ]]; then echo node1; fi
        if [[ "$1 $2" = "show node" ]]; then echo "NodeName=node1 NodeAddr=127.0.0.1 Port=1"; fi
    """,
    "nvidia-smi": "exit 1",
}


@pytest.fixture
def job(tmp_path):
    """Run the training script with stand-ins; returns its exit code, whether it was requeued, and what srun saw."""
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    (tmp_path / "bin").mkdir()
    for name, text in PROGRAMS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    settings = {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "x",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_NNODES": "1",
        "PYTHON": "true",
        "SEEN": str(tmp_path / "seen"),
        "REQUEUED": str(tmp_path / "requeued"),
        "LOST_NODE_S": "0",
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    }

    def run(log: int | BinaryIO = subprocess.PIPE, **environ: str) -> tuple[int, bool, str]:
        done = subprocess.run(
            ["bash", ROOT / "slurm/train_armt_8node.sh", "--config", "x.yaml"],
            env={**os.environ, **settings, **environ},
            stdout=log,
            stderr=log,
            timeout=30,
        )
        return done.returncode, (tmp_path / "requeued").exists(), (tmp_path / "seen").read_text()

    return run


@pytest.fixture
def logs(tmp_path):
    folder = tmp_path / "runs/x/logs/7.0"
    folder.mkdir(parents=True)
    return folder


def test_the_code_of_the_first_failure_is_the_jobs(job):
    assert job(WRITES="3\n", ENDS="143") == (3, False, "")


def test_a_run_that_has_checkpointed_starts_again(job):
    assert job(WRITES="75\n", ENDS="0") == (0, True, "")


def test_a_full_log_disk_keeps_no_job_from_its_end(job):
    with open("/dev/full", "wb") as full:
        assert job(full, WRITES="75\n", ENDS="0") == (0, True, "")
        assert job(full, WRITES="3\n", ENDS="143")[0] == 3
        assert job(full, WRITES="75\n", ENDS="0", MAX_RESTARTS="0")[0] == 75


@pytest.mark.parametrize(
    "content",
    ["PATH[$(touch ran)]", "a[$(touch ran >&2)]\n", "75 \n", "+75", "0113", "075", "x=75", "75;touch ran", "", "\n"]
    + ["-1", "1e9", "7 5", "75\x01", "९", "9" * 10**5, "$(touch ran)", "code=75", "step"],
)
def test_anything_else_is_not_carried_out(content, job, tmp_path):
    assert job(WRITES=content, ENDS="4")[:2] == (4, False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("planted", ["75\n", "PATH[$(touch ran)]"])
def test_what_was_planted_before_the_start_is_removed(planted, job, logs, tmp_path):
    (logs / "exit_code").write_text(planted)
    assert job(ENDS="0") == (0, False, ""), "a run that ends well does not start again"
    assert not (tmp_path / "ran").exists()


def test_a_folder_or_a_link_in_its_place_is_removed(job, logs, tmp_path):
    (tmp_path / "elsewhere").write_text("75\n")
    (logs / "exit_code").symlink_to(tmp_path / "elsewhere")
    assert job(ENDS="0") == (0, False, "")
    assert (tmp_path / "elsewhere").read_text() == "75\n"
    (logs / "exit_code").mkdir()
    assert job(ENDS="0") == (0, False, "")


@pytest.mark.parametrize("kind", ["FIFO", "FOLDER"])
def test_what_is_no_file_is_not_waited_for(kind, job):
    assert job(ENDS="4", **{kind: "1"})[:2] == (4, False)
