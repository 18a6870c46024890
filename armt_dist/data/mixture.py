"""A mixture of tasks: every row of a step is drawn from one of them, in exact proportion to their weights.

The rows of all steps, end to end, form blocks of BLOCK rows. In each block every task has its share, in an order that
depends on (seed, split, block) alone. So it is known without reading on how many rows a task had before, and its next
row is the one that it would have made next alone: no sample of a finite set comes twice in an epoch of that set.

Shapes: b rows asked for, N tokens of a sequence, G rows of a global batch.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config import ConfigError
from .lengths import mixed_lengths
from .sampling import Split, generator
from .task import Batch, Difficulty, Run, Stateless, Task, notes_of
from .tokenizers import Encoder

# Rows in which every task has its share.
BLOCK = 1024


class Mixture(Stateless):
    """The task `mixture`; `n` counts what the tasks count."""

    def __init__(self, names: Sequence[str], tasks: Sequence[Task], weights: Sequence[float], run: Run) -> None:
        """names: of the tasks, for people."""
        assert run.global_batch is not None, "task=mixture counts the rows of steps: make_task needs global_batch"
        self.names, self.tasks, self.seed, self.global_batch = names, tasks, run.seed, run.global_batch
        self.tokenizer = tasks[0].tokenizer
        self.vocab_size = max(task.vocab_size for task in tasks)
        lengths = mixed_lengths(tasks)
        self.lengths, self.unit, self.measure = lengths, lengths.unit, lengths.measure
        self.segment_tokens = lengths.segment_tokens
        self.carries = all(getattr(task, "carries", True) for task in tasks)
        held_out = [
            weight if task.size("validation") != 0 else 0.0 for weight, task in zip(weights, tasks, strict=True)
        ]
        self.shares: dict[Split, tuple[int, ...]] = {"train": shares(weights)}
        if any(held_out):
            self.shares["validation"] = shares(held_out)

    def sequence_tokens(self, n: int) -> int:
        """Return the tokens N of a sample of length `n`. Raises ConfigError if one of the tasks cannot make it."""
        return self.lengths.sequence_tokens(n)

    def batch(self, split: Split, step: int, rows: range, difficulty: Difficulty) -> Batch:
        """Return `rows` of the global batch of `step`. Raises ConfigError as the tasks do."""
        if split not in self.shares:
            raise ConfigError("data.mixture: none of its parts has validation data; give one of them some")
        n = difficulty.draw(self.seed, split, step)
        fixed = difficulty._replace(minimum=n, maximum=n)
        found = [self.row(split, step * self.global_batch + row, fixed) for row in rows]
        masks = joined([part.attention_mask for part in found], torch.ones_like(found[0].input_ids))
        return Batch(
            torch.cat([part.input_ids for part in found]),
            torch.cat([part.labels for part in found]),
            masks,
            [number for part in found for number in part.sample_ids],
            joined([part.document_starts for part in found], torch.zeros_like(found[0].input_ids, dtype=torch.bool)),
            joined([part.needed for part in found], torch.full((1,), -1)),
        )

    def row(self, split: Split, position: int, difficulty: Difficulty) -> Batch:
        """Return the row at a position in all steps end to end; sample id s of task i is s * (number of tasks) + i."""
        block, place = divmod(position, BLOCK)
        dealt = deal(self.shares[split], self.seed, split, block)
        source = int(dealt.sources[place])
        step, row = divmod(block * self.shares[split][source] + int(dealt.before[place]), self.global_batch)
        batch = self.tasks[source].batch(split, step, range(row, row + 1), difficulty)
        return batch._replace(sample_ids=[number * len(self.tasks) + source for number in batch.sample_ids])

    def size(self, split: Split) -> int | None:
        """Return None for training, which has no epoch; for validation, the rows before a set begins anew."""
        if split == "train":
            return None
        if split not in self.shares:
            return 0
        parts = zip(self.tasks, self.shares[split], strict=True)
        rows = [size * BLOCK // share for task, share in parts if share and (size := task.size(split)) is not None]
        return min(rows) if rows else None

    def pads(self) -> bool:
        """Return whether a sample of any task may be shorter than its batch."""
        return any(task.pads() for task in self.tasks)

    def texts(self) -> dict[Split, list]:
        """Return the text files that the tasks have read."""
        found: dict[Split, list] = {}
        for task in self.tasks:
            for split, facts in task.texts().items():
                found.setdefault(split, []).extend(facts)
        return found

    def notes(self) -> list[str]:
        """Return what the tasks have found, and their shares."""
        parts = zip(self.names, self.shares["train"], strict=True)
        text = ", ".join(f"{share / BLOCK:.1%} {name}" for name, share in parts)
        return [*(line for task in self.tasks for line in notes_of(task)), f"data.mixture, rows for training: {text}"]

    def show(self, batch: Batch, row: int = 0) -> str:
        """Return one sample as its task shows it."""
        return self.tasks[batch.sample_ids[row] % len(self.tasks)].show(batch, row)


class Dealt(NamedTuple):
    """Which task each row of a block belongs to, and how many rows of the block that task has before it: [BLOCK]."""

    sources: np.ndarray
    before: np.ndarray


@lru_cache(maxsize=8)
def deal(shares: tuple[int, ...], seed: int, split: Split, block: int) -> Dealt:
    """Deal the rows of a block to tasks, of which task i gets shares[i]."""
    sources = generator("mixture", seed, split, block).permutation(np.repeat(np.arange(len(shares)), shares))
    before = np.empty(BLOCK, dtype=np.int64)
    for source, share in enumerate(shares):
        before[sources == source] = np.arange(share)
    return Dealt(sources, before)


def shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the rows of a block that each task gets: BLOCK together. Raises ConfigError for a weight without a row."""
    exact = np.array(weights) / sum(weights) * BLOCK
    found = np.floor(exact).astype(int)
    # The largest remainders get the rows that are left.
    found[np.argsort(found - exact, kind="stable")[: BLOCK - found.sum()]] += 1
    for i, (weight, share) in enumerate(zip(weights, found, strict=True)):
        if weight and not share:
            raise ConfigError(f"data.mixture.parts.{i}.weight={weight}: less than 1 row of {BLOCK}; raise it")
    return tuple(int(share) for share in found)


def joined(parts: Sequence[Tensor | None], neutral: Tensor) -> Tensor | None:
    """Return the rows of all parts, `neutral` for those that have none; None if none has any."""
    if all(part is None for part in parts):
        return None
    return torch.cat([neutral[:1] if part is None else part for part in parts])


def common_tokenizer(tokenizers: Sequence[PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    """Return the tokenizer of all parts, with a chat template if any has one. Raises ConfigError if they differ."""
    first = Encoder(tokenizers[0]).identity()
    for i, tokenizer in enumerate(tokenizers):
        if Encoder(tokenizer).identity() != first:
            raise ConfigError(
                f"data.mixture.parts.{i}: its tokenizer differs from that of parts.0 ({len(tokenizer)} and "
                f"{len(tokenizers[0])} tokens); give both the same"
            )
    return next((tokenizer for tokenizer in tokenizers if tokenizer.chat_template), tokenizers[0])
