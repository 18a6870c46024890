"""What may happen to a run of several ranks under Slurm, each done for real. Used by bad_luck.py.

A misfortune is a function of a `Place` and a random generator: it does the harm, waits as long as it lasts, and undoes
what an administrator would undo (a full disk, a lost node). It does not help the run.
"""

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

# ranks.py has put tests/ on the path.
from support.programs import find  # isort: skip
from support.slurm_cluster import Cluster, kill_node, processes_of  # isort: skip

from armt_dist.checkpoint import folder as checkpoint


class Place(NamedTuple):
    """Where one job's processes are, and the folders that they use."""

    slurm: Cluster
    job: str
    run: Path  # on a small disk of its own, as are the next one
    logs: Path
    clocks: Path  # seconds by which the clock of rank R is off, in a file R
    watchdog_s: float


Misfortune = Callable[[Place, random.Random], None]


def ranks_of(place: Place) -> dict[int, int]:
    """Process ids by rank, as far as they have started."""
    found = {}
    for pid, environ in processes_of(place.slurm, place.job).items():
        with suppress(OSError):
            if "RANK" in environ and b"launch/train.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found[int(environ["RANK"])] = pid
    return found


def send(pid: int, signum: signal.Signals) -> None:
    """Send a signal to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, signum)


def any_rank(place: Place, draw: random.Random) -> int:
    """Choose a rank and return its process id."""
    ranks = ranks_of(place)
    return ranks[draw.choice(sorted(ranks))]


def killed(place: Place, draw: random.Random) -> None:
    """SIGKILL of a rank."""
    send(any_rank(place, draw), signal.SIGKILL)


def paused(place: Place, draw: random.Random) -> None:
    """SIGSTOP of a rank for a while, shorter than the watchdog's limit."""
    pid = any_rank(place, draw)
    send(pid, signal.SIGSTOP)
    time.sleep(draw.uniform(0.5, 0.4 * place.watchdog_s))
    send(pid, signal.SIGCONT)


def stuck(place: Place, draw: random.Random) -> None:
    """SIGSTOP of a rank for good, until the others have missed it."""
    pid = any_rank(place, draw)
    send(pid, signal.SIGSTOP)
    place.slurm.until(lambda: ranks_of(place), lambda ranks: pid not in ranks.values(), "the end of a rank", 150)


def preempted(place: Place, draw: random.Random) -> None:
    """The signal before the time limit."""
    place.slurm.command("scancel", "--signal=USR1", "--batch", place.job)


def node_lost(place: Place, draw: random.Random) -> None:
    """All processes of a node are gone. It is taken out at once, which Slurm does by itself after SlurmdTimeout."""
    nodes = place.slurm.command("squeue", "--noheader", f"--jobs={place.job}", "--format=%N").strip()
    node = draw.choice(place.slurm.command("scontrol", "show", "hostnames", nodes).split())
    kill_node(place.slurm, node)
    place.slurm.command("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")
    time.sleep(2)
    place.slurm.command(find("slurmd"), "-N", node)


def disk_full(place: Place, draw: random.Random) -> None:
    """No byte is left on the disk of the run."""
    with filled(place.run.parent):
        time.sleep(draw.uniform(3, 15))


def log_disk_full(place: Place, draw: random.Random) -> None:
    """No byte is left for the job's log."""
    with filled(place.logs):
        time.sleep(draw.uniform(3, 15))


def log_disk_full_and_preempted(place: Place, draw: random.Random) -> None:
    """The same, and the job is to checkpoint and to requeue itself meanwhile."""
    with filled(place.logs):
        preempted(place, draw)
        time.sleep(15)


@contextmanager
def filled(disk: Path) -> Iterator[None]:
    """Fill a disk to its last byte until the end of the block."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        for size in (2**24, 2**12, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))
    try:
        yield
    finally:
        filler.unlink()


def unreadable(place: Place, draw: random.Random) -> None:
    """Nobody may read or write the run's folder, or that of its checkpoints."""
    folder = draw.choice([place.run, place.run / "checkpoints"])
    mode = folder.stat().st_mode & 0o777
    folder.chmod(0)
    time.sleep(draw.uniform(3, 15))
    folder.chmod(mode)


def damaged(place: Place, draw: random.Random) -> None:
    """A bit of the newest checkpoint turns, and a rank is killed, so that it would be read."""
    send(any_rank(place, draw), signal.SIGKILL)
    place.slurm.until(lambda: ranks_of(place), lambda ranks: not ranks, "the end of all ranks", 60)
    root = place.run / "checkpoints"
    newest = root / checkpoint.tags(root)[-1]
    path = draw.choice(sorted(path for path in newest.iterdir() if path.stat().st_size))
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def clock_set_back(place: Place, draw: random.Random) -> None:
    """The clock of a rank is set back by up to a day, and later right again."""
    offset = place.clocks / str(draw.choice(sorted(ranks_of(place))))
    staged = offset.with_suffix(".tmp")
    staged.write_text(str(-draw.uniform(60, 86_400)))
    staged.replace(offset)
    time.sleep(draw.uniform(3, 10))
    offset.unlink()


def link_cut(place: Place, draw: random.Random) -> None:
    """All connections between a rank and the other ranks are cut, as a switch or a firewall does (`ss -K`)."""
    ranks = ranks_of(place)
    victim = ranks[draw.choice(sorted(ranks))]
    listed = subprocess.run(["ss", "-Htnp"], capture_output=True, text=True, check=True).stdout
    ends = {ports_of(line): pid_of(line) for line in listed.splitlines()}
    for (here, there), pid in ends.items():
        if pid == victim and ends.get((there, here)) in ranks.values():
            command = ["ss", "-K", "-tn", "sport", "=", f":{here}", "and", "dport", "=", f":{there}"]
            subprocess.run(command, capture_output=True, check=True)


def ports_of(line: str) -> tuple[int, int]:
    """Ports of a connection in the output of `ss -tn`: its own and its peer's."""
    own, peer = line.split()[3:5]
    return int(own.rpartition(":")[2]), int(peer.rpartition(":")[2])


def pid_of(line: str) -> int | None:
    """The process of a connection in the output of `ss -tnp`."""
    found = re.search(r"pid=(\d+)", line)
    return int(found[1]) if found else None


MISFORTUNES: dict[str, Misfortune] = {
    function.__name__.replace("_", " "): function
    for function in (
        killed,
        paused,
        stuck,
        preempted,
        node_lost,
        disk_full,
        unreadable,
        damaged,
        clock_set_back,
        log_disk_full,
        log_disk_full_and_preempted,
        link_cut,
    )
}
