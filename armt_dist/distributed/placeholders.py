"""Placeholders in arguments of a command, for the tasks of a Slurm array and other sweeps: {array}, {job}, {name}."""

import os
import re
from collections.abc import Mapping

from ..config import ConfigError

VARIABLES = {"array": "SLURM_ARRAY_TASK_ID", "job": "SLURM_JOB_ID", "name": "SLURM_JOB_NAME"}
PLACEHOLDER = re.compile(r"\{(" + "|".join(VARIABLES) + r")\}")
REMEDIES = {"array": "submit with sbatch --array", "job": "submit with sbatch", "name": "submit with sbatch"}


def fill(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """Replace {array}, {job} and {name} in ``key=value`` or a path; other braces stay as they are.

    Raises ConfigError where Slurm has not set the variable.
    """

    def value(found: re.Match[str]) -> str:
        variable = VARIABLES[found[1]]
        if not environ.get(variable):
            raise ConfigError(f"{text}: {variable} is not set; {REMEDIES[found[1]]}, or write the value out")
        return environ[variable]

    return PLACEHOLDER.sub(value, text)
