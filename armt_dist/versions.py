"""Are the installed packages within the ranges of setup.py? What is outside was never tested here."""

import sys
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from .config import ConfigError

INSTALL = "bash launch/install.sh"


def outside() -> list[str]:
    """Return each required package that is missing or of a version outside its range, as text for people."""
    try:
        needed = [Requirement(text) for text in requires("armt_dist") or []]
    except PackageNotFoundError:
        # A checkout that was not installed: there are no ranges to compare with.
        return []
    found = []
    for package in needed:
        if package.marker is not None and not package.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(package.name)
        except PackageNotFoundError:
            found.append(f"{package.name} is missing (needs {package.specifier or 'any version'})")
            continue
        # Local parts such as +cpu and pre-releases count as their version.
        if not package.specifier.contains(installed, prereleases=True):
            found.append(f"{package.name} {installed} is outside {package.specifier}")
    return found


def check_versions(strict: bool, speaks: bool = True) -> None:
    """Say in one line what is outside; with `strict` raise it as ConfigError. `speaks`: false on all ranks but one."""
    found = outside()
    if not found:
        return
    text = f"{'; '.join(found)}; the tested versions are installed by: {INSTALL}"
    if strict:
        raise ConfigError(f"strict-versions: {text}")
    if speaks:
        print(f"warning: {text}", file=sys.stderr, flush=True)
