"""Split the world into groups of sp ranks that share one sequence, and connect each group as a ring."""

from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from .launchers import Ranks, check_groups


class Mesh(NamedTuple):
    """World = dp x sp. The sp ranks of a group are adjacent and share one sequence."""

    dp: int  # number of groups
    sp: int
    dp_rank: int  # index of this rank's group
    sp_rank: int  # index of this rank in its group
    sp_ranks: tuple[int, ...]  # ranks of this group in the world


def make_mesh(ranks: Ranks, sp: int) -> Mesh:
    """Split the world into groups of `sp` adjacent ranks. Raises ConfigError where sp does not divide it."""
    check_groups(ranks.world_size, sp)
    dp_rank, sp_rank = divmod(ranks.rank, sp)
    return Mesh(ranks.world_size // sp, sp, dp_rank, sp_rank, tuple(range(dp_rank * sp, (dp_rank + 1) * sp)))


class Edge(NamedTuple):
    """A neighbour in the ring of an sp group: its rank in the world, and the process group of the two."""

    peer: int
    group: dist.ProcessGroup


def ring(mesh: Mesh, timeout_s: float) -> tuple[Edge | None, Edge | None]:
    """Return this rank's edges to the sp rank before it and to the one after it; None where sp = 1. Collective.

    Every edge has a separate group, used for the hand-off alone. Between two ranks there are two edges.
    """
    before = after = None
    # Even edges, odd edges, and the one that closes the ring: all ranks make the groups in the same order, and each is
    # in only one of those that are made at a time.
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
