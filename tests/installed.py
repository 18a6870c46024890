"""Print Python's version and those of the packages that matter, as cells of docs/versions.md."""

import platform
from importlib.metadata import version

PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "datasets", "pydantic", "numpy")

print(" | ".join([platform.python_version(), *map(version, PACKAGES)]))
