"""Ranks, rendezvous and groups: the only place that starts torch.distributed and deepspeed.comm.

`discover` reads from the environment who this process is, `start` meets the others, `mesh` says how the world is
split, `agree` turns an error on one rank into the same error on all of them, `stop` leaves.
"""

import contextlib
import os
import re
import socket
import subprocess
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from ..config import ConfigError, one_line
from .collectives import all_gather_single, reduce_scatter_single
from .launchers import MPI, Ranks
from .process import keep_freed_memory


def start(ranks: Ranks, timeout_s: float) -> torch.device:
    """Meet the other ranks and return this rank's device: cuda with nccl, else cpu with gloo.

    `timeout_s` bounds the meeting and every later collective of the default group. Sets RANK, WORLD_SIZE,
    LOCAL_RANK, MASTER_ADDR and MASTER_PORT for DeepSpeed. Raises ConfigError for too few GPUs, an unreachable
    master or a port that is taken.
    """
    cuda = torch.cuda.is_available()
    if cuda and ranks.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local_rank={ranks.local_rank}: {socket.gethostname()} shows {torch.cuda.device_count()} GPUs to this "
            f"rank and has {ranks.local_world_size} ranks; ask for one GPU per rank, all visible to every rank"
        )
    address, port = rendezvous(ranks)
    os.environ.update(
        RANK=str(ranks.rank),
        WORLD_SIZE=str(ranks.world_size),
        LOCAL_RANK=str(ranks.local_rank),
        LOCAL_WORLD_SIZE=str(ranks.local_world_size),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
    if cuda:
        torch.cuda.set_device(ranks.local_rank)
    else:
        # Must be in place before deepspeed is imported: it picks its accelerator then.
        os.environ["DS_ACCELERATOR"] = "cpu"
        if "OMP_NUM_THREADS" not in os.environ:
            # Ranks whose threads outnumber the cores wait for each other: measured ten times slower on 2 cores.
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size))
        keep_freed_memory()
    import deepspeed

    # On CPU DeepSpeed compiles a shared-memory all-reduce at start: measured 27 s against 0.01 s without, and every
    # rank leaves 69 MB in /dev/shm. Only its inference all-reduce would use it; training goes through gloo.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        if ranks.rank != 0:
            wait_for_port(address, port, timeout_s)
        deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False, timeout=timedelta(seconds=timeout_s))
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"MASTER_ADDR:MASTER_PORT={address}:{port}: rank {ranks.rank} of {ranks.world_size} on "
            f"{socket.gethostname()} could not meet the others within {timeout_s:g} s ({one_line(error)}); "
            "check that rank 0 runs there, that the port is free and reachable, and GLOO_/NCCL_SOCKET_IFNAME"
        ) from None
    # DeepSpeed 0.19.8 keeps the functions it calls here, under the names that torch 2.13 warns of.
    backend = deepspeed.comm.comm.cdb
    backend.all_gather_function, backend.reduce_scatter_function = all_gather_single, reduce_scatter_single
    return torch.device("cuda", ranks.local_rank) if cuda else torch.device("cpu")


def wait_for_port(address: str, port: int, timeout_s: float) -> None:
    """Return once somebody listens there, else raise OSError. torch would find out too, under pages of C++ frames."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return socket.create_connection((address, port), timeout=timeout_s).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def rendezvous(ranks: Ranks) -> tuple[str, int]:
    """Address and port where rank 0 listens: MASTER_ADDR and MASTER_PORT, else what the launcher can tell."""
    if ranks.launcher == "single":
        # Port 0: any free one. Nobody else has to find it.
        return "127.0.0.1", 0
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        if not os.environ["MASTER_PORT"].isdigit():
            raise ConfigError(f"MASTER_PORT={os.environ['MASTER_PORT']!r}: expected a port number")
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if ranks.launcher == "srun":
        return slurm_rendezvous()
    if ranks.launcher in MPI:
        return mpi_rendezvous(ranks)
    raise ConfigError(f"MASTER_ADDR and MASTER_PORT are not set (launcher={ranks.launcher}); set them to rank 0's")


def slurm_rendezvous() -> tuple[str, int]:
    """The address of the step's first node, and a port made from job and step id below Linux's ephemeral range."""

    def scontrol(*arguments: str) -> str:
        return subprocess.run(["scontrol", *arguments], check=True, capture_output=True, text=True).stdout

    try:
        # Node names need not resolve; Slurm knows the address it uses itself.
        first = scontrol("show", "hostnames", os.environ["SLURM_STEP_NODELIST"]).split()[0]
        address = re.search(r"NodeAddr=(\S+)", scontrol("show", "node", first, "-o")).group(1)
    except (OSError, KeyError, IndexError, AttributeError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"MASTER_ADDR is not set and scontrol cannot tell ({one_line(error)}); set MASTER_ADDR and MASTER_PORT"
        ) from None
    job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
    return address, 15000 + (31 * job + step) % 15000


def mpi_rendezvous(ranks: Ranks) -> tuple[str, int]:
    """Rank 0's address and a free port of its node, broadcast over MPI. Raises ConfigError where MPI disagrees."""
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
    """An address of this node that the other ranks can reach: that of the default route, or of the host name."""
    if ranks.local_world_size == ranks.world_size:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        # Connecting a UDP socket sends nothing; it only picks the interface.
        probe.connect(("10.255.255.255", 1))
        return probe.getsockname()[0]
    return socket.gethostbyname(socket.gethostname())


def free_port() -> int:
    """A TCP port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def stop() -> None:
    """Leave the world: destroy all process groups, if there are any."""
    if dist.is_initialized():
        import deepspeed

        deepspeed.comm.destroy_process_group()
        # A gloo thread lets go of the last collective's tensors only after it has reported it done, and aborts the
        # process if Python has ended by then (torch 2.13): 4 of 48 ranks did so without this, none of 50 with it.
        time.sleep(0.1)
