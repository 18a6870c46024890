"""One owner of a run folder: who may take it, from whom, and who notices."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from support.paths import ROOT

from armt_dist.config import ConfigError
from armt_dist.monitoring import lease_owner
from armt_dist.monitoring.lease import SIZE, Held, Lease
from armt_dist.monitoring.lease_owner import Owner
from armt_dist.records import RUN_CONFIG

FAST = {"beat_s": 0.1, "stale_s": 1.0}
HOLD = """
import sys, time
from pathlib import Path
from armt_dist.monitoring.lease import Lease
Lease(Path(sys.argv[1]), 0.1, 1.0).take()
print("taken", flush=True)
time.sleep(60)
"""


@pytest.fixture
def leases(tmp_path):
    """A function that makes leases of one folder with a run; all are released at the end."""
    out, made = tmp_path / "run", []
    out.mkdir()
    (out / RUN_CONFIG).touch()

    def make(**changed):
        lease = Lease(out, **FAST)
        lease.held = Held(lease.held.owner._replace(**changed))
        made.append(lease)
        return lease

    make.out = out
    yield make
    for lease in made:
        lease.release()


def test_a_second_process_is_refused_as_soon_as_the_first_shows_life(leases):
    first, second = leases(job="12", host="node7"), leases()
    first.take()
    time.sleep(0.3)
    began = time.monotonic()
    says = r"out=\S+: job 12, process \d+ on node7 has been training into this folder for 0 s; wait for its end, "
    with pytest.raises(ConfigError, match=says + r"stop it \(scancel 12\), or give another --out or job name"):
        second.take()
    assert time.monotonic() - began < 1.0 and not first.lost
    first.check()


def test_a_released_lease_is_taken_at_once(leases):
    first, second, lines = leases(), leases(), []
    first.take()
    first.release()
    began = time.monotonic()
    second.take(lines.append)
    assert time.monotonic() - began < 0.5 and not lines
    assert [file.name for file in second.folder.iterdir()] == ["2.json"]


def test_an_ended_process_of_this_machine_is_known_at_once(leases):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(leases.out)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "taken\n"
    with pytest.raises(ConfigError, match=f"process {process.pid} on "):
        leases().take()
    process.send_signal(signal.SIGKILL)
    process.wait()
    began, lines = time.monotonic(), []
    leases().take(lines.append)
    assert time.monotonic() - began < 0.5 and "which has ended" in lines[0]


def test_a_process_id_that_is_used_again_is_another_process(leases):
    first = leases(start="1")
    first.take()
    first.closed.set()
    leases().take()
    with pytest.raises(ConfigError, match="has taken this folder over, because this process gave no sign for 1 s"):
        first.check()


def test_a_silent_owner_elsewhere_loses_the_folder_after_a_while_and_notices(leases):
    first, second, lines = leases(machine="another", host="far"), leases(), []
    first.take()
    first.closed.set()  # No signs any more, as when it is suspended.
    began = time.monotonic()
    second.take(lines.append)
    assert 1.0 < time.monotonic() - began < 3.0 and "is silent" in lines[-1] and "waits up to 1 s" in lines[0]
    first.closed.clear()
    threading.Thread(target=first.beat, daemon=True).start()
    time.sleep(0.3)
    assert first.lost
    with pytest.raises(ConfigError, match="this run ends without saving"):
        first.check()
    first.release()
    assert not Held.decode(second.read(second.number)).released


def test_a_requeued_job_takes_the_folder_from_its_former_start(leases):
    first = leases(machine="another", job="7", cluster="c")
    first.take()
    again = leases(job="7", cluster="c", restarts=1)
    again.take()
    assert first.newest() == 2


@pytest.mark.parametrize(
    ("state", "ended"),
    [("RUNNING", None), ("COMPLETING", None), ("PENDING", True), ("GONE", True), ("SUSPENDED", False), (None, None)],
)
def test_what_slurm_says_of_the_owner(state, ended, monkeypatch):
    monkeypatch.setattr(lease_owner, "job_state", lambda job: state)
    owner = Owner("t", "h", "m", 1, "2", "c", "7")
    assert owner.ended(Owner("u", "h", "n", 1, "2", "c", "8")) is ended
    assert owner.ended(Owner("u", "h", "n", 1, "2", "another", "8")) is None, "squeue knows one cluster"


def test_a_suspended_job_keeps_its_folder_although_it_is_silent(leases, monkeypatch):
    monkeypatch.setattr(lease_owner, "job_state", lambda job: "SUSPENDED")
    first = leases(machine="another", job="7", cluster="c")
    first.take()
    first.closed.set()
    with pytest.raises(ConfigError, match="job 7, process"):
        leases(job="8", cluster="c").take()


def test_squeue_answers_in_time_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert lease_owner.job_state("1") is None
    program = tmp_path / "squeue"
    for script, state in (
        ("echo RUNNING", "RUNNING"),
        ("", "GONE"),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "GONE"),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", None),
    ):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        assert lease_owner.job_state("1") == state, script
    program.write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    monkeypatch.setattr(lease_owner, "SQUEUE_S", 0.2)
    assert lease_owner.job_state("1") is None


def test_of_many_that_start_at_once_one_gets_the_folder(leases):
    leases().take()
    leases.out.joinpath("lease/1.json").write_bytes(Held(Owner(machine="another"), released=True).encode())
    barrier, won, refused = threading.Barrier(12), [], []

    def start():
        lease = leases()
        barrier.wait()
        try:
            lease.take()
            won.append(lease)
        except ConfigError:
            refused.append(lease)

    threads = [threading.Thread(target=start) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(refused) == 11


def test_the_file_has_one_size_and_a_damaged_one_is_waited_for(leases):
    lease = leases()
    lease.take()
    time.sleep(0.3)
    assert lease.file(1).stat().st_size == SIZE and Held.decode(lease.read(1)).beats > 0
    lease.release()
    lease.file(1).write_bytes(b"\0\0")
    began = time.monotonic()
    leases().take()
    assert time.monotonic() - began > 1.0


def test_a_start_that_trains_nothing_leaves_no_folder(tmp_path):
    lease = Lease(tmp_path / "a/run", **FAST)
    lease.take()
    assert (tmp_path / "a/run/lease/1.json").is_file()
    lease.release()
    assert not (tmp_path / "a/run").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"out={tmp_path}/file/run: Not a directory; give --out a folder that can be"):
        Lease(tmp_path / "file/run", **FAST).take()


def test_this_process_is_alive():
    here = Owner.here()
    assert here.pid == os.getpid() and here.ended(here) is None
    assert here.ended(here._replace(token="other")) is None


def test_a_folder_that_was_removed_and_made_anew_is_lost(leases):
    """The new owner's lease has the same number, and must not be written over."""
    first, second = leases(machine="another"), leases()
    first.take()
    # It shall not notice while the folder is gone.
    first.closed.set()
    first.thread.join()
    shutil.rmtree(first.folder)
    second.take()
    assert first.number == second.number == 1
    with pytest.raises(ConfigError, match="has taken this folder over"):
        first.check()
    first.release()
    second.check()
    assert Held.decode(second.read(1)).owner.token == second.held.owner.token


def test_a_folder_without_its_lease_is_lost(leases):
    lease = leases()
    lease.take()
    shutil.rmtree(lease.folder)
    with pytest.raises(ConfigError, match="its lease was removed; this run ends without saving"):
        lease.check()


def test_a_folder_that_cannot_be_read_for_a_moment_is_not_lost(leases, monkeypatch):
    lease = leases()
    lease.take()
    monkeypatch.setattr(lease, "newest", lambda: os.listdir("/dev/null"))
    lease.check()
    time.sleep(0.3)
    assert not lease.lost
    monkeypatch.undo()
    lease.check()
