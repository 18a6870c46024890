"""The samples of a step: random words and permutations as pure functions of (seed, split, step, row)."""

from functools import lru_cache
from hashlib import sha256
from math import ceil
from typing import Literal, NamedTuple

import numpy as np

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
# Independent random streams.
STREAMS = {"length": 0, "rows": 1, "epoch": 2, "carry": 3, "mixture": 4}


def generator(stream: str, seed: int, split: Split, *where: int) -> np.random.Generator:
    """Return a generator that depends on the arguments alone."""
    return np.random.Generator(philox(stream, seed, split, *where))


def philox(stream: str, seed: int, split: Split, *where: int) -> np.random.Philox:
    """Return the counter-based bit generator behind `generator`."""
    return np.random.Philox(np.random.SeedSequence((STREAMS[stream], seed, SPLITS.index(split), *where)))


def place(name: str) -> float:
    """Return a number in [0, 1) that depends on `name` alone: what lies below a fraction is held out for validation.

    Further names then move none of the earlier ones from training to validation or back.
    """
    return int.from_bytes(sha256(name.encode()).digest()[:8], "big") / 2**64


def row_words(seed: int, split: Split, step: int, rows: range, width: int) -> np.ndarray:
    """Return random uint64 [b, width]. The words of a row do not depend on which other rows are requested."""
    assert rows.step == 1 and len(rows) > 0, f"rows={rows}: not consecutive rows of a global batch"
    # Philox generates 4 words per count of its counter, which `advance` moves.
    counts = ceil(width / 4)
    stream = philox("rows", seed, split, step)
    stream.advance(rows.start * counts)
    return stream.random_raw(len(rows) * counts * 4).reshape(len(rows), counts * 4)[:, :width]


class Order(NamedTuple):
    """The order in which the rows of the steps take `size` samples.

    Training takes a new permutation each epoch. Validation takes samples in order; rows beyond the last sample repeat
    earlier ones unscored, so ceil(size / global_batch) steps score each sample once, and then start again.
    """

    size: int
    seed: int
    split: Split
    global_batch: int

    def number(self, step: int, row: int) -> tuple[int, bool]:
        """Return the sample number of a row, and whether it is scored."""
        assert row < self.global_batch, f"row {row} of a global batch of {self.global_batch}"
        if self.split == "validation":
            position = step % -(-self.size // self.global_batch) * self.global_batch + row
            return position % self.size, position < self.size
        epoch, position = divmod(step * self.global_batch + row, self.size)
        return int(permutation(self.size, self.seed, epoch)[position]), True


@lru_cache(maxsize=4)
def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of the training samples in one epoch."""
    return generator("epoch", seed, "train", epoch).permutation(size)
