"""Stages of training: how long samples are, how long a stage lasts, and the learning rate within it."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..config import Section
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
