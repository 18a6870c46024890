"""The progress of a run: its steps, stage, batches, and best checkpoint so far."""

import json
from typing import Annotated, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError

from ..checkpoint.folder import TAG
from ..config import ConfigError, one_line
from .curriculum import Stage

Count = Annotated[int, Field(ge=0, le=2**53)]


class Progress(NamedTuple):
    """Everything besides tensors that a resumed run needs. Saved with every checkpoint."""

    step: Count = 0  # optimizer steps made or skipped
    stage: Count = 0
    stage_step: Count = 0  # steps of this stage
    tokens: Count = 0
    seconds: float = 0.0  # training time over all restarts
    recent: tuple[float, ...] = ()  # training accuracies of the stage's last steps, for `until`
    best: float | None = None  # this stage's best validation score, larger is better
    best_tag: Annotated[str, Field(pattern=TAG)] | None = None  # its checkpoint
    stale: Count = 0  # validations since then
    skipped: Count = 0  # steps skipped for non-finite numbers; they count in `step`
    skipped_in_a_row: Count = 0
    losses: tuple[float, ...] = ()  # losses of the stage's last steps, for a rollback
    passed_over: Count = 0  # global batches that rollbacks left out
    validation_due: bool = False  # a stop signal came before the validation of this step

    @classmethod
    def restored(cls, saved: dict) -> "Progress":
        """Restore what `_asdict` gave, after its way through JSON. Raises ConfigError for what does not fit."""
        try:
            # Strict, and by way of JSON: there a list is a tuple, and a text is no number.
            return TypeAdapter(cls).validate_json(json.dumps(saved), strict=True)
        except ValidationError as error:
            field = ".".join(map(str, error.errors()[0]["loc"]))
            raise ConfigError(f"checkpoint: its progress.{field}: {one_line(error.errors()[0]['msg'])}") from None

    @property
    def batch(self) -> int:
        """The global batch, from 0, that the next step trains on."""
        return self.step + self.passed_over

    def after_step(self, accuracy: float, tokens: int, seconds: float, window: int) -> "Progress":
        """Record one more step; window: number of accuracies to keep."""
        return self._replace(
            step=self.step + 1,
            stage_step=self.stage_step + 1,
            tokens=self.tokens + tokens,
            seconds=self.seconds + seconds,
            recent=(*self.recent, accuracy)[-window:],
        )

    def after_skip(self) -> "Progress":
        """Record a step that all ranks skipped."""
        return self._replace(skipped=self.skipped + 1, skipped_in_a_row=self.skipped_in_a_row + 1)

    def after_loss(self, loss: float, window: int) -> "Progress":
        """Record the loss of a step that was made; window: number of losses to keep."""
        return self._replace(skipped_in_a_row=0, losses=(*self.losses, loss)[-window:] if window else ())

    def after_validation(self, score: float, tag: str) -> "Progress":
        """Record a validation of checkpoint `tag`."""
        if self.best is None or score > self.best:
            return self._replace(best=score, best_tag=tag, stale=0)
        return self._replace(stale=self.stale + 1)

    def next_stage(self) -> "Progress":
        """Return the progress at the beginning of the next stage."""
        return self._replace(
            stage=self.stage + 1, stage_step=0, recent=(), losses=(), best=None, best_tag=None, stale=0
        )


def stage_over(stage: Stage, progress: Progress, patience: int | None) -> bool:
    """Return whether a stage has ended: by its steps, its accuracy, or `patience` validations without a new best."""
    learned = (
        stage.until is not None
        and len(progress.recent) >= stage.until.over
        and sum(progress.recent) / len(progress.recent) >= stage.until.accuracy
    )
    stale = patience is not None and progress.stale >= patience
    return progress.stage_step >= stage.total_steps or learned or stale
