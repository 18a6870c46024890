"""Texts that are read on from step to step: row i of a step continues where row i of the step before ended.

The tokens of all texts stand end to end, in a new order each epoch, and are cut into as many lanes of equal length as a
step has rows. Row i reads lane i; what is left at the end of a lane is not read in that epoch.

Shapes: b rows asked for, N tokens of a sequence, G rows of a global batch, n tokens of all texts.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from ...config import ConfigError
from ..sampling import permutation
from ..task import IGNORE, Batch
from .pieces import NOTHING, TokenizedText
from .token_store import TokenStore


class Lanes:
    """The training texts, read row by row."""

    def __init__(self, texts: TokenStore, seed: int, global_batch: int):
        self.texts, self.seed, self.rows = texts, seed, global_batch
        self.tokens = len(texts)

    def batch(self, step: int, rows: range, tokens: int, apart: bool) -> Batch:
        """Return `rows` of a step, each of N = `tokens`. All steps of a stage ask for as many.

        apart: whether memory, attention and loss start anew with each text; in a new epoch they always do.
        Raises ConfigError if the texts have fewer than G * N tokens.
        """
        length = self.tokens // self.rows
        if length < tokens:
            raise ConfigError(
                f"data.carry_memory=true: a step reads {self.rows} x {tokens} tokens, and the texts for training have "
                f"{self.tokens}; give more text, or lower train_batch_size or the stage's segments"
            )
        epoch, position = divmod(step, length // tokens)
        stream = in_order(self, epoch)
        shape = len(rows), tokens
        input_ids, labels = np.empty(shape, dtype=np.int64), np.full(shape, IGNORE, dtype=np.int64)
        starts = np.zeros(shape, dtype=bool)
        for i, row in enumerate(rows):
            start = row * length + position * tokens
            # With the token behind the row, which its last position predicts.
            part = stream.part(start, start + tokens + 1)
            input_ids[i] = part.tokens[:tokens]
            labels[i, : len(part.tokens) - 1] = part.tokens[1:]
            if apart:
                starts[i, part.begins[part.begins < tokens]] = True
                labels[i, part.begins[part.begins > 0] - 1] = IGNORE
            starts[i, 0] |= position == 0
        ids = [step * self.rows + row for row in rows]
        borders = torch.from_numpy(starts) if starts.any() else None
        return Batch(torch.from_numpy(input_ids), torch.from_numpy(labels), None, ids, borders)


class Joined(NamedTuple):
    """Texts end to end, in an order of their own."""

    texts: TokenStore
    order: np.ndarray
    ends: np.ndarray  # of each, int64

    def part(self, start: int, end: int) -> TokenizedText:
        """Return the tokens from `start` to `end`, or to the end of all."""
        found = NOTHING
        for i in range(int(np.searchsorted(self.ends, start, side="right")), len(self.order)):
            place = int(self.texts.starts[self.order[i]])
            size = int(self.texts.ends[self.order[i]]) - place
            begin = int(self.ends[i]) - size
            if begin >= end:
                break
            first = max(0, start - begin)
            tokens = self.texts.part(place + first, place + min(size, end - begin))
            found = found.joined(TokenizedText.of(tokens, whole=first == 0))
        return found


@lru_cache(maxsize=2)
def in_order(lanes: Lanes, epoch: int) -> Joined:
    """Return the texts of an epoch."""
    order = permutation(len(lanes.texts.ends), lanes.seed, epoch)
    return Joined(lanes.texts, order, np.cumsum((lanes.texts.ends - lanes.texts.starts)[order]))
