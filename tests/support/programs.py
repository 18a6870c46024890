"""Find programs that are no Python packages."""

import shutil
import sys
from pathlib import Path


def find(program: str) -> str | None:
    """Return the path of a program; Debian keeps daemons in sbin, which is not on every PATH."""
    return shutil.which(program) or shutil.which(program, path="/usr/local/sbin:/usr/sbin:/sbin")


def find_mpirun() -> str | None:
    """Return the mpirun of this Python's environment, else the system's."""
    return shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
