"""Split the world into groups of sp ranks that share one sequence, and connect each group as a ring."""

import json
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from itertools import count
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from ..config import ConfigError, one_line
from ..deadline import within
from .collectives import device, gather_json
from .launchers import Ranks, check_groups

# Longest wait for the other ranks to tell how it went with their edges, beyond the time that making one may take.
TELL_S = 10.0
# Times that this process has made edges, for keys in the store.
made = count()


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
    """A neighbour in the ring of an sp group: its rank in the world, the process group of the two, and its host."""

    peer: int
    group: dist.ProcessGroup
    host: str = ""  # of the peer

    def __str__(self) -> str:
        return f"rank {self.peer} on {self.host}"


def ring(mesh: Mesh, timeout_s: float) -> tuple[Edge | None, Edge | None]:
    """Return this rank's edges to the sp rank before it and to the one after it; None where sp = 1. Collective.

    Every edge has a separate group, used for the hand-off alone. Between two ranks there are two edges. A message has
    gone each way. Raises ConfigError naming both ranks and hosts of an edge that cannot within `timeout_s`.
    """
    before = after = None
    rank, hosts = mesh.sp_ranks[mesh.sp_rank], gather_json(socket.gethostname())
    # Even edges, odd edges, and the one that closes the ring: all ranks make the groups in the same order, and each is
    # in only one of those that are made at a time.
    for starts in (range(0, mesh.sp - 1, 2), range(1, mesh.sp - 1, 2), range(mesh.sp - 1, mesh.sp)):
        pairs = [[i * mesh.sp + j, i * mesh.sp + (j + 1) % mesh.sp] for i in range(mesh.dp) for j in starts]
        if mesh.sp == 1 or not pairs:
            continue
        group = connect(pairs, rank, hosts, timeout_s)
        if mesh.sp_rank in starts:
            peer = mesh.sp_ranks[(mesh.sp_rank + 1) % mesh.sp]
            after = Edge(peer, group, hosts[peer])
        elif (mesh.sp_rank - 1) % mesh.sp in starts:
            peer = mesh.sp_ranks[mesh.sp_rank - 1]
            before = Edge(peer, group, hosts[peer])
    return before, after


def connect(pairs: list[list[int]], rank: int, hosts: Sequence[str], timeout_s: float) -> dist.ProcessGroup:
    """Return this rank's group of those of the disjoint `pairs`, after a message each way. Collective.

    hosts: of all ranks. Raises ConfigError, the same on all ranks that can be told, with an edge that failed.
    """
    own, where = next((pair for pair in pairs if rank in pair), None), device()
    fault = ""
    group: Any = None  # of another rank's pair there is none

    def work() -> None:
        nonlocal group
        if where.type == "cuda":
            torch.cuda.set_device(where)  # of this thread
        group, _ = dist.new_subgroups_by_enumeration(pairs, timeout=timedelta(seconds=timeout_s))
        if own is not None:
            exchange(group, rank, own, where)

    try:
        within(timeout_s + TELL_S / 2, work)
    except (RuntimeError, TimeoutError) as error:
        reason = one_line(error, 200)
        if own is None or "store based barrier" in reason:
            # It has made its own edge, and waits for the ranks whose edges fail: they know better.
            fault = f"rank {rank} on {hosts[rank]} waits for other ranks ({reason})"
        else:
            ends = " and ".join(f"rank {end} on {hosts[end]}" for end in own)
            fault = f"{ends} cannot exchange a message ({reason})"
    if worst := worst_fault(fault, rank, hosts, timeout_s):
        raise ConfigError(
            f"parallel.timeout_s={timeout_s:g}: {worst}; check the network between hosts, and GLOO_/NCCL_SOCKET_IFNAME"
        )
    return group


def worst_fault(fault: str, rank: int, hosts: Sequence[str], timeout_s: float) -> str:
    """Return a rank's fault, the same on all ranks, or "" if none has any. Collective that outlasts missing ranks.

    Ranks tell rank 0 through the store: a collective would wait for the rank that is missing.
    """
    store = dist.PrefixStore(f"edges/{next(made)}", _get_default_store())
    keys = [str(other) for other in range(len(hosts))]

    def tell() -> str:
        store.set(keys[rank], json.dumps(fault))
        if rank == 0:
            # Where rank 0 has waited for them itself, the others are about to tell, or not here.
            end = time.monotonic() + TELL_S + (0 if fault else timeout_s)
            while not store.check(keys) and time.monotonic() < end:
                time.sleep(0.05)
            faults = [json.loads(store.get(key)) for key in keys if store.check([key])]
            faults += [f"rank {key} on {hosts[int(key)]} did not connect" for key in keys if not store.check([key])]
            store.set("worst", max(faults, key=lambda each: (bool(each), "cannot exchange" in each)))
        store.wait(["worst"], timedelta(seconds=timeout_s + 2 * TELL_S))
        return store.get("worst").decode()

    try:
        return within(timeout_s + 2 * TELL_S, tell)
    except (RuntimeError, TimeoutError) as error:
        return fault or f"rank {rank} on {hosts[rank]} cannot reach rank 0 on {hosts[0]} ({one_line(error, 200)})"


def exchange(group: dist.ProcessGroup, rank: int, pair: Sequence[int], where: torch.device) -> None:
    """Send a number to the other end of an edge, and receive one, in the same order at both ends; wait for both.

    It makes the connections that libraries put off until the first message.
    """
    first, other = rank == pair[0], pair[rank == pair[0]]
    for sends in (first, not first):
        number = torch.ones(1, device=where)
        if sends:
            dist.send(number, other, group=group)
        else:
            dist.recv(number, other, group=group)
        # On a GPU only the stream has waited so far.
        number.item()
