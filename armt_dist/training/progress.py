"""How far a run is: steps, stages, batches, and the best checkpoint so far."""

from typing import NamedTuple

from ..config import ConfigError, one_line
from .curriculum import Stage


class Progress(NamedTuple):
    """Where a run is: everything besides tensors that a resumed run needs. Saved with every checkpoint."""

    step: int = 0  # optimizer steps done
    stage: int = 0
    stage_step: int = 0  # of them in this stage
    tokens: int = 0
    seconds: float = 0.0  # of training, over all restarts
    recent: tuple[float, ...] = ()  # training accuracy of the stage's last steps, for `until`
    best: float | None = None  # this stage's best validation score, larger is better
    best_tag: str | None = None
    stale: int = 0  # validations since
    skipped: int = 0  # steps whose numbers were not finite; they count in `step`, and changed nothing
    skipped_in_a_row: int = 0
    losses: tuple[float, ...] = ()  # of the stage's last steps, for a rollback
    passed_over: int = 0  # global batches that rollbacks left out

    @classmethod
    def restored(cls, saved: dict) -> "Progress":
        """The inverse of `_asdict` after a way through JSON. Raises ConfigError for what another version wrote."""
        try:
            return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()})
        except TypeError as error:
            raise ConfigError(f"checkpoint: its progress is not of this version ({one_line(error)})") from None

    @property
    def batch(self) -> int:
        """The global batch, from 0, that the next step trains on."""
        return self.step + self.passed_over

    def after_step(self, accuracy: float, tokens: int, seconds: float, window: int) -> "Progress":
        """One more step."""
        return self._replace(
            step=self.step + 1,
            stage_step=self.stage_step + 1,
            tokens=self.tokens + tokens,
            seconds=self.seconds + seconds,
            recent=(*self.recent, accuracy)[-window:],
        )

    def after_skip(self) -> "Progress":
        """The step just made was none."""
        return self._replace(skipped=self.skipped + 1, skipped_in_a_row=self.skipped_in_a_row + 1)

    def after_loss(self, loss: float, window: int) -> "Progress":
        """The step just made had this loss."""
        return self._replace(skipped_in_a_row=0, losses=(*self.losses, loss)[-window:] if window else ())

    def after_validation(self, score: float, tag: str) -> "Progress":
        """A validation, which is the best of its stage or not."""
        if self.best is None or score > self.best:
            return self._replace(best=score, best_tag=tag, stale=0)
        return self._replace(stale=self.stale + 1)

    def next_stage(self) -> "Progress":
        """The first step of the following stage."""
        fresh = {"recent": (), "losses": (), "best": None, "best_tag": None, "stale": 0}
        return self._replace(stage=self.stage + 1, stage_step=0, **fresh)


def stage_over(stage: Stage, progress: Progress, patience: int | None) -> bool:
    """By its steps, by accuracy, or because validation did not improve `patience` times."""
    learned = (
        stage.until is not None
        and len(progress.recent) >= stage.until.over
        and sum(progress.recent) / len(progress.recent) >= stage.until.accuracy
    )
    stale = patience is not None and progress.stale >= patience
    return progress.stage_step >= stage.steps or learned or stale
