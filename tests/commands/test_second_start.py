"""The same run started twice: the second start is refused while the first trains, and resumes once it has ended."""

import os
import signal
import subprocess
import sys
import time

import pytest
from support.commands import SAVE_OFTEN, curve, records, run_script
from support.paths import FP32, ROOT

STEPS = 400
RUN = [*SAVE_OFTEN, "curriculum.0.steps=400", f"train.max_steps={STEPS}", "--ds_config", FP32]
LIMIT_S = 60


@pytest.fixture
def first(tmp_path):
    """A run that is under way, in a process of its own."""
    command = [sys.executable, ROOT / "launch/train.py", *RUN, "--out", tmp_path / "run"]
    process = subprocess.Popen(
        [str(part) for part in command], env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: steps(tmp_path / "run") > 3, process)
    yield process
    process.kill()
    process.wait()


def steps(run) -> int:
    return len(records(run)) if (run / "metrics.jsonl").exists() else 0


def wait_for(condition, process):
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "it does not begin to train"
        time.sleep(0.2)


def test_a_second_start_is_refused_while_the_first_trains(first, tmp_path):
    run = tmp_path / "run"
    before = {path: path.stat().st_mtime_ns for path in run.glob("*.*")}
    second = run_script("train.py", *RUN, "--out", run)
    assert second.returncode == 2, second.stderr
    errors = [line for line in second.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and f"error: out={run}: process {first.pid} on " in errors[0], second.stderr
    assert "has been training into this folder for" in errors[0] and "or give another --out" in errors[0]
    for name in ("config.yaml", "ds_config.json", "environment.json"):
        assert (run / name).stat().st_mtime_ns == before[run / name], f"the second start has written {name}"
    assert first.poll() is None

    # Killed, without a word: the next start takes over at once, and no step is made twice.
    first.send_signal(signal.SIGKILL)
    first.wait()
    began = time.monotonic()
    third = run_script("train.py", *RUN, "--out", run, f"train.max_steps={steps(run) + 2}")
    assert third.returncode == 0 and time.monotonic() - began < LIMIT_S, third.stderr
    assert f"takes over {run} from process {first.pid} on " in third.stdout + third.stderr
    made = [record["step"] for record in records(run)]
    assert made == sorted(set(made)) and len(curve(run)) >= len(made)


def test_a_suspended_process_finds_its_folder_taken_and_ends(first, tmp_path):
    run = tmp_path / "run"
    first.send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    owner = sorted((run / "lease").iterdir())[-1]
    taken = owner.with_name("2.json")
    # As another process does after STALE_S.
    taken.write_bytes(owner.read_bytes().replace(b'"pid": ', b'"pid": 1'))
    before = steps(run)
    first.send_signal(signal.SIGCONT)
    _, errors = first.communicate(timeout=LIMIT_S)
    assert first.returncode == 2, errors
    assert "has taken this folder over" in errors and "this run ends without saving" in errors
    assert steps(run) < before + 200 and taken.exists()
