"""Stages of training: how long samples are, how long a stage lasts, and the learning rate within it."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..config import ConfigError, Positive, Section
from ..data.lengths import Difficulty

Fraction = Annotated[float, Field(ge=0, le=1)]


class Until(Section):
    """Early end of a stage by its training accuracy."""

    accuracy: Fraction
    """Mean training accuracy at which the stage ends. Example: 0.97"""
    over: Positive = 50
    """Number of last steps that the mean is taken over. Example: 100"""


class Stage(Section):
    """One stage. Its samples have a random number of pairs (retrieval) or segments (text, BABILong) up to a maximum."""

    pairs: Positive | None = None
    """Largest number of key-value pairs of a sample, for the tasks rewrite and remember. Example: 10"""
    segments: Positive | None = None
    """Largest number of segments of a sample, for the tasks text and babilong. Example: 8"""
    at_least: Fraction = 0.0
    """Length of the shortest samples as a fraction of the longest. Example: 0.3"""
    key_length: Positive | None = None
    """Retrieval: symbols of a key that vary, those before them are 0; null: all. Example: 2"""
    symbols: Annotated[int, Field(ge=2)] | None = None
    """Retrieval: number of different symbols in keys; few make keys alike; null: all. Example: 4"""
    steps: Positive | None = None
    """Largest number of optimizer steps of the stage; null: as many as train.epochs takes. Example: 1000"""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate; null: ds_config.optimizer.params.lr. Example: 5.0e-4"""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps in which the learning rate rises linearly to its peak; below `steps`. Example: 100"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after the warm-up, down to `final` times the peak. Example: cosine"""
    final: Fraction = 0.0
    """Fraction of the peak learning rate at the last step (linear, cosine). Example: 0.1"""
    until: Until | None = None
    """Condition that ends the stage early; null: none. Example: {accuracy: 0.97, over: 50}"""
    carry_state: Fraction | None = None
    """Probability that a row of the stage starts from the memory of another; null: train.carry_state. Example: 0.9"""
    start: Literal["best", "last"] = "best"
    """Checkpoint of the stage before from which this one starts: its best or its last. Example: last"""

    @model_validator(mode="after")
    def one_length(self) -> "Stage":
        """Check the length and the warm-up."""
        if (self.pairs is None) == (self.segments is None):
            raise ValueError("curriculum stage: give exactly one of pairs and segments")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"curriculum warmup_steps={self.warmup_steps}: must be below steps={self.steps}")
        return self

    @property
    def length(self) -> int:
        """Return the longest sample in the task's unit."""
        return self.pairs or self.segments or 0

    @property
    def total_steps(self) -> int:
        """Return its steps, which `with_steps` has set where the recipe left them out."""
        assert self.steps is not None, "the steps of a stage follow from the data, which are not open"
        return self.steps

    @property
    def keys(self) -> dict[str, int | None]:
        """Return which keys its samples have (retrieval); None: the task's own."""
        return {"key_length": self.key_length, "symbols": self.symbols}

    @property
    def difficulty(self) -> Difficulty:
        """Return the difficulty of its training samples."""
        return Difficulty.at_least(self.length, self.at_least)._replace(
            key_length=self.key_length, symbols=self.symbols
        )

    @property
    def unit(self) -> str:
        """Return what `length` counts, as Task.unit."""
        return "pairs" if self.pairs else "segments"


def learning_rate(stage: Stage, step: int, peak: float) -> float:
    """Return the rate of the stage's step `step` (from 0): linear warm-up, then the stage's schedule."""
    peak = stage.lr or peak
    if step < stage.warmup_steps:
        return peak * (step + 1) / stage.warmup_steps
    done = (step - stage.warmup_steps) / max(1, stage.total_steps - stage.warmup_steps - 1)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[stage.schedule]
    return peak * (stage.final + (1 - stage.final) * shape)


def with_steps(stages: Sequence[Stage], epochs: float | None, size: int | None, global_batch: int) -> list[Stage]:
    """Return the stages; those without steps get as many as `epochs` passes over `size` training samples take.

    Every step takes `global_batch` samples, and none comes twice in an epoch, also across stages. Raises ConfigError
    where samples are unlimited, size None, and for a warm-up that is too long.
    """
    found = list[Stage]()
    for i, stage in enumerate(stages):
        if stage.steps is None:
            assert epochs is not None, "a stage without steps needs train.epochs"
            if size is None:
                raise ConfigError(
                    f"train.epochs={epochs}: the task has no finite training set; set curriculum.{i}.steps"
                )
            stage = stage.model_copy(update={"steps": math.ceil(epochs * size / global_batch)})
            if stage.warmup_steps >= stage.total_steps:
                raise ConfigError(
                    f"curriculum.{i}.warmup_steps={stage.warmup_steps}: must be below the {stage.steps} steps of "
                    f"train.epochs={epochs}"
                )
        found.append(stage)
    return found
