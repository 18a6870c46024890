"""The versions of transformers that the modelling code was tested with."""

import transformers
from transformers.utils import logging

OLDEST, NEWEST = "5.18.0", "5.24.0"
INSTALLED = transformers.__version__
TESTED = f"{OLDEST} to {NEWEST}"


def warn_if_untested() -> None:
    """Warn in one line if the installed transformers is of a minor version before OLDEST or after NEWEST."""
    if not minor(OLDEST) <= minor(INSTALLED) <= minor(NEWEST):
        logging.get_logger(__name__).warning(
            f"transformers {INSTALLED} is installed; this ARMT was tested with {TESTED} and checks itself at the first "
            "generate"
        )


def minor(version: str) -> tuple[int, int]:
    """Return major and minor version: "5.24.0" -> (5, 24)."""
    major, minor, *_ = version.split(".")
    return int(major), int(minor)
