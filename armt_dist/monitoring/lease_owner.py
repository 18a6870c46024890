"""Who trains into a run folder, and whether that process is known to have ended."""

import os
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

# Longest wait for squeue.
SQUEUE_S = 10.0
# States of a Slurm job whose processes may still write (squeue's job state codes).
LIVE = frozenset(("RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"))


class Owner(NamedTuple):
    """A process, as it describes itself."""

    token: str = ""  # random, of this lease alone
    host: str = ""
    machine: str = ""  # boot and process namespace: process ids mean the same where it is the same
    pid: int = 0
    start: str = ""  # clock ticks from boot to its start, because process ids are used again
    cluster: str = ""
    job: str = ""  # Slurm's id, empty outside Slurm
    restarts: int = 0  # times that Slurm has requeued the job

    @classmethod
    def here(cls) -> Self:
        """Describe this process."""
        environ = os.environ
        return cls(
            os.urandom(8).hex(),
            socket.gethostname(),
            this_machine(),
            os.getpid(),
            start_of(os.getpid()) or "",
            environ.get("SLURM_CLUSTER_NAME", ""),
            environ.get("SLURM_JOB_ID", ""),
            int(environ.get("SLURM_RESTART_COUNT") or 0),
        )

    def ended(self, asking: "Owner") -> bool | None:
        """Return whether this process has ended, as far as `asking` can know; None where it cannot."""
        if asking.machine and self.machine == asking.machine and start_of(self.pid) != self.start:
            return True
        if not self.job or self.cluster != asking.cluster:
            return None
        if self.job == asking.job:
            return True if self.restarts < asking.restarts else None
        state = job_state(self.job)
        if state is None:
            return None
        # A job that runs may have lost this process; a suspended one has not, although it is silent.
        return state not in LIVE or (False if state == "SUSPENDED" else None)

    def __str__(self) -> str:
        """Name job, process and host for people."""
        return f"{f'job {self.job}, ' if self.job else ''}process {self.pid} on {self.host}"


def this_machine() -> str:
    """Return what is the same for processes that see each other's ids; empty where it cannot be known."""
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def start_of(pid: int) -> str | None:
    """Return the start of a process in clock ticks; None if there is no such process, or only its zombie."""
    with suppress(OSError, IndexError):
        # The second field, in parentheses, may contain anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    return None


def job_state(job: str) -> str | None:
    """Return the state of a Slurm job, "GONE" for one that Slurm no longer knows; None where it cannot be asked."""
    try:
        found = subprocess.run(
            ["squeue", "--noheader", f"--jobs={job}", "--format=%T"],
            capture_output=True, text=True, timeout=SQUEUE_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    if found.returncode:
        return "GONE" if "Invalid job id" in found.stderr else None
    return found.stdout.split()[0] if found.stdout.split() else "GONE"
