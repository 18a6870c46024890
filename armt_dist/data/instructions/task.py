"""Data as people have it, one row a sample: what is scored, and how rows share a batch.

    input   U s e r : ... documents ... question A : y e s <eos> <pad> <pad>
    label   . . .   .     .             .        . y e s <eos> .   .    .        (`.` not scored)
    mask    1 1 1   1     1             1        1 1 1 1 1     1   0    0

All rows of a step have the fewest segments that hold its longest sample, within the stage's limits. In a stage with
fewer, a sample loses the beginning of its context; then, if it has to, its own beginning, and a text a random window.

Shapes: b rows, N tokens of a sequence, G rows of a global batch.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ...config import ConfigError
from ..lengths import Measure, Unit, instruction_lengths
from ..sampling import SPLITS, Order, Split, row_words
from ..sections import InstructionsConfig
from ..task import IGNORE, Batch, Difficulty, Run, Stateless, excerpt, real_tokens
from ..text.cache import cached
from ..text.files import TextFile, find_files, split_files
from ..text.token_store import TokenStore
from ..tokenizers import decode, padding_id
from .encoding import IDS, SCORED, RowEncoder, shorten
from .reading import Row, dataset_identity, read_dataset, read_files
from .store import Counts, held_out, write_samples

FIELD = "data.instructions"


class Instructions(Stateless):
    """The task `instructions`; `n` counts segments."""

    unit: Unit = "segments"

    def __init__(self, config: InstructionsConfig, tokenizer: PreTrainedTokenizerBase, run: Run) -> None:
        assert run.global_batch is not None, "task=instructions has finite samples: make_task needs global_batch"
        self.config, self.run, self.global_batch = config, run, run.global_batch
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.pad = padding_id(tokenizer)
        self.lengths = instruction_lengths(config, run.segment_tokens)
        self.segment_tokens = self.lengths.segment_tokens
        self.encoder = RowEncoder(tokenizer, config.leading_tokens)
        self.stores = {split: self.open_split(split) for split in SPLITS}
        self.counts = {split: Counts(*self.stores[split].about) for split in SPLITS}
        for split, counts in self.counts.items():
            if counts.rows and not counts.samples:
                raise ConfigError(
                    f"{FIELD}.sequence_tokens={config.sequence_tokens}: all {counts.rows:,} samples for {split} are "
                    "longer; raise it, or set too_long=cut"
                )
        # Of whole rows of text it means nothing.
        self.measure: Measure = "perplexity" if self.counts["train"].form == "text" else "accuracy"

    def open_split(self, split: Split) -> TokenStore:
        """Return the samples of a split, made now or before. Raises ConfigError."""
        identity, rows = self.of_dataset(split) if self.config.dataset else self.of_files(split)
        config = self.config

        def make(folder: Any) -> None:
            """Read, check and tokenise the rows."""
            write_samples(folder, rows, config, self.encoder, self.run.progress)

        what = ["instructions", self.encoder.identity(), config.sequence_tokens, config.too_long, identity]
        return cached(config.cache, what, make, self.run.progress, f"{FIELD}.cache")

    def of_files(self, split: Split) -> tuple[list[Any], Iterator[Row]]:
        """Return what the rows of a split depend on, and the rows, which are read when they are asked for."""
        named = self.config.validation_files
        listed = None if named is None else find_files(named, f"{FIELD}.validation_files")
        # Where no files are named, each file's rows are divided.
        training, validation = split_files(find_files(self.config.files or [], f"{FIELD}.files"), listed or [], 0)
        divided = named is None
        files, field = (training, "files") if divided or split == "train" else (validation, "validation_files")
        rows = read_files(files, f"{FIELD}.{field}")
        return [stamps(files), self.share(split) if divided else []], self.part(rows, split) if divided else rows

    def of_dataset(self, split: Split) -> tuple[list[Any], Iterator[Row]]:
        """Return what the rows of a split of a data set depend on, and the rows."""
        config = self.config.dataset
        assert config is not None, "the section has files"
        divided = config.validation_split is None
        name = config.validation_split if split == "validation" and config.validation_split else config.split
        rows = read_dataset(config, name, f"{FIELD}.dataset")
        identity = [dataset_identity(config, f"{FIELD}.dataset"), name, self.share(split) if divided else []]
        return identity, self.part(rows, split) if divided else rows

    def share(self, split: Split) -> list[Any]:
        """Return which part of the rows a split has."""
        return [split, self.config.validation_fraction]

    def part(self, rows: Iterator[Row], split: Split) -> Iterator[Row]:
        """Yield the rows of a split."""
        if split == "validation" and not self.config.validation_fraction:
            return iter(())
        return (row for row in rows if held_out(row, self.config.validation_fraction) == (split == "validation"))

    def sequence_tokens(self, n: int) -> int:
        """Return the tokens N of `n` segments. Raises ConfigError if they exceed `sequence_tokens`."""
        return self.lengths.sequence_tokens(n)

    def batch(self, split: Split, step: int, rows: range, difficulty: Difficulty) -> Batch:
        """Return `rows` of the global batch of `step`. Raises ConfigError without validation data."""
        if not self.size(split):
            raise ConfigError(f"{FIELD}: there is no data for {split}; set validation_fraction or validation_files")
        order = Order(len(self.stores[split].ends), self.run.seed, split, self.global_batch)
        tokens = self.sequence_tokens(self.segments(split, order, step, difficulty))
        words = row_words(self.run.seed, split, step, rows, 1)[:, 0] if split == "train" else [0] * len(rows)
        shape = len(rows), tokens
        input_ids, labels = np.full(shape, self.pad, dtype=np.int64), np.full(shape, IGNORE, dtype=np.int64)
        mask, sample_ids = np.zeros(shape, dtype=np.int64), list[int]()
        for i, (row, word) in enumerate(zip(rows, words, strict=True)):
            number, scored = order.number(step, row)
            sample_ids.append(number)
            sample = self.window(split, self.sample(split, number), tokens, int(word))
            ids, n = (sample & IDS).astype(np.int64), len(sample)
            input_ids[i, :n], mask[i, :n] = ids, 1
            if scored:
                labels[i, : n - 1] = np.where(sample[1:] & SCORED, ids[1:], IGNORE)
        attention_mask = None if mask.all() else torch.from_numpy(mask)
        return Batch(torch.from_numpy(input_ids), torch.from_numpy(labels), attention_mask, sample_ids)

    def segments(self, split: Split, order: Order, step: int, difficulty: Difficulty) -> int:
        """Return the fewest segments that hold all samples of a step, within the limits of `difficulty`."""
        if difficulty.minimum == difficulty.maximum:
            return difficulty.maximum
        store, numbers = self.stores[split], [order.number(step, row)[0] for row in range(order.global_batch)]
        longest = int((store.ends[numbers] - store.starts[numbers]).max())
        return max(difficulty.minimum, min(difficulty.maximum, -(-longest // self.segment_tokens)))

    def sample(self, split: Split, number: int) -> np.ndarray:
        """Return the tokens of a sample, uint32 with their bits. Raises ConfigError where the store is damaged."""
        store = self.stores[split]
        return store.part(int(store.starts[number]), int(store.ends[number]))

    def window(self, split: Split, sample: np.ndarray, tokens: int, word: int) -> np.ndarray:
        """Return at most `tokens` of a sample: a window of a text, chosen by the random `word`, or the end."""
        if self.counts[split].form == "text":
            start = word % (max(0, len(sample) - tokens) + 1)
            return sample[start : start + tokens]
        return shorten(sample, tokens)[-tokens:]

    def size(self, split: Split) -> int | None:
        """Return the number of samples."""
        return self.counts[split].samples

    def pads(self) -> bool:
        """Return whether a sample is shorter than the longest sequence."""
        most = self.config.sequence_tokens
        return any(bool((np.diff(store.ends, prepend=0) < most).any()) for store in self.stores.values())

    def notes(self) -> list[str]:
        """Return what was found, a line for each split."""
        return [self.counts[split].describe(split) for split in SPLITS]

    def show(self, batch: Batch, row: int = 0) -> str:
        """Return the beginning and the end of one sample as text."""
        return excerpt(decode(self.tokenizer, real_tokens(batch, row)))


def stamps(files: list[TextFile]) -> list[Any]:
    """Return what tells that the content of files has changed, as JSON has it."""
    return [(str(file.path.absolute()), *file.stamp) for file in files]
