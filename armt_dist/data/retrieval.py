"""Associative retrieval: key-value pairs one per segment, then the question (ARMT, arXiv 2407.04841).

Two pairs, key and value of one symbol (`:` sep, `?` gen, `|` eos, `.` not scored); segments of 4 tokens:

    input   a : 3 |  7 : c |  a ? 3 |
    label   . . . .  . . . .  . 3 | .

Labels are shifted already: the model must predict 3 at `?`, and eos at 3.

Shapes: b rows, n pairs, k symbols in a key, v in a value, T = k + v + 2 tokens in a segment, N = (n + 1) T.
"""

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .lengths import Measure, Unit, pair_lengths
from .sampling import Split, row_words
from .sections import ALPHABET, RetrievalConfig
from .task import IGNORE, Batch, Difficulty, Run, Stateless
from .tokenizers import character_tokenizer, decode

SEP, GEN, EOS, PAD = ":?|_"


class Retrieval(Stateless):
    """The tasks `rewrite` (keys repeat, the latest value counts) and `remember` (keys are unique in a sample).

    Tokens: symbols 0..symbols-1, then sep, gen, eos, pad.
    """

    measure: Measure = "accuracy"
    unit: Unit = "pairs"

    def __init__(
        self, config: RetrievalConfig, tokenizer: PreTrainedTokenizerBase, run: Run, unique_keys: bool
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.seed = run.seed
        self.unique_keys = unique_keys
        self.vocab_size = len(tokenizer)
        self.lengths = pair_lengths(config, unique_keys, run.segment_tokens)
        self.segment_tokens = self.lengths.segment_tokens

    def sequence_tokens(self, n: int) -> int:
        """Return the tokens N of a sample of `n` pairs. Raises ConfigError if there are too few different keys."""
        return self.lengths.sequence_tokens(n)

    def batch(self, split: Split, step: int, rows: range, difficulty: Difficulty) -> Batch:
        """Return `rows` of the global batch of `step`."""
        n = difficulty.draw(self.seed, split, step)
        tokens = self.sequence_tokens(n)
        # The first symbols of a shorter key are 0, so that segments have the same length in every stage.
        key_count = self.lengths.key_count(n, difficulty.key_length, difficulty.symbols)
        value_count = self.config.symbols**self.config.value_length
        words = row_words(self.seed, split, step, rows, 3 * n + 1)
        keys = distinct(words[:, : 2 * n], key_count) if self.unique_keys else words[:, :n] % key_count
        values = words[:, 2 * n : 3 * n] % value_count
        asked = ask(keys, words[:, 3 * n])[:, None]
        keys, values = (np.concatenate([x, np.take_along_axis(x, asked, axis=1)], axis=1) for x in (keys, values))
        input_ids = torch.from_numpy(self.lay_out(keys, values, difficulty.symbols).reshape(len(rows), tokens))
        labels = torch.full_like(input_ids, IGNORE)
        scored = self.config.value_length + 1
        labels[:, -scored - 1 : -1] = input_ids[:, -scored:]
        needed = torch.from_numpy(asked[:, 0] * self.segment_tokens + self.segment_tokens - 1)
        return Batch(input_ids, labels, None, list(rows), needed=needed)

    def lay_out(self, keys: np.ndarray, values: np.ndarray, symbols: int | None) -> np.ndarray:
        """Spell key and value numbers [b, n+1] as tokens int64 [b, n+1, T]; the digits of keys have base `symbols`."""
        k, v = self.config.key_length, self.config.value_length
        sep, gen, eos = (self.config.symbols + i for i in range(3))
        segments = np.empty((*keys.shape, self.segment_tokens), dtype=np.int64)
        segments[..., :k] = digits(keys, symbols or self.config.symbols, k)
        segments[..., k] = sep
        segments[:, -1, k] = gen
        segments[..., k + 1 : -1] = digits(values, self.config.symbols, v)
        segments[..., -1] = eos
        return segments

    def key_blind(self, batch: Batch) -> float:
        """Return the expected accuracy of answering with the value of a random key of the sample."""
        segments = batch.input_ids.numpy().reshape(len(batch.input_ids), -1, self.segment_tokens)
        k = self.config.key_length
        keys, values = (number(part, self.config.symbols) for part in (segments[..., :k], segments[..., k + 1 : -1]))
        # Only the latest pair of a key counts.
        order, latest = grouped(keys[:, :-1])
        right = (np.take_along_axis(values[:, :-1], order, axis=1) == values[:, -1:]) & latest
        return float((right.sum(axis=1) / latest.sum(axis=1)).mean())

    def show(self, batch: Batch, row: int = 0) -> str:
        """Return one sample as text, its segments separated by spaces."""
        segments = batch.input_ids[row].reshape(-1, self.segment_tokens)
        return " ".join(decode(self.tokenizer, segment) for segment in segments)


def retrieval_tokenizer(config: RetrievalConfig) -> PreTrainedTokenizerFast:
    """Build a tokenizer of characters: the symbols `0`..`9`, `a`.., then `:` sep, `?` gen, `|` eos, `_` pad.

    For the prompt ``3:a| 3?`` the model answers ``a|``.
    """
    return character_tokenizer(ALPHABET[: config.symbols] + SEP + GEN + EOS + PAD, {"eos_token": EOS, "pad_token": PAD})


def digits(numbers: np.ndarray, base: int, length: int) -> np.ndarray:
    """Split numbers [...] into digits [..., length], most significant first."""
    powers = np.array([base**i for i in reversed(range(length))], dtype=np.uint64)
    return numbers[..., None] // powers % np.uint64(base)


def number(digits: np.ndarray, base: int) -> np.ndarray:
    """Invert `digits`: int64 [..., length] -> [...]."""
    return digits @ np.array([base**i for i in reversed(range(digits.shape[-1]))], dtype=np.int64)


def distinct(words: np.ndarray, count: int) -> np.ndarray:
    """Draw n different numbers below `count` for each row from random words [b, 2n]: uint64 [b, n], random order.

    Floyd's sampling without replacement (Bentley and Floyd, CACM 30(9), 1987), then a shuffle.
    """
    n = words.shape[1] // 2
    # Draw i is a number up to lasts[i], which takes its place if the number was drawn before.
    lasts = np.arange(count - n, count, dtype=np.uint64)
    drawn = words[:, :n] % (lasts + np.uint64(1))
    chosen = np.where(taken(drawn, count - n), lasts, drawn)
    return np.take_along_axis(chosen, np.argsort(words[:, n:], axis=1), axis=1)


def taken(drawn: np.ndarray, first: int) -> np.ndarray:
    """Tell for draws [b, n] whether the number was chosen by an earlier draw: bool [b, n].

    first: number that stands in for draw 0. It was chosen if it was drawn before, or if it stands in for an earlier
    draw that was taken itself: the chain of those is followed in steps that double.
    """
    order, latest = grouped(drawn)
    found = np.empty(drawn.shape, dtype=bool)
    # In its group of equal numbers, all draws but the first one.
    repeated = np.concatenate([np.zeros((len(drawn), 1), dtype=bool), ~latest[:, :-1]], axis=1)
    np.put_along_axis(found, order, repeated, axis=1)
    own = np.broadcast_to(np.arange(drawn.shape[1]), drawn.shape)
    source = np.where(drawn >= first, drawn.astype(np.int64) - first, own)
    while True:
        found |= np.take_along_axis(found, source, axis=1)
        further = np.take_along_axis(source, source, axis=1)
        if (further == source).all():
            return found
        source = further


def grouped(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the order [b, n] in which equal keys of a row [b, n] follow one another, the latest one last.

    And which places of that order hold the latest of its key: bool [b, n].
    """
    order = np.argsort(keys, axis=1, kind="stable")
    ordered = np.take_along_axis(keys, order, axis=1)
    latest = np.ones(keys.shape, dtype=bool)
    latest[:, :-1] = ordered[:, 1:] != ordered[:, :-1]
    return order, latest


def ask(keys: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Choose the pair to ask about with one random word [b] per row of keys [b, n]; return its index [b].

    It is the latest pair of its key, and the key is uniform over the row's different keys.
    """
    order, latest = grouped(keys)
    wanted = words % latest.sum(axis=1).astype(np.uint64) + np.uint64(1)
    position = (latest.cumsum(axis=1) == wanted[:, None].astype(np.int64)).argmax(axis=1)
    return np.take_along_axis(order, position[:, None], axis=1)[:, 0]
