"""Print Python's version and those of the packages that matter, as cells of docs/versions.md; "-" for a missing one."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "datasets", "pydantic", "numpy")


def installed(package: str) -> str:
    """The version of `package`, or "-"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


print(" | ".join([platform.python_version(), *map(installed, PACKAGES)]))
