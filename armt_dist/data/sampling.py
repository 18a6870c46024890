"""Which samples a step sees: random words and permutations as pure functions of (seed, split, step, row)."""

from functools import lru_cache
from math import ceil
from typing import Literal, NamedTuple

import numpy as np

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
# Independent random streams: numbers of one never correlate with those of another.
STREAMS = {"length": 0, "rows": 1, "epoch": 2, "files": 3}


def generator(stream: str, seed: int, split: Split, *where: int) -> np.random.Generator:
    """A generator that is a pure function of its arguments."""
    return np.random.Generator(philox(stream, seed, split, *where))


def philox(stream: str, seed: int, split: Split, *where: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence((STREAMS[stream], seed, SPLITS.index(split), *where)))


def row_words(seed: int, split: Split, step: int, rows: range, width: int) -> np.ndarray:
    """Random uint64 [b, width]: row i of a step owns the same words, whoever asks for it and with which others."""
    assert rows.step == 1 and len(rows) > 0, f"rows={rows} is not a stretch of a global batch"
    # Philox makes 4 words for each count of its counter, and `advance` moves the counter.
    counts = ceil(width / 4)
    stream = philox("rows", seed, split, step)
    stream.advance(rows.start * counts)
    return stream.random_raw(len(rows) * counts * 4).reshape(len(rows), counts * 4)[:, :width]


class Order(NamedTuple):
    """Which of `size` samples is row i of step k.

    Training walks through a new permutation each epoch. Validation takes them in order; rows beyond the last sample
    repeat earlier ones unscored, so ceil(size / global_batch) steps score each sample once. Then it starts again.
    """

    size: int
    seed: int
    split: Split
    global_batch: int

    def number(self, step: int, row: int) -> tuple[int, bool]:
        """Sample number, and whether it is to be scored."""
        assert row < self.global_batch, f"row {row} of a global batch of {self.global_batch}"
        if self.split == "validation":
            position = step % -(-self.size // self.global_batch) * self.global_batch + row
            return position % self.size, position < self.size
        epoch, position = divmod(step * self.global_batch + row, self.size)
        return int(permutation(self.size, self.seed, epoch)[position]), True


@lru_cache(maxsize=4)
def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return generator("epoch", seed, "train", epoch).permutation(size)
