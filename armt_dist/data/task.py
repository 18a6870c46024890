"""The interface between tasks and the trainer: batches that depend on (seed, split, step, row) alone.

Every row of a global batch owns a fixed part of one counter-based stream. So any data-parallel rank, in a world of any
size and after any resume, generates the same sample for the same row of the same step.

Shapes: b rows asked for, N tokens of a sequence.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from ..model.segment_rows import IGNORE as IGNORE
from .lengths import Difficulty, Lengths
from .sampling import Split


class Batch(NamedTuple):
    """Rows of one global batch.

    input_ids       int64 [b, N]
    labels          int64 [b, N]; labels[:, t] is the token to predict AT position t, -100 where not scored
    attention_mask  int64 [b, N], 1 at real tokens; None if nothing is padded
    sample_ids      number of the sample in each of the b rows, the same on every rank
    document_starts bool [b, N], true where a document begins that must not see what is before it; None if none does
    needed          int64 [b], position of the end of the last fact that the answer needs, -1 if unknown; None for
                    tasks without answers
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor | None
    sample_ids: list[int]
    document_starts: torch.Tensor | None = None
    needed: torch.Tensor | None = None


class Run(NamedTuple):
    """What a task needs to know about the run."""

    seed: int
    segment_tokens: int | None = None
    """Tokens of a segment; None: the task's own choice."""
    global_batch: int | None = None
    """Rows of a step over all ranks and accumulation steps; needed by tasks with a finite number of samples."""
    carry_memory: bool = False
    """Whether every row continues that of the step before."""
    progress: Callable[[str], None] = lambda line: None
    """Called with a line while a long preparation gets on."""


class Task(Lengths, Protocol):
    """A source of samples. Only a streamed data set has a state; other batches depend on the arguments alone."""

    vocab_size: int
    tokenizer: PreTrainedTokenizerBase

    def batch(self, split: Split, step: int, rows: range, difficulty: Difficulty) -> Batch:
        """Return `rows` of the global batch of `step`."""
        ...

    def size(self, split: Split) -> int | None:
        """Return the number of different samples; None if they are unlimited."""
        ...

    def pads(self) -> bool:
        """Return whether a sample may be shorter than its batch."""
        ...

    def texts(self) -> Mapping[Split, list]:
        """Return the `TextFacts` of text files by split; empty for tasks without them."""
        ...

    def show(self, batch: Batch, row: int = 0) -> str:
        """Return one sample as text for people."""
        ...

    def state_dict(self) -> dict:
        """Return the state from which `load_state_dict` continues; JSON-serialisable, empty for most tasks.

        It may be that of the rows which this rank has asked for; then `merge_states` makes one of those of all ranks.
        """
        ...

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state_dict` was called."""
        ...


class Stateless:
    """Base of tasks whose unlimited samples depend on (seed, split, step, row) alone."""

    carries: bool = True
    """Whether a sample may start from the memory of another one (train.carry_state); true where a task does not say."""

    def size(self, split: Split) -> int | None:
        """Return None: the samples are unlimited."""
        return None

    def pads(self) -> bool:
        """Return false: every sample is as long as asked for."""
        return False

    def texts(self) -> Mapping[Split, list]:
        """Return no text files."""
        return {}

    def state_dict(self) -> dict:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Accept the empty state."""
        assert not state, f"a task without a state was given one: {sorted(state)}"


def merged_state(task: Task, states: list[dict]) -> dict:
    """Return the state of a task from those of all ranks: that of the first one, unless the task has `merge_states`."""
    merge = getattr(task, "merge_states", None)
    return states[0] if merge is None else merge(states)


def notes_of(task: Task) -> list[str]:
    """Return what a task has found in its data, line by line; none unless the task has `notes`."""
    notes = getattr(task, "notes", None)
    return [] if notes is None else notes()


def real_tokens(batch: Batch, row: int) -> torch.Tensor:
    """Return the tokens of one row without padding."""
    ids, mask = batch.input_ids[row], batch.attention_mask
    return ids if mask is None else ids[mask[row] > 0]


def excerpt(text: str, shown: int = 400) -> str:
    """Shorten a long text to `shown` characters of each end."""
    return text if len(text) <= 2 * shown else f"{text[:shown]}\n…\n{text[-shown:]}"
