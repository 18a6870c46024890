"""What a task gives to the trainer, and how its random numbers depend on (seed, split, step, row) alone.

Every row of a global batch owns a fixed stretch of one counter-based stream, so that any data-parallel rank, in
a world of any size and after any resume, generates the same sample for the same row of the same step.

Shapes: b rows asked for, N tokens of a sequence.
"""

from math import ceil
from typing import Literal, NamedTuple, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from .sampling import Split, generator

# The label of a position that is not scored (the convention of torch and transformers).
IGNORE = -100


class Batch(NamedTuple):
    """Rows of one global batch.

    input_ids       int64 [b, N]
    labels          int64 [b, N]; labels[:, t] is the token to predict AT position t, -100 where not scored
    attention_mask  int64 [b, N], 1 at real tokens; None when nothing is padded
    sample_ids      b numbers, the same on every rank: which sample each row is
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor | None
    sample_ids: list[int]


class Difficulty(NamedTuple):
    """How long samples are, in the task's unit (pairs or segments): uniform in minimum..maximum, both included.

    One number is drawn per step, so all rows of a global batch on all ranks have the same shape.
    """

    maximum: int
    minimum: int = 1
    key_length: int | None = None
    """Symbols of a key that vary (retrieval only); None: all."""
    symbols: int | None = None
    """Different symbols in keys (retrieval only); None: all."""

    @classmethod
    def fixed(cls, n: int) -> "Difficulty":
        """Always n."""
        return cls(n, n)

    @classmethod
    def at_least(cls, maximum: int, fraction: float) -> "Difficulty":
        """n >= fraction * maximum, and at least 1."""
        return cls(maximum, max(1, ceil(fraction * maximum)))

    def draw(self, seed: int, split: Split, step: int) -> int:
        """The length of the samples of one step."""
        assert 1 <= self.minimum <= self.maximum, f"difficulty {self} is not 1 <= minimum <= maximum"
        return int(generator("length", seed, split, step).integers(self.minimum, self.maximum + 1))


class Run(NamedTuple):
    """What a task must know of the run it serves.

    `segment_tokens`: tokens of a segment, None for the task's own choice.
    `global_batch`: rows of a step over all ranks and accumulation steps; needed where samples are counted.
    """

    seed: int
    segment_tokens: int | None = None
    global_batch: int | None = None


class Task(Protocol):
    """A source of samples. Only a streamed data set has a state; all else is a pure function of its arguments."""

    measure: Literal["accuracy", "perplexity"]
    unit: Literal["pairs", "segments"]
    vocab_size: int
    segment_tokens: int
    tokenizer: PreTrainedTokenizerBase

    def sequence_tokens(self, n: int) -> int:
        """Tokens N of a sample of `n` pairs or segments. Raises ConfigError where the task has none so long."""

    def batch(self, split: Split, step: int, rows: range, difficulty: Difficulty) -> Batch:
        """Rows `rows` of the global batch of `step`."""

    def size(self, split: Split) -> int | None:
        """Number of different samples, None where they do not end."""

    def show(self, batch: Batch, row: int = 0) -> str:
        """One sample as text for a person."""

    def state_dict(self) -> dict:
        """What `load_state_dict` needs to go on at the same sample; JSON-serialisable, empty for most tasks."""

    def load_state_dict(self, state: dict) -> None: ...


class Stateless:
    """Base of tasks whose samples are a pure function of (seed, split, step, row) and do not end."""

    def size(self, split: Split) -> int | None:
        return None

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        assert not state, f"a task without a state was given one: {sorted(state)}"


def excerpt(text: str, shown: int = 400) -> str:
    """A text for a person: of a long one, `shown` characters of each end."""
    return text if len(text) <= 2 * shown else f"{text[:shown]}\n…\n{text[-shown:]}"
