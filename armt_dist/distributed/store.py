"""The store in which ranks find each other: who may enter it, who listens where, how long the others are waited for.

torch's store asks nobody who he is, and torch, gloo and NCCL trust whoever reaches their ports. So a single process
listens nowhere, ranks of one machine on its loopback interface only, and a job's keys stand below a secret of its own,
where a stranger, or another job on the same port, does not meet them by accident. More is up to the network.
"""

import hashlib
import os
import socket
import time
from datetime import timedelta
from ipaddress import ip_address

import torch.distributed as dist

from ..deadline import within
from .launchers import Ranks

# The environment variable with the job's secret; slurm/*.sh make one for each job.
SECRET = "ARMT_JOB_SECRET"
# Connections that wait to be accepted.
BACKLOG = 4096
# Ranks that a message names.
SHOWN = 8


class Meeting:
    """The time that is left for all ranks to come."""

    def __init__(self, timeout_s: float):
        self.end = time.monotonic() + timeout_s

    def left_s(self) -> float:
        """Return the seconds that are left, at least a tenth."""
        return max(0.1, self.end - time.monotonic())


def open_store(ranks: Ranks, address: str, port: int, timeout_s: float) -> dist.Store:
    """Return the job's part of the store at `address`, where all ranks have arrived.

    Raises OSError or RuntimeError where it cannot be reached, and TimeoutError naming the ranks that are missing.
    """
    if ranks.world_size == 1:
        return dist.HashStore()
    meeting = Meeting(timeout_s)
    # torchrun's agent listens itself, and keeps its store when it starts the ranks again.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    hosts = ranks.rank == 0 and not agent
    if not hosts:
        wait_for_port(address, port, meeting)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if agent else "0"
    descriptor = listen(address, port) if hosts else None
    # torch's own timeout counts from every answer of the other side anew.
    store = within(
        meeting.left_s(),
        lambda: dist.TCPStore(
            address,
            port,
            ranks.world_size,
            hosts,
            timedelta(seconds=timeout_s),
            # They are waited for below.
            wait_for_workers=False,
            master_listen_fd=descriptor,
        ),
    )
    own = dist.PrefixStore(f"armt/{attempt}/{digest('keys')}", store)
    within(meeting.left_s(), lambda: await_all(own, ranks, meeting))
    return own


def digest(*purpose: str) -> str:
    """Return what stands for the job's secret in one use of it, in hexadecimal; the same for all jobs without one."""
    return hashlib.sha256("\0".join((os.environ.get(SECRET, ""), *purpose)).encode()).hexdigest()


def listen(address: str, port: int) -> int | None:
    """Return a descriptor that listens on the loopback interface alone; None where other machines must reach it.

    The store takes it over; by itself it would listen on all interfaces.
    """
    family, *_, (host, *_) = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    if not ip_address(host).is_loopback:
        return None
    return socket.create_server((str(host), port), family=family, backlog=BACKLOG).detach()


def wait_for_port(address: str, port: int, meeting: Meeting) -> None:
    """Return once a process listens there; OSError when the time is over, instead of torch's pages of C++ frames."""
    while True:
        try:
            return socket.create_connection((address, port), timeout=meeting.left_s()).close()
        except OSError:
            if time.monotonic() > meeting.end:
                raise
            time.sleep(0.2)


def await_all(store: dist.Store, ranks: Ranks, meeting: Meeting) -> None:
    """Wait until all ranks are here. Raises TimeoutError: on rank 0 with those that are missing."""
    keys = [f"here/{rank}" for rank in range(ranks.world_size)]
    store.set(keys[ranks.rank], "")
    # Rank 0 counts for all: keys would otherwise be waited for ranks x ranks times.
    awaited = keys if ranks.rank == 0 else ["all here"]
    # It also leaves last: whoever asks when it has gone gets pages of C++ frames from torch.
    end = meeting.end - (0.5 if ranks.rank == 0 else 1.5)
    while not store.check(awaited):
        if time.monotonic() > end:
            raise TimeoutError(absent(store, keys) if ranks.rank == 0 else "not all other ranks have come")
        time.sleep(0.05)
    if ranks.rank == 0:
        store.set("all here", "")


def absent(store: dist.Store, keys: list[str]) -> str:
    """Name the ranks that have not come."""
    missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
    more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    return f"not here: rank {', '.join(map(str, missing[:SHOWN]))}{more} of {len(keys)}"
