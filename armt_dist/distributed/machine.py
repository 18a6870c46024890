"""What a machine must have before its ranks meet: GPUs that torch can use, and the networks that variables name."""

import json
import os
import socket
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

from ..config import ConfigError

# Streams that a rank of a wavefront uses at once: computing, hand-off, gathers, reductions, copies, and those of three
# communicators. tests/unit/test_communication_order.py shows what happens where they share hardware queues.
LEAST_QUEUES = 8
MOST_QUEUES = 32


def find_cuda(devices: Path = Path("/dev")) -> bool:
    """Return whether this process trains on GPUs. Raises ConfigError where torch cannot use those that are there.

    A machine with GPUs would train on its CPU in silence otherwise, a hundred times as slowly.
    """
    if torch.cuda.is_available():
        return True
    there = any(path.name.removeprefix("nvidia").isdecimal() for path in devices.glob("nvidia*"))
    if there and torch.version.cuda and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        raise ConfigError(
            f"{socket.gethostname()}: torch {torch.__version__} cannot use the GPUs of this machine; install a driver "
            f"for CUDA {torch.version.cuda} or a torch for this driver (nvidia-smi shows its CUDA), or set "
            "CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    return False


def ask_for_queues() -> None:
    """Ask CUDA for as many hardware queues as it has; without the variable, which it reads at its start, it takes 8."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", str(MOST_QUEUES))


def check_queues(sp: int) -> None:
    """Raise ConfigError for fewer hardware queues than the streams of a rank that shares a sequence.

    In a queue work starts in the order of its launch. A receive that waits for another rank would hold up the send for
    which that rank waits.
    """
    given = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "")
    if given.isdecimal() and int(given) < LEAST_QUEUES:
        raise ConfigError(
            f"CUDA_DEVICE_MAX_CONNECTIONS={given}: with parallel.sp={sp} ranks would wait for each other for ever; "
            f"leave it unset, or set {MOST_QUEUES}"
        )


def check_networks(cuda: bool) -> None:
    """Check that there is a network interface of which NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME speaks.

    NCCL takes beginnings of names, whole ones behind "=", and all others behind "^"; gloo whole ones. Either would fail
    or hang without the name. Raises ConfigError.
    """
    names = [name for _, name in socket.if_nameindex()]
    variable = "NCCL_SOCKET_IFNAME" if cuda else "GLOO_SOCKET_IFNAME"
    given = os.environ.get(variable, "")
    wanted = [name for name in given.removeprefix("=").split(",") if name]
    whole = not cuda or given.startswith("=")
    if given.startswith("^") or not wanted:
        return
    if not any(name == each if whole else name.startswith(each) for name in names for each in wanted):
        raise ConfigError(
            f"{variable}={given}: {socket.gethostname()} has no such network interface; it has {', '.join(names)}"
        )


def check_alike(ranks: int, rank: int, device: str, store: dist.Store) -> None:
    """Check that all ranks train on the same kind of device, before they would wait for each other in vain.

    device: "cuda" or "cpu". Raises ConfigError on all ranks.
    """
    store.set(f"device/{rank}", json.dumps([device, socket.gethostname()]))
    if rank == 0:
        found = [json.loads(each) for each in store.multi_get([f"device/{other}" for other in range(ranks)])]
        kinds = Counter(kind for kind, _ in found)
        rare = min(kinds, key=lambda kind: kinds[kind])
        hosts = sorted({host for kind, host in found if kind == rare})
        store.set("devices", "" if len(kinds) == 1 else f"{rare} on {', '.join(hosts)[:200]}")
    different = store.get("devices").decode()
    if different:
        raise ConfigError(
            f"devices: some ranks see GPUs and others none ({different}); check the driver there and "
            "CUDA_VISIBLE_DEVICES, or leave those nodes out"
        )
