"""Read this process's rank from the variables of the innermost launcher in the environment."""

import os
import re
import sys
from collections.abc import Mapping
from typing import NamedTuple

from ..config import ConfigError, one_line


class Ranks(NamedTuple):
    """This process's place among all processes of the run."""

    rank: int
    world_size: int
    local_rank: int  # rank among the processes of this node
    local_world_size: int  # number of processes on this node
    launcher: str  # name of the program that started it


def check_groups(world_size: int, sp: int) -> None:
    """Raise ConfigError where groups of `sp` ranks do not fill the world."""
    if sp < 1 or world_size % sp:
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise ConfigError(f"parallel.sp={sp} does not divide the world of {world_size} ranks; try one of {divisors}")


class Launcher(NamedTuple):
    """The variables in which a launcher tells a process its rank; of `A|B` the first one that is set counts."""

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
# One agent per node starts the ranks; the variable holds the number of agents.
AGENTS = {"torchrun": "GROUP_WORLD_SIZE", "deepspeed": "CROSS_SIZE"}
# Variables of launchers without a row above. Taking such a process for a single one would start N one-rank jobs.
UNKNOWN = ("PMIX_RANK", "PALS_RANKID", "JSM_NAMESPACE_RANK", "FLUX_TASK_RANK", "ALPS_APP_PE")
# From here on Slurm numbers the steps of batch scripts, interactive shells and the like; none is a parallel step.
SLURM_PSEUDO_STEPS = 0xFFFFFFF0


def discover(environ: Mapping[str, str] = os.environ) -> Ranks:
    """Return the ranks that the innermost launcher in `environ` announces; a single process if there is no launcher.

    Raises ConfigError where a launcher's variables are incomplete or contradict those of the launcher around it:
    otherwise N tasks would each start a world of one rank.
    """
    environ = slurm_step(environ)
    found = [row for row in LAUNCHERS if row.rank in environ or row.world_size in environ]
    if not found:
        for name in UNKNOWN:
            if name in environ:
                raise ConfigError(
                    f"{name}={environ[name]}: an unsupported launcher started this process; "
                    "set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE from its variables"
                )
        return Ranks(0, 1, 0, 1, "single")
    ranks = read_ranks(found[0], environ)
    for outer in found[1:]:
        check_outer(ranks, read_ranks(outer, environ), environ)
    return ranks


def claimed_rank(environ: Mapping[str, str] = os.environ) -> int:
    """Return the rank that the innermost launcher claims, unchecked: it decides who prints when `discover` fails."""
    return next((int(environ[row.rank]) for row in LAUNCHERS if environ.get(row.rank, "").isdecimal()), 0)


def slurm_step(environ: Mapping[str, str]) -> dict[str, str]:
    """Return `environ` with Slurm's variables as the table needs them: none outside a parallel step, counts resolved.

    A batch script has SLURM_PROCID and SLURM_NTASKS too, although it is a single process.
    """
    environ = dict(environ)
    step = environ.get("SLURM_STEP_ID", "")
    if not step.isdecimal() or int(step) >= SLURM_PSEUDO_STEPS:
        environ.pop("SLURM_PROCID", None)
        environ.pop("SLURM_STEP_NUM_TASKS", None)
        return environ
    if {"PMI_RANK", "PMI_SIZE"} <= environ.keys() and (environ["PMI_RANK"], environ["PMI_SIZE"]) == (
        environ.get("SLURM_PROCID"),
        environ.get("SLURM_STEP_NUM_TASKS"),
    ):
        # srun --mpi=pmi2 sets the variables of PMI itself: there is no mpirun.
        del environ["PMI_RANK"], environ["PMI_SIZE"]
    if "SLURM_STEP_TASKS_PER_NODE" in environ:
        environ["SLURM_TASKS_ON_THIS_NODE"] = tasks_on(environ.get("SLURM_NODEID", "0"), environ)
    return environ


def tasks_on(node: str, environ: Mapping[str, str]) -> str:
    """Return the number of the step's tasks on its node number `node`. Raises ConfigError where Slurm does not say."""
    tasks = environ["SLURM_STEP_TASKS_PER_NODE"]
    left = int(node) if node.isdecimal() else sys.maxsize
    # "2(x3),1" means 2, 2, 2, 1
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks, re.ASCII):
        if left < int(repeat or 1):
            return count
        left -= int(repeat or 1)
    raise ConfigError(
        f"SLURM_NODEID={one_line(node)}: SLURM_STEP_TASKS_PER_NODE={one_line(tasks)} has no such node; start by srun"
    )


def read_ranks(row: Launcher, environ: Mapping[str, str]) -> Ranks:
    """Read one launcher's variables as Ranks. Raises ConfigError for a missing, non-numeric or impossible one."""
    values = []
    for names in row[1:]:
        name = next((name for name in names.split("|") if name in environ), None)
        if name is None:
            raise ConfigError(f"{names} is not set although other variables of launcher {row.name!r} are; set it")
        if not environ[name].isdecimal():
            raise ConfigError(f"{name}={environ[name]!r}: expected a whole number from launcher {row.name!r}")
        values.append(int(environ[name]))
    rank, world_size, local_rank, local_world_size = values
    if not (rank < world_size and local_rank < local_world_size <= world_size):
        raise ConfigError(
            f"{row.rank}={rank} of {world_size}, {row.local_rank}={local_rank} of {local_world_size}: "
            "impossible; unset the stale variables or start through a launcher"
        )
    agent = next((name for name, variable in AGENTS.items() if variable in environ), None)
    launcher = agent if row.name == "environment" and agent else row.name
    return Ranks(rank, world_size, local_rank, local_world_size, launcher)


def check_outer(ranks: Ranks, outer: Ranks, environ: Mapping[str, str]) -> None:
    """Raise ConfigError where the launcher around ours runs tasks that our world does not span."""
    if ranks.launcher in AGENTS:
        agents = environ[AGENTS[ranks.launcher]]
        spans = agents == str(outer.world_size)
        what = f"{AGENTS[ranks.launcher]}={agents}"
    elif ranks.launcher in MPI:
        # The step around it runs mpirun's own daemons, of which there are never more than ranks.
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
