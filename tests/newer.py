"""Say which packages have a newer version than the lock within the ranges of setup.py. Never an error.

python tests/newer.py
"""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

LOCK = Path(__file__).parents[1] / "constraints.txt"
# Seconds for one answer of the package index.
LIMIT_S = 20


def locked() -> dict[str, Version]:
    """Versions by name, as in the lock."""
    lines = (line.partition("==") for line in LOCK.read_text().splitlines() if "==" in line)
    return {canonicalize_name(name): Version(version) for name, _, version in lines}


def newest(needed: Requirement) -> Version | None:
    """Return the newest version in the range that the index has; None where it does not answer."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "index", "versions", needed.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"^Available versions: (.*)$", done.stdout, re.MULTILINE)
    return max(needed.specifier.filter(map(Version, found[1].split(", "))), default=None) if found else None


def main() -> None:
    lock = locked()
    named = [needed for needed in map(Requirement, requires("armt_dist") or []) if needed.marker is None]
    ours = {needed: lock[name] for needed in named if (name := canonicalize_name(needed.name)) in lock}
    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(ours, pool.map(newest, ours), strict=True))
    later = [f"{n.name} {v} (locked {ours[n]})" for n, v in found.items() if v and v > ours[n]]
    silent = [needed.name for needed, version in found.items() if version is None]
    if later:
        print(f"warning: newer than the lock and within setup.py's ranges: {', '.join(later)}; try them with:")
        print("  bash tests/versions.sh newest, then bash tests/lock.sh")
    if silent:
        print(f"warning: the package index said nothing about {', '.join(silent)}")
    if not later and not silent:
        print(f"the lock has the newest versions of the {len(found)} packages that setup.py names")


if __name__ == "__main__":
    main()
