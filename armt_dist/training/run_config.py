"""The run configuration, and the run folder in which it is written down."""

from typing import Annotated

from pydantic import Field

from ..config import Section
from ..data.tasks import DataConfig
from ..monitoring.bad_steps import Rollback
from ..monitoring.watchdog import WatchdogConfig
from ..runtime.executor import ParallelConfig
from ..runtime.segment_bptt import BPTTConfig
from ..zero3.partitioned_model import ModelConfig
from .curriculum import Stage

Positive = Annotated[int, Field(ge=1)]


class TrainConfig(Section):
    """The loop around the steps."""

    seed: Annotated[int, Field(ge=0)] = 0
    max_steps: Positive | None = None
    """Stop after so many steps in all, wherever the curriculum is."""
    log_every: Positive = 10
    """Steps between two lines in a log file; metrics.jsonl has every step."""
    save_every: Positive = 500
    keep_last: Positive = 2
    keep_every: Positive | None = None
    """Keep the checkpoints of every so many steps for good, besides the newest and the best."""
    save_in_background: bool = False
    """Go on while a checkpoint's files are written, from a copy of the rank's state in host memory."""
    validate_every: Positive = 200
    validation_steps: Positive = 4
    """Global batches of one validation; fewer where the validation data end before."""
    patience: Positive | None = None
    """End a stage after so many validations without a new best."""
    best: str | None = None
    """Validation metric that decides which checkpoint is best; left out: accuracy where there is one, else loss."""
    max_skipped: Positive = 5
    """End the run, exit code 1, after so many steps in a row whose loss or gradients were not finite."""
    rollback: Rollback | None = None
    """Answer a jump of the loss with the last checkpoint and other samples; left out: go on."""


class RunConfig(Section):
    """Everything but the ds_config, which owns batch, precision, optimizer, clipping, ZeRO and offload."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    bptt: BPTTConfig = BPTTConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    curriculum: Annotated[list[Stage], Field(min_length=1)]
    watchdog: WatchdogConfig = WatchdogConfig()
    profile: bool = False
    """Write a timeline of all ranks, as a picture and a Chrome trace, after the third step."""
    deterministic: bool = False
    """Only kernels that give the same bits in every run; slower."""
    digests: bool = False
    """Write a digest of every memory state of every step, for `python -m armt_dist.digest RUN_A RUN_B`; slow."""
