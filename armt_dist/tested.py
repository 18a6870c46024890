"""The versions of transformers that the modelling code was tested with; an export carries this file too."""

import transformers
from packaging.version import Version
from transformers.utils import logging

OLDEST, NEWEST = "5.18.0", "5.24.0"
INSTALLED = transformers.__version__
TESTED = f"{OLDEST} to {NEWEST}"


def warn_if_untested() -> None:
    """Say in one line that the installed transformers is older than OLDEST or of a minor version after NEWEST."""
    installed = Version(INSTALLED)
    if not Version(OLDEST) <= installed or installed.release[:2] > Version(NEWEST).release[:2]:
        logging.get_logger(__name__).warning(
            f"transformers {INSTALLED} is installed; this ARMT was tested with {TESTED} and checks itself at the first "
            "generate"
        )
