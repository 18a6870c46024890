"""Stages of training: how long samples are, how long a stage lasts, and the learning rate within it."""

import math
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from ..config import ConfigError, Section, one_line
from ..data.task import Difficulty

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Until(Section):
    """End a stage early: once the mean training accuracy of the last `over` steps is at least `accuracy`."""

    accuracy: Fraction
    over: Positive = 50


class Stage(Section):
    """One stage. Samples have a random number of pairs (retrieval) or segments (text, BABILong) up to the given one."""

    pairs: Positive | None = None
    segments: Positive | None = None
    at_least: Fraction = 0.0
    """Shortest samples as a fraction of the longest."""
    key_length: Positive | None = None
    """Retrieval: symbols of a key that vary, the ones before them are 0; left out: all."""
    symbols: Annotated[int, Field(ge=2)] | None = None
    """Retrieval: different symbols in keys; left out: all. Few make keys alike: each symbol of them counts."""
    steps: Positive
    lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate; left out: that of the ds_config."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after warm-up, down to `final` times the peak at the stage's last step."""
    final: Fraction = 0.0
    until: Until | None = None
    start: Literal["best", "last"] = "best"
    """Begin from the best checkpoint of the stage before, or from its last step."""

    @model_validator(mode="after")
    def one_length(self) -> "Stage":
        if (self.pairs is None) == (self.segments is None):
            raise ValueError("curriculum stage: give exactly one of pairs and segments")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"curriculum warmup_steps={self.warmup_steps}: must be below steps={self.steps}")
        return self

    @property
    def length(self) -> int:
        """The longest sample in the task's unit."""
        return self.pairs or self.segments

    @property
    def keys(self) -> dict[str, int | None]:
        """Which keys its samples have (retrieval); None: the task's own."""
        return {"key_length": self.key_length, "symbols": self.symbols}

    @property
    def difficulty(self) -> Difficulty:
        """Of its training samples."""
        return Difficulty.at_least(self.length, self.at_least)._replace(**self.keys)

    @property
    def unit(self) -> str:
        """What `length` counts, as Task.unit."""
        return "pairs" if self.pairs else "segments"


def learning_rate(stage: Stage, step: int, peak: float) -> float:
    """The rate of the stage's step `step` (from 0): linear warm-up, then the stage's schedule."""
    peak = stage.lr or peak
    if step < stage.warmup_steps:
        return peak * (step + 1) / stage.warmup_steps
    done = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps - 1)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[stage.schedule]
    return peak * (stage.final + (1 - stage.final) * shape)


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
