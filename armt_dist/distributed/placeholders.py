"""Placeholders in arguments of a command, for the tasks of a Slurm array and other sweeps: {array}, {job}, {name}."""

import os
import re
from collections.abc import Mapping

from ..config import ConfigError

# The variable that a placeholder stands for, and how it comes to be set.
VARIABLES = {
    "array": ("SLURM_ARRAY_TASK_ID", "sbatch --array"),
    "job": ("SLURM_JOB_ID", "sbatch"),
    "name": ("SLURM_JOB_NAME", "sbatch"),
}
PLACEHOLDER = re.compile(r"\{(" + "|".join(VARIABLES) + r")\}")


def fill(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """Replace {array}, {job} and {name} in ``key=value`` or a path; other braces stay as they are.

    Raises ConfigError where Slurm has not set the variable.
    """

    def value(found: re.Match[str]) -> str:
        variable, command = VARIABLES[found[1]]
        if not environ.get(variable):
            raise ConfigError(f"{text}: {variable} is not set; submit with {command}, or write the value out")
        return environ[variable]

    return PLACEHOLDER.sub(value, text)
