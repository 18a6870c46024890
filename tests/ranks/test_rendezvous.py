"""Ranks meet, share edges and errors; one that fails or stays alone says so in one line."""

import os
import re
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from support.paths import ROOT
from support.ranks import spawn

from armt_dist.config import ConfigError
from armt_dist.distributed import mesh
from armt_dist.distributed.collectives import agree, gather_json
from armt_dist.distributed.mesh import make_mesh, ring


def edges_and_errors(ranks):
    """On every rank: peers and sums over its edges by sp, then what `agree` raises for no error, rank 2's, all's."""
    found = {}
    for sp in (1, 2, 4):
        edges = ring(make_mesh(ranks, sp), timeout_s=30)
        # In a ring all ranks would wait for each other if all began with the same side.
        for name, edge in sorted(zip(("before", "after"), edges, strict=True), reverse=ranks.rank % 2 == 1):
            if edge is not None:
                total = torch.tensor(10.0**ranks.rank)
                dist.all_reduce(total, group=edge.group)
                found[sp, name] = edge.peer, total.item()
    raised = []
    for error in (None, ValueError("disk full") if ranks.rank == 2 else None, ConfigError("same everywhere")):
        try:
            raised.append(agree(error))
        except ConfigError as caught:
            raised.append(str(caught))
    return found, raised


def test_four_ranks_share_edges_and_errors():
    found, raised = zip(*spawn(4, edges_and_errors), strict=True)
    for rank, edges in enumerate(found):
        assert set(edges) == {(sp, name) for sp in (2, 4) for name in ("before", "after")}
        for (sp, name), (peer, total) in edges.items():
            expected = rank // sp * sp + (rank + (1 if name == "after" else -1)) % sp
            assert (peer, total) == (expected, 10.0**rank + 10.0**expected), f"rank {rank}, sp={sp}, {name}"
    assert raised == ([None, "ValueError: disk full (on rank 2)", "same everywhere"],) * 4


def stay_away(ranks, absent):
    """What a rank is told, and after how many seconds, where one of four has met the others, but makes no edge."""
    mesh.TELL_S = 3.0
    start = time.monotonic()
    if ranks.rank == absent:
        gather_json("its node")
        # Until the others have given up: what it does next would be a collective.
        time.sleep(14)
        return "away", 0.0
    try:
        ring(make_mesh(ranks, 4), timeout_s=4)
    except ConfigError as error:
        return str(error), time.monotonic() - start
    return "an edge to nobody", 0.0


def test_an_edge_that_cannot_be_made_is_named_within_the_limit():
    told = spawn(4, stay_away, 3)
    messages = {message for message, _ in told} - {"away"}
    assert len(messages) == 1, "all ranks must say the same"
    assert re.match(
        r"parallel\.timeout_s=4: rank 2 on .* and rank 3 on its node cannot exchange a message .*; check the network",
        messages.pop(),
    )
    assert max(seconds for _, seconds in told) < 12


def fail_on_rank_1(ranks):
    if ranks.rank == 1:
        raise KeyError("only here")
    dist.barrier()


def exit_on_rank_1(ranks):
    if ranks.rank == 1:
        os._exit(7)
    dist.barrier()


def wait_on_rank_1(ranks):
    if ranks.rank == 1:
        time.sleep(600)


@pytest.mark.parametrize(
    ("function", "timeout_s", "message"),
    [
        (fail_on_rank_1, 60, r"\[rank 1\] KeyError: 'only here'"),
        (exit_on_rank_1, 60, r"rank 1 died with exit code 7"),
        (wait_on_rank_1, 5, r"ranks \[(0, )?1\] did not finish in time"),
    ],
)
def test_harness_reports_the_failing_rank_and_leaves_nobody_waiting(function, timeout_s, message):
    start = time.monotonic()
    with pytest.raises(AssertionError, match=message):
        spawn(2, function, timeout_s=timeout_s)
    assert time.monotonic() - start < 30


SCRIPT = """
from armt_dist import config
from armt_dist.distributed import launchers, rendezvous
config.RANK_0_SPEAKS_S = 0
ranks = launchers.discover()
config.run_main(lambda: rendezvous.start(ranks, timeout_s=2) and None, ranks.rank)
"""


def start_alone(rank: int, port: int) -> subprocess.CompletedProcess:
    """One rank of two, on its own."""
    environ = dict(os.environ, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), PYTHONPATH=str(ROOT))
    return subprocess.run([sys.executable, "-c", SCRIPT], env=environ, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("rank", "taken"), [(1, False), (0, True)], ids=["master unreachable", "port taken"])
def test_a_rank_that_cannot_meet_the_others_says_so_in_one_line(rank, taken):
    with socket.socket() as holder:
        holder.bind(("", 0))
        port = holder.getsockname()[1]
        if taken:
            holder.listen()
        result = start_alone(rank, port)
    assert result.returncode == 2, result.stderr
    errors = result.stderr.splitlines()
    assert len(errors) == 1 and f"MASTER_ADDR:MASTER_PORT=127.0.0.1:{port}" in errors[0], result.stderr
