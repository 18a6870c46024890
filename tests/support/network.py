"""Nodes on one machine: network namespaces that a switch connects, with links that are slowed down and cut. Needs root.

A node is a namespace with the interface eth0, an address and a host name of its own; folders and clocks are the
machine's. Everything is removed at the end, processes included.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from support.paths import ROOT

PORT = 29500
# Of a link's buffer: what a switch holds back.
LATENCY_MS = 400


def run(*command: str) -> str:
    """Return what a command prints. RuntimeError with its complaint."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


class Network:
    """Nodes 1 to n, each with one link to the switch; a direction is "out" of the node, "in" to it, or both."""

    def __init__(self, count: int, folder: Path):
        self.count, self.folder = count, folder
        self.name = f"armt{os.getpid()}"
        self.mbit: float | None = None

    def node(self, number: int) -> str:
        """Return the namespace of a node; 0 is the switch."""
        return f"{self.name}-{number}"

    def host(self, number: int) -> str:
        """Return the host name of a node."""
        return f"node{number}"

    def make(self) -> None:
        """Make the switch and the nodes."""
        hosts = [f"10.0.0.{number} {self.host(number)}" for number in range(1, self.count + 1)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts]) + "\n")
        run("ip", "netns", "add", self.node(0))
        run("ip", "-n", self.node(0), "link", "add", "switch", "type", "bridge")
        run("ip", "-n", self.node(0), "link", "set", "switch", "up")
        for number in range(1, self.count + 1):
            node, port = self.node(number), f"port{number}"
            run("ip", "netns", "add", node)
            peer = ["peer", "name", port, "netns", self.node(0)]
            run("ip", "-n", node, "link", "add", "eth0", "type", "veth", *peer)
            run("ip", "-n", self.node(0), "link", "set", port, "master", "switch", "up")
            run("ip", "-n", node, "addr", "add", f"10.0.0.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                run("ip", "-n", node, "link", "set", device, "up")

    def ends(self, number: int, direction: str = "both") -> list[tuple[str, str]]:
        """Return (namespace, device) of what sends in a direction of a node's link."""
        ends = {"out": (self.node(number), "eth0"), "in": (self.node(0), f"port{number}")}
        return list(ends.values()) if direction == "both" else [ends[direction]]

    def slow_down(self, mbit: float | None) -> None:
        """Limit every link to so many Mbit/s each way; None: not at all."""
        self.mbit = mbit
        for number in range(1, self.count + 1):
            self.mend(number)

    def cut(self, number: int, direction: str = "both") -> None:
        """Lose every packet of a node's link, without a word to anyone."""
        for namespace, device in self.ends(number, direction):
            run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "blackhole")

    def mend(self, number: int) -> None:
        """Let packets pass again."""
        for namespace, device in self.ends(number):
            with suppress(RuntimeError):  # there is none to begin with
                run("tc", "-n", namespace, "qdisc", "del", "dev", device, "root")
            if self.mbit:
                limit = ["rate", f"{self.mbit}mbit", "burst", "64kb", "latency", f"{LATENCY_MS}ms"]
                run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *limit)

    def start(self, number: int, command: Sequence[object], log: Path, **environ: str) -> subprocess.Popen:
        """Start a command on a node; what it prints goes to `log`."""
        # `ip netns exec` has made a mount namespace, and goes on in it.
        script = f'hostname {self.host(number)} && mount --bind {self.folder / "hosts"} /etc/hosts && exec "$@"'
        inside = ["ip", "netns", "exec", self.node(number), "unshare", "--uts", "sh", "-c", script, "sh"]
        environ = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "PYTHONPATH": str(ROOT)} | environ
        with log.open("w") as out:
            return subprocess.Popen(
                [*inside, *map(str, command)], stdout=out, stderr=out, env=os.environ | environ, start_new_session=True
            )

    def torchrun(self, number: int, script: Sequence[object], log: Path, **environ: str) -> subprocess.Popen:
        """Start a node's rank of a script under torchrun, which meets on the first node."""
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={self.count}", "--nproc-per-node=1"]
        launcher += [f"--node-rank={number - 1}", "--master-addr=10.0.0.1", f"--master-port={PORT}"]
        return self.start(number, [*launcher, *script], log, **environ)

    def processes(self, number: int) -> list[int]:
        """Return the processes of a node."""
        return [int(pid) for pid in run("ip", "netns", "pids", self.node(number)).split()]

    def end(self) -> None:
        """End all processes of the nodes."""
        for number in range(1, self.count + 1):
            with suppress(RuntimeError):
                for pid in self.processes(number):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    def remove(self) -> None:
        """End all processes, and remove nodes and switch."""
        self.end()
        for number in range(self.count + 1):
            with suppress(RuntimeError):
                run("ip", "netns", "del", self.node(number))


@contextmanager
def network(count: int, folder: Path) -> Iterator[Network]:
    """Nodes until the end of the block, whatever happens in it."""
    nodes = Network(count, folder)
    try:
        nodes.make()
        yield nodes
    finally:
        nodes.remove()


def ended_s(ranks: Sequence[subprocess.Popen], limit_s: float) -> list[float]:
    """Return after how many seconds each process has ended. AssertionError for one that outlives the limit."""
    begin, ends = time.monotonic(), {}
    while len(ends) < len(ranks):
        for place, rank in enumerate(ranks):
            if place not in ends and rank.poll() is not None:
                ends[place] = time.monotonic() - begin
        assert time.monotonic() < begin + limit_s, f"{[p for p in range(len(ranks)) if p not in ends]} have not ended"
        time.sleep(0.05)
    return [ends[place] for place in range(len(ranks))]
