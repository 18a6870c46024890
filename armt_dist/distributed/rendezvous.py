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
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..config import ConfigError, one_line
from .process import keep_freed_memory

# torch 2.13 renamed the two collectives and warns of their old names.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Ranks(NamedTuple):
    """Who this process is. `local_*` count the ranks on this node; `launcher` is the name of what started it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str


class Launcher(NamedTuple):
    """The variables in which a launcher tells a process its rank; of `A|B` the first that is set counts."""

    name: str
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str


# Innermost first: torchrun may run inside mpirun or srun, and mpirun starts its remote daemons with srun.
LAUNCHERS = (
    Launcher("environment", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE|LOCAL_SIZE"),
    Launcher("openmpi", *(f"OMPI_COMM_WORLD_{what}" for what in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    Launcher("mvapich", *(f"MV2_COMM_WORLD_{what}" for what in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    Launcher("mpich", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID|PMI_LOCAL_RANK", "MPI_LOCALNRANKS|PMI_LOCAL_SIZE"),
    Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_TASKS_ON_THIS_NODE"),
)
MPI = ("openmpi", "mvapich", "mpich")
# One agent per node starts the ranks; the variable holds how many agents there are.
AGENTS = {"torchrun": "GROUP_WORLD_SIZE", "deepspeed": "CROSS_SIZE"}
# Signs of launchers without a row above. Taking such a process for a single one would start N one-rank jobs.
UNKNOWN = ("PMIX_RANK", "PALS_RANKID", "JSM_NAMESPACE_RANK", "FLUX_TASK_RANK", "ALPS_APP_PE")
# Slurm gives the batch script, the interactive shell and the like step numbers from here on; none is a parallel step.
SLURM_PSEUDO_STEPS = 0xFFFFFFF0


def discover(environ: Mapping[str, str] = os.environ) -> Ranks:
    """The ranks that the innermost launcher in `environ` announces; a single process where there is none.

    Raises ConfigError where a launcher's variables are incomplete or contradict those of the launcher around it:
    N tasks that each take themselves for a world of their own must not start.
    """
    environ = slurm_step(environ)
    found = [row for row in LAUNCHERS if row.rank in environ or row.world_size in environ]
    if not found:
        for name in UNKNOWN:
            if name in environ:
                raise ConfigError(
                    f"{name}={environ[name]}: a launcher that is not known here started this process; "
                    "set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE from its variables"
                )
        return Ranks(0, 1, 0, 1, "single")
    ranks = read_ranks(found[0], environ)
    for outer in found[1:]:
        check_outer(ranks, read_ranks(outer, environ), environ)
    return ranks


def claimed_rank(environ: Mapping[str, str] = os.environ) -> int:
    """The rank that the innermost launcher claims, checked or not: who prints when `discover` itself fails."""
    return next((int(environ[row.rank]) for row in LAUNCHERS if environ.get(row.rank, "").isdigit()), 0)


def slurm_step(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` with Slurm's variables as the table wants them: none outside a parallel step, counts resolved.

    A batch script has SLURM_PROCID and SLURM_NTASKS too, although it is one process.
    """
    environ = dict(environ)
    step = environ.get("SLURM_STEP_ID", "")
    if not step.isdigit() or int(step) >= SLURM_PSEUDO_STEPS:
        environ.pop("SLURM_PROCID", None)
        environ.pop("SLURM_STEP_NUM_TASKS", None)
        return environ
    if {"PMI_RANK", "PMI_SIZE"} <= environ.keys() and (environ["PMI_RANK"], environ["PMI_SIZE"]) == (
        environ.get("SLURM_PROCID"),
        environ.get("SLURM_STEP_NUM_TASKS"),
    ):
        # srun --mpi=pmi2 speaks PMI itself: there is no mpirun.
        del environ["PMI_RANK"], environ["PMI_SIZE"]
    if "SLURM_STEP_TASKS_PER_NODE" in environ:
        # "2(x3),1" means 2, 2, 2, 1
        runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ["SLURM_STEP_TASKS_PER_NODE"])
        counts = [count for count, repeat in runs for _ in range(int(repeat or 1))]
        environ["SLURM_TASKS_ON_THIS_NODE"] = counts[int(environ.get("SLURM_NODEID", 0))]
    return environ


def read_ranks(row: Launcher, environ: Mapping[str, str]) -> Ranks:
    """One launcher's variables as Ranks. Raises ConfigError for a missing, non-numeric or impossible one."""
    values = []
    for names in row[1:]:
        name = next((name for name in names.split("|") if name in environ), None)
        if name is None:
            raise ConfigError(f"{names} is not set although other variables of launcher {row.name!r} are; set it")
        if not environ[name].isdigit():
            raise ConfigError(f"{name}={environ[name]!r}: expected a whole number from launcher {row.name!r}")
        values.append(int(environ[name]))
    rank, world_size, local_rank, local_world_size = values
    if not (rank < world_size and local_rank < local_world_size <= world_size):
        raise ConfigError(
            f"{row.rank}={rank} of {world_size}, {row.local_rank}={local_rank} of {local_world_size}: "
            "impossible; unset the stale variables or start through a launcher"
        )
    agent = next((name for name, variable in AGENTS.items() if variable in environ), None)
    return Ranks(*values, launcher=agent if row.name == "environment" and agent else row.name)


def check_outer(ranks: Ranks, outer: Ranks, environ: Mapping[str, str]) -> None:
    """Raise ConfigError where the launcher around ours runs tasks that our world does not span."""
    if ranks.launcher in AGENTS:
        agents = environ[AGENTS[ranks.launcher]]
        spans = agents == str(outer.world_size)
        what = f"{AGENTS[ranks.launcher]}={agents}"
    elif ranks.launcher in MPI:
        # The step around is that of mpirun's own daemons: fewer than ranks, never more.
        spans = ranks.world_size >= outer.world_size
        what = f"world size {ranks.world_size}"
    else:
        spans = ranks[:2] == outer[:2]
        what = f"RANK={ranks.rank} WORLD_SIZE={ranks.world_size}"
    if not spans:
        raise ConfigError(
            f"{what} from {ranks.launcher} inside {outer.launcher} task {outer.rank} of {outer.world_size}: "
            "every task would train alone; start one rank or one launcher per task, or unset RANK and WORLD_SIZE"
        )


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


class Mesh(NamedTuple):
    """world = dp x sp. The sp ranks of a group are adjacent and share one sequence; `sp_ranks` are this group's."""

    dp: int
    sp: int
    dp_rank: int
    sp_rank: int
    sp_ranks: tuple[int, ...]


def mesh(ranks: Ranks, sp: int) -> Mesh:
    """Split the world into groups of `sp` adjacent ranks. Raises ConfigError where sp does not divide it."""
    if sp < 1 or ranks.world_size % sp:
        divisors = [n for n in range(1, ranks.world_size + 1) if ranks.world_size % n == 0]
        raise ConfigError(f"sp={sp} does not divide the world of {ranks.world_size} ranks; try one of {divisors}")
    dp_rank, sp_rank = divmod(ranks.rank, sp)
    return Mesh(ranks.world_size // sp, sp, dp_rank, sp_rank, tuple(range(dp_rank * sp, (dp_rank + 1) * sp)))


class Edge(NamedTuple):
    """A neighbour in the ring of an sp group: its rank in the world, and the process group of the two."""

    peer: int
    group: dist.ProcessGroup


def ring(mesh: Mesh, timeout_s: float) -> tuple[Edge | None, Edge | None]:
    """This rank's edges to the sp rank before it and to the one after it; None where sp = 1. Collective.

    Every edge has a group of its own, for the hand-off alone. Between two ranks there are two edges.
    """
    before = after = None
    # Even edges, odd edges, and the one that closes the ring: ranks make groups in one order, each in one at a time.
    for starts in (range(0, mesh.sp - 1, 2), range(1, mesh.sp - 1, 2), range(mesh.sp - 1, mesh.sp)):
        pairs = [[i * mesh.sp + j, i * mesh.sp + (j + 1) % mesh.sp] for i in range(mesh.dp) for j in starts]
        if mesh.sp == 1 or not pairs:
            continue
        group, _ = dist.new_subgroups_by_enumeration(pairs, timeout=timedelta(seconds=timeout_s))
        if mesh.sp_rank in starts:
            after = Edge(mesh.sp_ranks[(mesh.sp_rank + 1) % mesh.sp], group)
        elif (mesh.sp_rank - 1) % mesh.sp in starts:
            before = Edge(mesh.sp_ranks[mesh.sp_rank - 1], group)
    return before, after


def device() -> torch.device:
    """Where the tensors of collectives are: this rank's GPU under NCCL, else the CPU."""
    cuda = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def agree(error: Exception | None) -> None:
    """Collective: where any rank passes an error, all ranks raise the lowest such rank's as ConfigError.

    Without it, the rank that fails leaves and the others wait for it until the timeout.
    """
    kind = "" if error is None or isinstance(error, ConfigError) else f"{type(error).__name__}: "
    message = None if error is None else f"{kind}{one_line(error, limit=2000)}"
    messages = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    failed = [rank for rank, message in enumerate(messages) if message is not None]
    if failed:
        where = "" if len(failed) == len(messages) or failed[0] == 0 else f" (on rank {failed[0]})"
        raise ConfigError(messages[failed[0]] + where) from error


def together(work: Callable[[], object], only: int | None = None) -> object:
    """Run `work` on every rank (or on rank `only`) and wait; a failure on any rank is raised on all. Collective."""
    error, result = None, None
    try:
        if only is None or dist.get_rank() == only:
            result = work()
    except (OSError, RuntimeError, ConfigError) as problem:
        error = problem
    agree(error)
    return result


def stop() -> None:
    """Leave the world: destroy all process groups, if there are any."""
    if dist.is_initialized():
        import deepspeed

        deepspeed.comm.destroy_process_group()
        # A gloo thread lets go of the last collective's tensors only after it has reported it done, and aborts the
        # process if Python has ended by then (torch 2.13): 4 of 48 ranks did so without this, none of 50 with it.
        time.sleep(0.1)
