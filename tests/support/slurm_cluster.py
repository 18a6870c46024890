"""A real Slurm of eight nodes on one machine, private to one folder: munged, slurmctld and slurmd -N n1..n8.

Nothing under /etc is read or written. All nodes share this machine's cores, memory and host name; tell them apart by
SLURMD_NODENAME. The GPUs of a node are empty files, so that GPU requests are accepted.
"""

import contextlib
import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from support.programs import find

NODES = 8
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")
# Below Linux's ephemeral ports and above every MASTER_PORT that the scripts choose.
PORTS = range(30000, 32700)

SLURM_CONF = """\
ClusterName=armt{port}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/s,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/d.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
TmpFS={folder}/tmp.%n
PlugStackConfig=/dev/null
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdTimeout=10
MinJobAge=3600
KillWait=5
InactiveLimit=0
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=8 RealMemory=64000 \\
    Gres=gpu:{gpus}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Job(NamedTuple):
    """A job as Slurm reports it; `fields` are those of `scontrol show job`."""

    state: str
    exit_code: int
    restarts: int
    fields: dict[str, str]


class Cluster(NamedTuple):
    """A running cluster. `environ` makes Slurm's commands talk to it."""

    folder: Path
    environ: dict[str, str]

    def command(self, *arguments: str, **environ: str) -> str:
        """Run one of Slurm's commands and return its output. CalledProcessError carries what it printed."""
        return subprocess.run(
            arguments,
            env=self.environ | environ,
            check=True,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ).stdout

    def submit(self, *arguments: str, cwd: Path, **environ: str) -> str:
        """Run `sbatch ARGUMENTS` from `cwd` and return the job's id."""
        command = ["sbatch", "--parsable", f"--chdir={cwd}", *arguments]
        result = subprocess.run(command, env=self.environ | environ, cwd=cwd, text=True, capture_output=True)
        assert result.returncode == 0, f"sbatch failed: {result.stderr}"
        return result.stdout.strip()

    def job(self, job: str) -> Job:
        """Return the present state of a job."""
        text = self.command("scontrol", "show", "job", job, "-o").splitlines()[0]
        fields = dict(word.split("=", 1) for word in text.split() if "=" in word)
        return Job(fields["JobState"], int(fields["ExitCode"].split(":")[0]), int(fields["Restarts"]), fields)

    def wait(self, job: str, timeout_s: float) -> Job:
        """Wait for the job's end and return it. AssertionError after `timeout_s`."""
        return self.until(
            lambda: self.job(job),
            lambda now: now.state not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED"),
            f"the end of job {job}",
            timeout_s,
        )

    @staticmethod
    def until(look, wanted, what: str, timeout_s: float):
        """Call `look` until `wanted` accepts its value. AssertionError naming `what` and the last value."""
        deadline = time.monotonic() + timeout_s
        while not wanted(value := look()):
            assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}; last seen: {value}"
            time.sleep(0.2)
        return value


@contextlib.contextmanager
def cluster(gpus: int = 8) -> Iterator[Cluster]:
    """Start the daemons, wait until all nodes are idle, and stop everything at the end. gpus: of each node."""
    missing = [program for program in PROGRAMS if find(program) is None]
    assert not missing, f"{missing} not found: install slurm-wlm and munge"
    # Not pytest's tmp_path: the path of munge's socket must stay below 108 characters.
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    running = Cluster(folder, environ | {"SLURM_CONF": str(folder / "slurm.conf")})
    try:
        configure(folder, gpus)
        start(running)
        yield running
    finally:
        stop(running)
        shutil.rmtree(folder, ignore_errors=True)


def configure(folder: Path, gpus: int) -> None:
    """Write slurm.conf, gres.conf and a munge key, and make the folders that the daemons expect."""
    nodes = [f"n{i}" for i in range(1, NODES + 1)]
    for name in ["state", "munge", "log", "gpu", *(f"{kind}.{node}" for kind in ("d", "tmp") for node in nodes)]:
        (folder / name).mkdir()
    (folder / "munge").chmod(0o755)
    (folder / "munge/key").write_bytes(secrets.token_bytes(128))
    (folder / "munge/key").chmod(0o400)
    for i in range(gpus):
        (folder / f"gpu/g{i}").touch()
    (folder / "gres.conf").write_text(f"NodeName=n[1-{NODES}] Name=gpu File={folder}/gpu/g[0-{gpus - 1}]\n")
    port = free_ports(NODES + 1)
    host = socket.gethostname().split(".")[0]
    values = dict(folder=folder, host=host, user=getpass.getuser(), nodes=NODES)
    values.update(port=port, first=port + 1, last=port + NODES, gpus=gpus)
    (folder / "slurm.conf").write_text(SLURM_CONF.format(**values))


def free_ports(count: int) -> int:
    """Return the first of `count` adjacent ports that nobody listens on."""
    for first in range(PORTS.start + secrets.randbelow(2000), PORTS.stop, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("", port))
            return first
    raise AssertionError(f"no {count} adjacent free ports in {PORTS}")


def start(running: Cluster) -> None:
    """Start munged, slurmctld and one slurmd per node; return when all nodes are idle."""
    munge = running.folder / "munge"
    files = [f"--{kind}={munge}/{name}" for kind, name in (("key-file", "key"), ("socket", "s"), ("pid-file", "pid"))]
    files += [f"--log-file={munge}/log", f"--seed-file={munge}/seed"]
    running.command(find("munged"), "--force", *files)
    running.command(find("slurmctld"))
    for i in range(1, NODES + 1):
        running.command(find("slurmd"), "-N", f"n{i}")
    idle = lambda: sum(map(int, running.command("sinfo", "-h", "-t", "idle", "-o", "%D").split()))  # noqa: E731
    running.until(idle, lambda count: count == NODES, f"{NODES} idle nodes", timeout_s=60)


def stop(running: Cluster) -> None:
    """Cancel all jobs, then end the daemons and whatever step daemon is left, each by its process id."""
    with contextlib.suppress(subprocess.CalledProcessError):
        running.command("scancel", f"--user={getpass.getuser()}")
        jobs = lambda: running.command("squeue", "-h").split()  # noqa: E731
        with contextlib.suppress(AssertionError):
            running.until(jobs, lambda left: not left, "cancelled jobs to end", timeout_s=15)
    pids = [int(text) for path in running.folder.glob("**/*pid") if (text := path.read_text().strip()).isdigit()]
    pids += step_daemons(running.folder)
    for signum in (signal.SIGTERM, signal.SIGKILL):
        for pid in filter(alive, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)
        deadline = time.monotonic() + 5
        while any(map(alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)


def step_daemons(folder: Path) -> list[int]:
    """Find the slurmstepd processes of this cluster by its configuration in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (path / "comm").read_text().startswith("slurmstepd") and str(folder) in (path / "environ").read_text():
                found.append(int(path.name))
    return found


def alive(pid: int) -> bool:
    """True while a process runs; a zombie does not."""
    try:
        return re.search(r"^State:\s+Z", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE) is None
    except OSError:
        return False


def log_of(checkout: Path, name: str, job: str) -> str:
    """Return what a job of the training scripts has printed so far."""
    path = checkout / f"{name}-{job}.log"
    return path.read_text() if path.exists() else ""


def processes_of(running: Cluster, job: str) -> dict[int, dict[str, str]]:
    """Return the environment of every process of a job of this cluster, by process id."""
    wanted = {"SLURM_JOB_ID": job, "SLURM_CONF": running.environ["SLURM_CONF"]}
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            lines = (path / "environ").read_bytes().decode(errors="replace").split("\0")
            environ = dict(line.split("=", 1) for line in lines if "=" in line)
            if wanted.items() <= environ.items():
                found[int(path.name)] = environ
    return found


def kill_node(running: Cluster, node: str, with_steps: bool = True) -> None:
    """End a node's daemons and all that they run, as a power cut does: none may live to report the others' end.

    with_steps: also the daemons of job steps; without them srun hears at once that its tasks have ended.
    """
    conf = f"SLURM_CONF={running.environ['SLURM_CONF']}".encode()
    daemons, parents = [], {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (path / "cmdline").read_bytes().split(b"\0")
            environ = (path / "environ").read_bytes().split(b"\0")
            if conf in environ and command[0].endswith(b"slurmd") and node.encode() in command:
                daemons.append(int(path.name))
            if conf in environ and f"SLURMD_NODENAME={node}".encode() in environ:
                parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
    # Those of the steps do not say their node, but what they run does.
    if with_steps:
        daemons += set(step_daemons(running.folder)) & set(parents.values())
    for pid in [*daemons, *parents]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
