"""Strangers on the network: idle connections, listeners that say nothing, impostors, and what listens where."""

import os
import pickle
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from support.paths import ROOT
from support.ranks import spawn

from armt_dist.config import ConfigError
from armt_dist.distributed.collectives import all_gather_single, gather, gather_json
from armt_dist.distributed.rendezvous import free_port
from armt_dist.distributed.store import SECRET, digest

TIMEOUT_S = 8
SCRIPT = f"""
import sys
import psutil, torch
import torch.distributed as dist
from armt_dist import config
from armt_dist.distributed import launchers, rendezvous
config.RANK_0_SPEAKS_S = 0
ranks = launchers.discover()

def meet():
    rendezvous.start(ranks, timeout_s={TIMEOUT_S})
    total = torch.ones(1)
    dist.all_reduce(total)
    ports = [c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN"]
    print(int(total), *ports, flush=True)
    rendezvous.stop()

config.run_main(meet, ranks.rank)
"""


def start_rank(rank: int, world: int, port: int, **environ: str) -> subprocess.Popen:
    where = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
    own = {name: str(value) for name, value in where.items()} if world > 1 else {}
    environment = {**os.environ, **own, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env=environment | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ends(process: subprocess.Popen) -> tuple[int, str, str]:
    out, errors = process.communicate(timeout=60)
    return process.returncode, out, errors


@pytest.mark.parametrize("world", [1, 2])
def test_nothing_listens_beyond_this_machine(world):
    port = free_port()
    ranks = [start_rank(rank, world, port) for rank in range(world)]
    for code, out, errors in map(ends, ranks):
        assert code == 0, errors
        total, *addresses = out.split()
        assert total == str(world) and set(addresses) <= {"127.0.0.1"}, out
        assert world == 1 or addresses


def test_five_hundred_idle_connections():
    """They are opened as soon as the port is, before the other rank comes."""
    port, held = free_port(), []
    first = start_rank(0, 2, port)
    deadline = time.monotonic() + TIMEOUT_S
    while len(held) < 500:
        assert time.monotonic() < deadline
        try:
            held.append(socket.create_connection(("127.0.0.1", port), timeout=1))
        except OSError:
            time.sleep(0.02)
    second = start_rank(1, 2, port)
    for code, out, errors in map(ends, (first, second)):
        assert code == 0 and out.startswith("2"), errors
    for connection in held:
        connection.close()


def test_a_listener_that_says_nothing():
    """On the port of rank 0: the others end in time."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        kept = []
        threading.Thread(target=lambda: kept.extend(iter(silent.accept, None)), daemon=True).start()
        started = time.monotonic()
        code, _, errors = ends(start_rank(1, 2, silent.getsockname()[1]))
    assert code == 2 and f"rank 1 of 2 on {socket.gethostname()} could not meet" in errors, errors
    assert len(errors.splitlines()) == 1 and time.monotonic() - started < TIMEOUT_S + 12


def test_who_is_missing_is_named():
    port = free_port()
    ranks = [start_rank(rank, 4, port) for rank in (0, 2)]
    for rank, (code, _, errors) in zip((0, 2), map(ends, ranks), strict=True):
        assert code == 2 and len(errors.splitlines()) == 1, errors
        assert ("(not here: rank 1, 3 of 4)" if rank == 0 else "(not all other ranks have come)") in errors


def test_a_rank_with_another_secret_is_not_met():
    port = free_port()
    ranks = [start_rank(rank, 2, port, **{SECRET: f"secret of {rank}"}) for rank in range(2)]
    assert [code for code, *_ in map(ends, ranks)] == [2, 2]


def test_the_port_depends_on_the_secret(monkeypatch):
    monkeypatch.setenv(SECRET, "a")
    port = digest("port", "1", "0")
    monkeypatch.setenv(SECRET, "b")
    assert port != digest("port", "1", "0")


class Evil:
    """Writes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def send_a_pickle(ranks, path):
    """Rank 1 sends a pickle in place of JSON. Returns what rank 0 says."""
    if ranks.rank == 0:
        try:
            return gather_json({"from": 0})
        except ConfigError as error:
            return str(error)
    content = pickle.dumps(Evil(path))
    gather([len(content)], torch.device("cpu"))
    row = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    all_gather_single(torch.empty(2 * len(row), dtype=torch.uint8), row)
    return None


def test_a_pickle_of_an_impostor_is_not_run(tmp_path):
    said, _ = spawn(2, send_a_pickle, str(tmp_path / "evil"))
    assert said.startswith("a rank sent what is not JSON") and not (tmp_path / "evil").exists()


def exchange(ranks):
    return gather_json({"rank": ranks.rank, "text": "ä" * ranks.rank, "none": None, "list": [1.5, True]})


def test_what_ranks_exchange_is_json():
    for found in spawn(3, exchange):
        assert found == [{"rank": r, "text": "ä" * r, "none": None, "list": [1.5, True]} for r in range(3)]


def test_nothing_of_ours_exchanges_pickles():
    sources = [*ROOT.glob("armt_dist/**/*.py"), *ROOT.glob("launch/*.py")]
    for name in ("all_gather_object", "broadcast_object_list", "scatter_object_list", "gather_object("):
        assert not [path for path in sources if f"dist.{name}" in path.read_text()], name
    assert hasattr(dist, "all_gather_object")
