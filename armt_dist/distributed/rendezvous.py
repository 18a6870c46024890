"""Start torch.distributed with the ranks that `launchers.discover` found, and leave it again.

DeepSpeed joins later, where its engine is made (`zero3.communication`).
"""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from ..config import ConfigError, one_line
from ..deadline import within
from .launchers import MPI, Ranks
from .machine import ask_for_queues, check_alike, check_networks, find_cuda
from .process import expand_segments, return_freed_memory
from .store import digest, open_store

# Longest wait for ranks that may not come, after the last step or an error on which all ranks should have agreed.
LEAVE_S = 30.0


def start(ranks: Ranks, timeout_s: float) -> torch.device:
    """Meet the other ranks and return this rank's device: cuda with nccl, else cpu with gloo.

    `timeout_s` bounds the meeting and every later collective of the default group. Sets RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR and MASTER_PORT, which torch and DeepSpeed read. Raises ConfigError for too few GPUs, an unreachable
    master or a port that is taken.
    """
    ask_for_queues()
    cuda = find_cuda()
    check_networks(cuda)
    gpu = own_gpu(ranks, torch.cuda.device_count()) if cuda else 0
    address, port = rendezvous(ranks)
    os.environ.update(
        RANK=str(ranks.rank),
        WORLD_SIZE=str(ranks.world_size),
        # DeepSpeed takes its device from it.
        LOCAL_RANK=str(gpu if cuda else ranks.local_rank),
        LOCAL_WORLD_SIZE=str(ranks.local_world_size),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
    device = take_gpu(gpu) if cuda else take_cpu(ranks.local_world_size)
    # The model that is built next is partitioned tensor by tensor.
    return_freed_memory()
    # With its device known, NCCL connects at once and splits later groups off this one. A single rank has no peer.
    own_device = device if cuda and ranks.world_size > 1 else None
    if ranks.local_world_size == ranks.world_size:
        # Ranks of one machine need not be reached from others.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        store, timeout = open_store(ranks, address, port, timeout_s), timedelta(seconds=timeout_s)
        store.set_timeout(timeout)
        check_alike(ranks.world_size, ranks.rank, device.type, store)
        if cuda:
            check_own(ranks, str(torch.cuda.get_device_properties(gpu).uuid), store)
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            timeout=timeout,
            world_size=ranks.world_size,
            rank=ranks.rank,
            store=store,
            device_id=own_device,
        )
    except ConfigError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"MASTER_ADDR:MASTER_PORT={address}:{port}: rank {ranks.rank} of {ranks.world_size} on "
            f"{socket.gethostname()} could not meet the others within {timeout_s:g} s ({one_line(error)}); "
            "check that rank 0 runs there, that the port is free and reachable, and GLOO_/NCCL_SOCKET_IFNAME"
        ) from None
    return device


def take_gpu(number: int) -> torch.device:
    """Make a GPU this process's own, and return it."""
    expand_segments()
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def take_cpu(ranks_here: int) -> torch.device:
    """Let torch and DeepSpeed compute on this rank's share of the CPU, and return it; ranks_here: of this node."""
    # Must be in place before deepspeed is imported: it picks its accelerator then.
    os.environ["DS_ACCELERATOR"] = "cpu"
    if "OMP_NUM_THREADS" not in os.environ:
        # Ranks whose threads outnumber the cores wait for each other: measured ten times slower on 2 cores.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    return torch.device("cpu")


def own_gpu(ranks: Ranks, visible: int) -> int:
    """Return the number of this rank's GPU among those that it sees: all of the node, or its own alone.

    Raises ConfigError for fewer than the ranks of the node, but more than one.
    """
    if visible == 1:
        # Slurm's --gpus-per-task=1; `check_own` tells it from several ranks on a node of one GPU.
        return 0
    if ranks.local_rank >= visible:
        raise ConfigError(
            f"local_rank={ranks.local_rank}: {socket.gethostname()} shows {visible} GPUs to this rank and has "
            f"{ranks.local_world_size} ranks; start one rank per GPU"
        )
    return ranks.local_rank


def check_own(ranks: Ranks, gpu: str, store: dist.Store) -> None:
    """Check that no other rank of this node has the same GPU. Raises ConfigError on all ranks of the node."""
    first = ranks.rank - ranks.local_rank
    store.set(f"gpu/{ranks.rank}", gpu)
    others = [store.get(f"gpu/{rank}").decode() for rank in range(first, first + ranks.local_world_size)]
    if len(set(others)) < len(others):
        raise ConfigError(
            f"{socket.gethostname()}: its {len(others)} ranks have {len(set(others))} GPUs; start one rank per GPU"
        )


def rendezvous(ranks: Ranks) -> tuple[str, int]:
    """Find the address and port where rank 0 listens: MASTER_ADDR and MASTER_PORT, else from the launcher."""
    if ranks.launcher == "single":
        # Nobody listens there.
        return "127.0.0.1", 0
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        if not os.environ["MASTER_PORT"].isdecimal():
            raise ConfigError(f"MASTER_PORT={os.environ['MASTER_PORT']!r}: expected a port number")
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if ranks.launcher == "srun":
        return slurm_rendezvous()
    if ranks.launcher in MPI:
        return mpi_rendezvous(ranks)
    raise ConfigError(f"MASTER_ADDR and MASTER_PORT are not set (launcher={ranks.launcher}); set them to rank 0's")


def slurm_rendezvous() -> tuple[str, int]:
    """Find the address of the step's first node, and a port below Linux's ephemeral range, which the secret decides.

    Raises ConfigError where scontrol cannot tell.
    """

    def scontrol(*arguments: str) -> str:
        """Return what the command prints."""
        return subprocess.run(["scontrol", *arguments], check=True, capture_output=True, text=True).stdout

    try:
        # Node names need not resolve, but Slurm knows the address that it uses itself.
        first = scontrol("show", "hostnames", os.environ["SLURM_STEP_NODELIST"]).split()[0]
        address = re.findall(r"NodeAddr=(\S+)", scontrol("show", "node", first, "-o"))[0]
    except (OSError, KeyError, IndexError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"MASTER_ADDR is not set and scontrol cannot tell ({one_line(error)}); set MASTER_ADDR and MASTER_PORT"
        ) from None
    job, step = os.environ["SLURM_JOB_ID"], os.environ["SLURM_STEP_ID"]
    return address, 15000 + int(digest("port", job, step), 16) % 15000


def mpi_rendezvous(ranks: Ranks) -> tuple[str, int]:
    """Broadcast rank 0's address and a free port of its node over MPI. Raises ConfigError where MPI disagrees."""
    try:
        from mpi4py import MPI as mpi
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"launcher={ranks.launcher}: mpi4py cannot be used ({one_line(error)}); pip install mpi4py, "
            "or set MASTER_ADDR and MASTER_PORT"
        ) from None
    world = mpi.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != ranks[:2]:
        raise ConfigError(
            f"launcher={ranks.launcher}: it says rank {ranks.rank} of {ranks.world_size}, mpi4py says rank "
            f"{world.Get_rank()} of {world.Get_size()}; use the mpirun of the MPI that mpi4py was built with"
        )
    return world.bcast((own_address(ranks), free_port()) if ranks.rank == 0 else None, root=0)


def own_address(ranks: Ranks) -> str:
    """Find an address of this node that the other ranks can reach: of the default route, or of the host name."""
    if ranks.local_world_size == ranks.world_size:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        # Connecting a UDP socket sends nothing; it only picks the interface.
        probe.connect(("10.255.255.255", 1))
        return probe.getsockname()[0]
    return socket.gethostbyname(socket.gethostname())


def free_port() -> int:
    """Find a TCP port on which no process listens."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def leave() -> bool:
    """Destroy all process groups, but wait at most LEAVE_S for other ranks. Returns whether that was enough."""
    try:
        within(LEAVE_S, stop)
    except TimeoutError:
        return False
    return True


def stop() -> None:
    """Destroy all process groups, if there are any. Waits for the other ranks under NCCL."""
    if not dist.is_initialized():
        return
    # DeepSpeed, if it has joined, drops its own references to the groups as well.
    comm = sys.modules.get("deepspeed.comm")
    if comm is not None and comm.is_initialized():
        comm.destroy_process_group()
    else:
        dist.destroy_process_group()
    # A gloo thread lets go of the last collective's tensors only after it has reported it done, and aborts the
    # process if Python has ended by then (torch 2.13): 4 of 48 ranks did so without this, none of 50 with it.
    time.sleep(0.1)
