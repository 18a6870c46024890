"""Lengths of samples: what a task counts, how many tokens that is, and how a step draws its own.

Known from the configuration alone, without torch, so that a curriculum is checked before anything else is loaded.
"""

from collections.abc import Sequence
from math import ceil
from typing import Literal, NamedTuple, Protocol

from ..config import ConfigError
from ..schedule.planner import divisors
from .sampling import Split, generator
from .sections import InstructionsConfig, RetrievalConfig, TextConfig

Measure = Literal["accuracy", "perplexity"]
Unit = Literal["pairs", "segments"]


class Difficulty(NamedTuple):
    """Length of samples in the task's unit (pairs or segments), uniform in minimum..maximum, both included.

    One length is drawn per step, so all rows of a global batch on all ranks have the same shape.
    """

    maximum: int
    minimum: int = 1
    key_length: int | None = None
    """Number of symbols in a key that vary (retrieval only); None: all."""
    symbols: int | None = None
    """Number of different symbols in keys (retrieval only); None: all."""

    @classmethod
    def fixed(cls, n: int) -> "Difficulty":
        """Return the difficulty whose samples all have length n."""
        return cls(n, n)

    @classmethod
    def at_least(cls, maximum: int, fraction: float) -> "Difficulty":
        """Return the difficulty of lengths from fraction * maximum (at least 1) to maximum."""
        return cls(maximum, max(1, ceil(fraction * maximum)))

    def draw(self, seed: int, split: Split, step: int) -> int:
        """Draw the length of the samples of one step."""
        assert 1 <= self.minimum <= self.maximum, f"difficulty {self} is not 1 <= minimum <= maximum"
        return int(generator("length", seed, split, step).integers(self.minimum, self.maximum + 1))


class Lengths(Protocol):
    """What is known of a task's samples before there is a task."""

    @property
    def measure(self) -> Measure:
        """What its validations measure beside the loss."""
        ...

    @property
    def unit(self) -> Unit:
        """What its lengths count."""
        ...

    @property
    def segment_tokens(self) -> int:
        """T, tokens of a segment."""
        ...

    def sequence_tokens(self, n: int) -> int:
        """Return the tokens N of a sample of `n` pairs or segments. Raises ConfigError for an impossible length."""
        ...


class PairLengths(NamedTuple):
    """Samples of retrieval: n pairs, one a segment, and the question."""

    config: RetrievalConfig
    unique_keys: bool
    measure: Measure = "accuracy"
    unit: Unit = "pairs"

    @property
    def segment_tokens(self) -> int:
        """T: key, separator, value, eos."""
        return self.config.key_length + self.config.value_length + 2

    def sequence_tokens(self, n: int) -> int:
        """Return the tokens N of a sample of `n` pairs. Raises ConfigError if there are too few different keys."""
        self.key_count(n)
        return (n + 1) * self.segment_tokens

    def key_count(self, n: int, key_length: int | None = None, symbols: int | None = None) -> int:
        """Count the different keys whose last `key_length` symbols vary among `symbols`; None: the task's own.

        Raises ConfigError if the task's keys are shorter or have fewer symbols, or if `n` unique keys do not exist.
        """
        chosen = {"key_length": key_length, "symbols": symbols}
        for name, value in chosen.items():
            most = getattr(self.config, name)
            if value is not None and value > most:
                raise ConfigError(f"{name}={value}: above data.retrieval.{name}={most}; lower it or raise that")
        length = key_length or self.config.key_length
        count = (symbols or self.config.symbols) ** length
        if self.unique_keys and n > count:
            raise ConfigError(
                f"pairs={n}: only {count} different keys of key_length={length} exist; "
                f"use at most {count} pairs, a longer key or task=rewrite"
            )
        return count


class MixedLengths(NamedTuple):
    """Samples of several tasks, of one length in each step."""

    parts: tuple[Lengths, ...]
    measure: Measure
    unit: Unit
    segment_tokens: int

    def sequence_tokens(self, n: int) -> int:
        """Return the tokens N of a sample of length `n`. Raises ConfigError if one of the tasks cannot make it."""
        return max(part.sequence_tokens(n) for part in self.parts)


def mixed_lengths(parts: Sequence[Lengths]) -> MixedLengths:
    """Return the lengths of a mixture. Raises ConfigError unless all parts count the same, in equal segments."""
    first = parts[0]
    for i, part in enumerate(parts):
        for name in ("unit", "segment_tokens"):
            found, wanted = getattr(part, name), getattr(first, name)
            if found != wanted:
                raise ConfigError(
                    f"data.mixture.parts.{i}: its {name} is {found}, and that of parts.0 is {wanted}; rows of a step "
                    "have one length, so mix tasks that count the same"
                )
    measure: Measure = "accuracy" if all(part.measure == "accuracy" for part in parts) else "perplexity"
    return MixedLengths(tuple(parts), measure, first.unit, first.segment_tokens)


def pair_lengths(config: RetrievalConfig, unique_keys: bool, segment_tokens: int | None) -> PairLengths:
    """Return the lengths of a retrieval task. Raises ConfigError for segments of other lengths."""
    lengths = PairLengths(config, unique_keys)
    if segment_tokens not in (None, lengths.segment_tokens):
        raise ConfigError(
            f"segment_tokens={segment_tokens}: key_length={config.key_length} and "
            f"value_length={config.value_length} make segments of {lengths.segment_tokens} tokens; "
            f"use {lengths.segment_tokens} or leave it out"
        )
    return lengths


class SegmentLengths(NamedTuple):
    """Samples of `n` segments; most: tokens of the longest sequence, None where there is no limit."""

    segment_tokens: int
    most: int | None
    measure: Measure
    unit: Unit = "segments"

    def sequence_tokens(self, n: int) -> int:
        """Return the tokens N of `n` segments. Raises ConfigError if they exceed the longest sequence."""
        if self.most is not None and n * self.segment_tokens > self.most:
            raise ConfigError(
                f"segments={n} of {self.segment_tokens} tokens exceed sequence_tokens={self.most}; "
                f"use at most {self.most // self.segment_tokens} or raise the task's sequence_tokens"
            )
        return n * self.segment_tokens


def text_lengths(config: TextConfig, segment_tokens: int | None) -> SegmentLengths:
    """Return the lengths of the task text. Raises ConfigError unless segments divide a sequence."""
    return divided(config.sequence_tokens, segment_tokens, "perplexity")


def instruction_lengths(config: InstructionsConfig, segment_tokens: int | None) -> SegmentLengths:
    """Return the lengths of the task instructions; of texts alone it has no accuracy, which only the rows tell.

    Raises ConfigError unless segments divide a sequence.
    """
    return divided(config.sequence_tokens, segment_tokens, "accuracy")


def divided(sequence: int, segment_tokens: int | None, measure: Measure) -> SegmentLengths:
    """Return the lengths of sequences of at most `sequence` tokens. Raises ConfigError unless segments divide one."""
    tokens = segment_tokens or sequence
    if sequence % tokens:
        raise ConfigError(
            f"segment_tokens={tokens} does not divide sequence_tokens={sequence}; "
            f"try {min(divisors(sequence), key=lambda d: abs(d - tokens))}"
        )
    return SegmentLengths(tokens, sequence, measure)


def babilong_lengths(segment_tokens: int | None) -> SegmentLengths:
    """Return the lengths of the task babilong. Raises ConfigError if the tokens of a segment are not given."""
    if segment_tokens is None:
        raise ConfigError("segment_tokens=None: task=babilong measures length in segments; give segment_tokens")
    return SegmentLengths(segment_tokens, None, "accuracy")
