"""The sections of the run configuration about steps that go wrong and ranks that are stuck. Need no torch."""

from typing import Annotated

from pydantic import Field

from ..config import Section

Seconds = Annotated[float, Field(gt=0)]


class Rollback(Section):
    """When a jump of the loss sends the run back to its last checkpoint."""

    factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 2.0
    """Ratio of the loss to the median of the previous steps above which the run rolls back."""
    over: Annotated[int, Field(ge=1)] = 50
    """Number of previous steps that the median is taken over."""


class WatchdogConfig(Section):
    """Time limits of the sections of a run: a rank that exceeds one writes its stacks and ends with exit code 1."""

    setup_s: Seconds = 1800
    """Limit in seconds from the start to the first step, and for each of the first two steps."""
    step_s: Seconds = 600
    """Limit in seconds of an optimizer step."""
    validation_s: Seconds = 3600
    """Limit in seconds of a validation."""
    checkpoint_s: Seconds = 1800
    """Limit in seconds of saving or loading a checkpoint."""
    heartbeat_s: Seconds = 10
    """Seconds between two updates of heartbeat/rank_R.json in the run folder."""
    straggler_factor: Annotated[float, Field(gt=1)] = 1.5
    """Ratio of a rank's cell time to the median rank's above which the rank is reported as a straggler."""
