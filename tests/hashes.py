"""Write launch/hashes.txt and launch/hashes-test.txt: constraints.txt with the SHA-256 of each package's archives.

    python tests/hashes.py        # tests/lock.sh calls it, in an environment with what constraints.txt names

`launch/install.sh --hashes` installs them. There is a hash for each archive that pip takes on Linux with glibc 2.28 or
later, x86-64 and ARM, Python 3.11 and 3.12. hashes.txt has what armt_dist needs, without torch and CUDA;
hashes-test.txt what its tests need too.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "constraints.txt"
PYTHONS, MACHINES = ("3.11", "3.12"), ("x86_64", "aarch64")
PLATFORMS = ("manylinux_2_28", "manylinux_2_17", "manylinux2014")
LIMIT_S = 600


def archives(python: str, machine: str) -> list[dict]:
    """Return what pip would take for this Python and machine: a list of its reports on packages. Installs nothing."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--dry-run"]
    command += ["--ignore-installed", "--no-deps", "--no-build-isolation", "--python-version", python]
    command += [f"--platform={name}_{machine}" for name in PLATFORMS] + ["--report", "-", "-r", str(LOCK)]
    environ = {**os.environ, "DS_BUILD_OPS": "0"}
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S, check=True)
    return json.loads(done.stdout[done.stdout.index("{") :])["install"]


def closure(roots: list[str], needs: dict[str, list[Requirement]]) -> set[str]:
    """Return the packages that some requirements need, directly or not; `needs`: the requirements of each package."""
    left = [(Requirement(text), frozenset({""})) for text in roots]
    seen: set[tuple[str, frozenset]] = set()
    while left:
        needed, extras = left.pop()
        if needed.marker and not any(needed.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        found = canonicalize_name(needed.name), frozenset({"", *needed.extras})
        if found not in seen:
            seen.add(found)
            left += [(further, found[1]) for further in needs.get(found[0], [])]
    return {name for name, _ in seen}


def main() -> None:
    hashes, pins = defaultdict(set), {}
    needs = {"torch": [Requirement(text) for text in requires("torch") or []]}
    for package in (package for p in PYTHONS for m in MACHINES for package in archives(p, m)):
        about = package["metadata"]
        name = canonicalize_name(about["name"])
        pins[name] = f"{about['name']}=={about['version']}"
        needs[name] = [Requirement(text) for text in about.get("requires_dist", [])]
        hashes[name].add(package["download_info"]["archive_info"]["hashes"]["sha256"])
    base = closure(requires("armt_dist") or [], needs)
    about = "# tests/lock.sh wrote this file; see tests/hashes.py."
    for file, names, first in (
        ("hashes.txt", [name for name in pins if name in base], about),
        ("hashes-test.txt", [name for name in pins if name not in base], f"{about}\n-r hashes.txt"),
    ):
        lines = [
            " \\\n    ".join([pins[name], *(f"--hash=sha256:{h}" for h in sorted(hashes[name]))]) for name in names
        ]
        (ROOT / "launch" / file).write_text("\n".join([first, *lines]) + "\n")


if __name__ == "__main__":
    main()
