"""Compare the installed packages with the tested ranges of setup.py."""

import platform
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from .config import ConfigError

INSTALL = "bash launch/install.sh"


def installed(packages: Iterable[str]) -> dict[str, str | None]:
    """Return the version of Python and of each package, None for one that is not there."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def outside() -> list[str]:
    """Describe each required package that is missing or outside its range, for people."""
    try:
        needed = [Requirement(text) for text in requires("armt_dist") or []]
    except PackageNotFoundError:
        # The checkout is not installed, so no ranges are known.
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
        # `contains` ignores local suffixes such as +cpu.
        if not package.specifier.contains(installed, prereleases=True):
            found.append(f"{package.name} {installed} is outside {package.specifier}")
    return found


def check_versions(strict: bool, speaks: bool = True) -> None:
    """Warn about packages outside their range in one line; with `strict`, raise ConfigError instead.

    speaks: whether this rank prints; true on one rank only.
    """
    found = outside()
    if not found:
        return
    text = f"{'; '.join(found)}; install the tested versions with: {INSTALL}"
    if strict:
        raise ConfigError(f"strict-versions: {text}")
    if speaks:
        print(f"warning: {text}", file=sys.stderr, flush=True)
