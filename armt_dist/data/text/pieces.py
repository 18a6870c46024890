"""Pieces of long texts, of equal length, as training samples.

Shapes: b rows asked for, N tokens of a sequence.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from ..sampling import Order
from ..task import IGNORE, Batch


class TextPiece(NamedTuple):
    """Consecutive tokens of one text, int32 [at most sequence_tokens], and whether they count in the loss."""

    id: int
    tokens: np.ndarray
    scored: bool = True


def cut_text(texts: Iterable[np.ndarray], length: int, pack: bool, least: int = 2) -> Iterator[tuple[np.ndarray, int]]:
    """Cut the tokens of each text into pieces of `length`; yield each, and the unused tokens of the last text read.

    A piece never crosses a text, and the last one of a text may be shorter. With `pack`, texts are joined first, and
    only the very last piece may be shorter. Pieces of fewer than `least` tokens are dropped; a single one predicts
    nothing.
    """
    rest = np.empty(0, dtype=np.int32)
    for text in texts:
        tokens = np.concatenate([rest, text]) if len(rest) else text
        usable = len(tokens) // length * length if pack else len(tokens)
        for start in range(0, usable - least + 1, length):
            end = min(start + length, usable)
            yield tokens[start:end], len(tokens) - end
        rest = tokens[usable:]
    if len(rest) >= least:
        yield rest, 0


def collate(pieces: Iterable[TextPiece], tokens: int, pad: int) -> Batch:
    """Combine pieces of at most N = `tokens` into a batch, padded at the end with `pad` and masked.

    Every real token but the first is predicted.
    """
    pieces = list(pieces)
    input_ids = np.full((len(pieces), tokens), pad, dtype=np.int64)
    labels = np.full((len(pieces), tokens), IGNORE, dtype=np.int64)
    mask = np.zeros((len(pieces), tokens), dtype=np.int64)
    for row, piece in enumerate(pieces):
        n = len(piece.tokens)
        input_ids[row, :n] = piece.tokens
        mask[row, :n] = 1
        if piece.scored:
            labels[row, : n - 1] = piece.tokens[1:]
    attention_mask = None if mask.all() else torch.from_numpy(mask)
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(labels), attention_mask, [piece.id for piece in pieces])


class Corpus(NamedTuple):
    """Pieces in memory: 4 bytes per token on every rank."""

    pieces: list[np.ndarray]
    order: Order

    def take(self, step: int, rows: range) -> list[TextPiece]:
        """Return the pieces of some rows of a step."""
        numbers = [self.order.number(step, row) for row in rows]
        return [TextPiece(number, self.pieces[number], scored) for number, scored in numbers]
