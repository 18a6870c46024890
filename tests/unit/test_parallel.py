"""Which rank a process is, under any launcher, and how the world is split into groups."""

import pytest
import torch

from armt_dist.config import ConfigError
from armt_dist.distributed import rendezvous
from armt_dist.distributed.launchers import Ranks, discover
from armt_dist.distributed.mesh import make_mesh

TORCHRUN = dict(RANK="5", WORLD_SIZE="16", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", GROUP_WORLD_SIZE="8")
DEEPSPEED = dict(RANK="5", WORLD_SIZE="16", LOCAL_RANK="1", LOCAL_SIZE="2", CROSS_SIZE="8")
BATCH = dict(SLURM_JOB_ID="7", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0", SLURM_NTASKS="8")
STEP = BATCH | dict(
    SLURM_STEP_ID="0",
    SLURM_PROCID="7",
    SLURM_LOCALID="0",
    SLURM_NODEID="3",
    SLURM_STEP_NUM_TASKS="8",
    SLURM_STEP_TASKS_PER_NODE="2(x3),1(x2)",
)
OPENMPI = dict(
    OMPI_COMM_WORLD_RANK="3",
    OMPI_COMM_WORLD_SIZE="4",
    OMPI_COMM_WORLD_LOCAL_RANK="1",
    OMPI_COMM_WORLD_LOCAL_SIZE="2",
    PMIX_RANK="3",
)
MPICH = dict(PMI_RANK="3", PMI_SIZE="4", MPI_LOCALRANKID="1", MPI_LOCALNRANKS="2")


@pytest.mark.parametrize(
    ("environ", "ranks"),
    [
        ({}, (0, 1, 0, 1, "single")),
        (TORCHRUN, (5, 16, 1, 2, "torchrun")),
        (DEEPSPEED, (5, 16, 1, 2, "deepspeed")),
        (dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2"), (1, 2, 1, 2, "environment")),
        (STEP, (7, 8, 0, 1, "srun")),
        (STEP | TORCHRUN, (5, 16, 1, 2, "torchrun")),
        (STEP | dict(RANK="7", WORLD_SIZE="8", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1"), (7, 8, 0, 1, "environment")),
        # srun --mpi=pmi2 repeats the step's numbers: srun it is, mpi4py is not needed
        (STEP | dict(PMI_RANK="7", PMI_SIZE="8"), (7, 8, 0, 1, "srun")),
        # a batch script, and a shell that salloc opened, are one process
        (BATCH, (0, 1, 0, 1, "single")),
        (BATCH | dict(SLURM_STEP_ID="4294967290", SLURM_STEP_NUM_TASKS="1"), (0, 1, 0, 1, "single")),
        (BATCH | OPENMPI, (3, 4, 1, 2, "openmpi")),
        # a remote daemon of mpirun is itself the task of a step
        (STEP | dict(SLURM_STEP_NUM_TASKS="3", SLURM_PROCID="2") | OPENMPI, (3, 4, 1, 2, "openmpi")),
        (MPICH, (3, 4, 1, 2, "mpich")),
    ],
)
def test_every_launcher_is_recognised(environ, ranks):
    assert discover(environ) == ranks


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        # eight tasks, each a world of its own
        (STEP | dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1"), "train alone"),
        (STEP | dict(RANK="0", WORLD_SIZE="8", LOCAL_RANK="0", LOCAL_WORLD_SIZE="8"), "train alone"),
        # eight torchruns that do not know of each other, with as many ranks each as there are tasks
        (STEP | TORCHRUN | dict(RANK="7", WORLD_SIZE="8", GROUP_WORLD_SIZE="1"), "GROUP_WORLD_SIZE=1"),
        (STEP | DEEPSPEED | dict(CROSS_SIZE="1"), "CROSS_SIZE=1"),
        (OPENMPI | dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1"), "openmpi task 3 of 4"),
        (STEP | OPENMPI | dict(OMPI_COMM_WORLD_SIZE="1", OMPI_COMM_WORLD_RANK="0"), "impossible"),
        (
            STEP | {name: value[0] for name, value in zip(OPENMPI, ("0", "1", "0", "1"), strict=False)},
            "srun task 7 of 8",
        ),
        # a launcher without a row
        (dict(PMIX_RANK="3"), "PMIX_RANK=3"),
        (dict(FLUX_TASK_RANK="0"), "FLUX_TASK_RANK=0"),
        # incomplete or broken
        (dict(WORLD_SIZE="4"), "RANK is not set"),
        (dict(RANK="0", WORLD_SIZE="4", LOCAL_RANK="0"), "LOCAL_WORLD_SIZE|LOCAL_SIZE is not set"),
        (dict(RANK="x", WORLD_SIZE="4", LOCAL_RANK="0", LOCAL_WORLD_SIZE="4"), "RANK='x'"),
        (dict(RANK="4", WORLD_SIZE="4", LOCAL_RANK="0", LOCAL_WORLD_SIZE="4"), "impossible"),
        (dict(RANK="0", WORLD_SIZE="4", LOCAL_RANK="0", LOCAL_WORLD_SIZE="8"), "impossible"),
    ],
)
def test_worlds_that_contradict_their_launcher_are_refused(environ, message):
    with pytest.raises(ConfigError) as error:
        discover(environ)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_mesh_groups_are_adjacent_ranks():
    meshes = [make_mesh(Ranks(rank, 8, 0, 1, "x"), sp=4) for rank in range(8)]
    assert [(m.dp, m.sp) for m in meshes] == [(2, 4)] * 8
    assert [(m.dp_rank, m.sp_rank) for m in meshes] == [(r // 4, r % 4) for r in range(8)]
    assert meshes[5].sp_ranks == (4, 5, 6, 7)


@pytest.mark.parametrize("sp", [3, 0, -1, 16])
def test_sp_must_divide_the_world(sp):
    with pytest.raises(ConfigError, match=rf"sp={sp} does not divide the world of 8 ranks; try one of \[1, 2, 4, 8\]"):
        make_mesh(Ranks(0, 8, 0, 1, "x"), sp)


@pytest.mark.parametrize("local_rank, visible, expected", [(0, 8, 0), (3, 8, 3), (3, 1, 0), (0, 1, 0), (3, 2, None)])
def test_a_rank_takes_its_gpu_of_those_that_it_sees(local_rank, visible, expected):
    ranks = Ranks(8 + local_rank, 16, local_rank, 4, "srun")
    if expected is None:
        with pytest.raises(ConfigError, match="shows 2 GPUs to this rank and has 4 ranks"):
            rendezvous.own_gpu(ranks, visible)
    else:
        assert rendezvous.own_gpu(ranks, visible) == expected


def test_ranks_that_share_a_gpu_are_refused():
    def check(gpus):
        store = torch.distributed.HashStore()
        for rank, gpu in enumerate(gpus):
            store.set(f"gpu/{4 + rank}", gpu)
        rendezvous.check_own(Ranks(4, 8, 0, len(gpus), "srun"), gpus[0], store)

    check(["a", "b", "c", "d"])
    with pytest.raises(ConfigError, match="4 ranks have 2 GPUs"):
        check(["a", "a", "b", "b"])
