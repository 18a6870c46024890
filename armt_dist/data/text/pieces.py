"""Pieces of long texts, of equal length, as training samples.

Shapes: b rows asked for, N tokens of a sequence.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from ..sampling import Order
from ..task import IGNORE, Batch
from .token_store import TokenStore


class TokenizedText(NamedTuple):
    """Tokens int32 [n] of a text or of a part of one, and the places where texts begin in it, int64, ascending."""

    tokens: np.ndarray
    begins: np.ndarray

    @classmethod
    def of(cls, tokens: np.ndarray, whole: bool = True) -> "TokenizedText":
        """Return one text, or the end of one."""
        return cls(tokens, np.arange(int(whole and len(tokens) > 0)))

    def joined(self, following: "TokenizedText") -> "TokenizedText":
        """Return this text with another one behind it."""
        begins = np.concatenate([self.begins, following.begins + len(self.tokens)])
        return TokenizedText(np.concatenate([self.tokens, following.tokens]), begins)

    def part(self, start: int, end: int) -> "TokenizedText":
        """Return the tokens from `start` to `end`."""
        begins = self.begins[(self.begins >= start) & (self.begins < end)] - start
        return TokenizedText(self.tokens[start:end], begins)


NOTHING = TokenizedText.of(np.empty(0, dtype=np.int32))


class TextPiece(NamedTuple):
    """Consecutive tokens, at most sequence_tokens, and whether they count in the loss."""

    id: int
    text: TokenizedText
    scored: bool = True


def cut_text(
    texts: Iterable[TokenizedText], length: int, pack: bool, least: int = 2
) -> Iterator[tuple[TokenizedText, int]]:
    """Cut each text into pieces of `length`; yield each, and the number of unused tokens of the last text read.

    A piece never crosses a text, and the last one of a text may be shorter. With `pack`, texts are joined first, and
    only the very last piece may be shorter. Pieces of fewer than `least` tokens are dropped; a single one predicts
    nothing.
    """
    rest = NOTHING
    for text in texts:
        text = rest.joined(text)
        count = len(text.tokens)
        usable = count // length * length if pack else count
        for start in range(0, usable - least + 1, length):
            end = min(start + length, usable)
            yield text.part(start, end), count - end
        rest = text.part(usable, count)
    if len(rest.tokens) >= least:
        yield rest, 0


def collate(pieces: Iterable[TextPiece], tokens: int, pad: int, apart: bool = False) -> Batch:
    """Combine pieces of at most N = `tokens` into a batch, padded at the end with `pad` and masked.

    Every real token but the first is predicted. apart: texts that were joined do not see each other, so the first token
    of one is not predicted from the one before it.
    """
    pieces = list(pieces)
    shape = len(pieces), tokens
    input_ids, labels = np.full(shape, pad, dtype=np.int64), np.full(shape, IGNORE, dtype=np.int64)
    mask, starts = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
    for row, piece in enumerate(pieces):
        n = len(piece.text.tokens)
        input_ids[row, :n] = piece.text.tokens
        mask[row, :n] = 1
        if piece.scored:
            labels[row, : n - 1] = piece.text.tokens[1:]
        if apart:
            # Whatever is before the first token, the memory is empty there.
            begins = piece.text.begins[piece.text.begins > 0]
            starts[row, begins] = True
            labels[row, begins - 1] = IGNORE
    attention_mask = None if mask.all() else torch.from_numpy(mask)
    document_starts = torch.from_numpy(starts) if starts.any() else None
    ids = [piece.id for piece in pieces]
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(labels), attention_mask, ids, document_starts)


class Corpus:
    """Pieces of stored texts, as `cut_text` cuts them; where each lies is known from the lengths of the texts."""

    def __init__(self, texts: TokenStore, length: int, pack: bool, least: int):
        """Arguments as for `cut_text`."""
        self.texts, self.length = texts, length
        # What is cut: each text, or all of them joined.
        self.ends = np.array([len(texts)]) if pack else texts.ends
        self.sizes = np.diff(self.ends, prepend=0)
        counts = np.where(self.sizes < least, 0, (self.sizes - least) // length + 1)
        # The number of pieces up to the end of each.
        self.counted = np.cumsum(counts)
        shortest = self.sizes - (counts - 1) * length
        self.padded = bool((shortest[counts > 0] < length).any())

    def __len__(self) -> int:
        return int(self.counted[-1]) if len(self.counted) else 0

    def text_of(self, number: int) -> int:
        """Return which of the texts that are cut a piece is a part of."""
        return int(np.searchsorted(self.counted, number, side="right"))

    def piece(self, number: int) -> TokenizedText:
        """Return a piece. Raises ConfigError where the store is damaged."""
        i = self.text_of(number)
        before = int(self.counted[i - 1]) if i else 0
        start = int(self.ends[i] - self.sizes[i]) + (number - before) * self.length
        end = min(start + self.length, int(self.ends[i]))
        return TokenizedText(self.texts.part(start, end), self.texts.begins(start, end) - start)


class Samples(NamedTuple):
    """The pieces of a corpus in the order of the steps."""

    corpus: Corpus
    order: Order

    def take(self, step: int, rows: range) -> list[TextPiece]:
        """Return the pieces of some rows of a step."""
        numbers = [self.order.number(step, row) for row in rows]
        return [TextPiece(number, self.corpus.piece(number), scored) for number, scored in numbers]
