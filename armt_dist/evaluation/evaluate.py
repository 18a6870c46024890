"""Evaluates a model by the length of its input, segment by segment, so that memory does not grow with the length.

Shapes: B batch rows, S segments, T tokens of a segment, D model width, n scored positions.
"""

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from ..config import ConfigError
from ..data.task import IGNORE, Batch, Difficulty, Task
from ..data.tokenizers import decode
from ..model.modeling_armt import ARMTForCausalLM, segment_lengths
from ..runtime.host_copy import copied
from ..runtime.loss import hits, token_nll

# Tokens decoded at a time: a long text is never in memory as a whole list or string.
DECODED = 16384
# A character has at most this many bytes, and so tokens; a divided one decodes to BROKEN.
CHARACTER, BROKEN = 4, "\ufffd"


class Row(NamedTuple):
    """The result at one length. Means are over all scored tokens; a sample is right if all its scored tokens are."""

    length: int  # in `unit`, pairs or segments
    unit: str
    tokens: int  # of a sample, padding included
    samples: int
    accuracy: float  # of samples
    token_accuracy: float
    loss: float  # nats per token
    perplexity: float
    bits_per_byte: float | None  # None unless the measure is perplexity
    tokens_per_s: float
    peak_bytes: int  # device memory; on a CPU, resident host memory at the ends of segments
    by_segment: tuple[float | None, ...]  # mean loss of each segment; None if nothing in it is scored


class Score(NamedTuple):
    """Sums over one batch, by row and segment."""

    nll: Tensor  # [B, S] float64
    scored: Tensor  # [B, S] int64
    right: Tensor  # [B, S] int64
    peak_bytes: int

    def plus(self, other: "Score") -> "Score":
        """Return the sums of both batches' rows."""
        return Score(
            torch.cat((self.nll, other.nll)),
            torch.cat((self.scored, other.scored)),
            torch.cat((self.right, other.right)),
            max(self.peak_bytes, other.peak_bytes),
        )

    def padded(self, segments: int) -> "Score":
        """Append segments in which nothing is scored, up to `segments`."""
        nll, scored, right = (pad(sums, (0, segments - sums.shape[1])) for sums in (self.nll, self.scored, self.right))
        return Score(nll, scored, right, self.peak_bytes)


def evaluate(
    model: ARMTForCausalLM,
    task: Task,
    lengths: Sequence[int],
    samples: int,
    batch: int,
    *,
    zero_memory: bool = False,
) -> list[Row]:
    """Evaluate up to `samples` validation samples of each length, `batch` rows at a time, on the model's device.

    lengths: pairs or segments, as `task.unit` says; zero_memory: empty the states before every segment.
    Raises ConfigError as `check_lengths` does, and if no validation token is scored.
    """
    check_lengths(task, lengths, samples, batch)
    trained = model.training
    model.eval()
    rows = [evaluate_length(model, task, n, (samples, batch), zero_memory) for n in lengths]
    model.train(trained)
    return rows


def check_lengths(task: Task, lengths: Sequence[int], samples: int, batch: int) -> None:
    """Check numbers and lengths. Raises ConfigError for a number below 1 and for a length that the task cannot make."""
    if not lengths:
        raise ConfigError("lengths: none given; for example --lengths 5 10 20 50")
    for name, value in (("samples", samples), ("batch", batch), *(("lengths", n) for n in lengths)):
        if value < 1:
            raise ConfigError(f"{name}={value}: must be at least 1")
    for n in lengths:
        task.sequence_tokens(n)


def evaluate_length(model: ARMTForCausalLM, task: Task, length: int, sizes: tuple[int, int], zero_memory: bool) -> Row:
    """Evaluate one length; sizes: number of samples, and rows at a time."""
    samples, rows = sizes
    available = task.size("validation")
    samples = samples if available is None else min(samples, available)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    total, read_tokens, text_bytes, seconds = None, 0, 0, 0.0
    for step, first in enumerate(range(0, samples, rows)):
        data = task.batch("validation", step, range(min(rows, samples - first)), Difficulty.fixed(length))
        started = time.perf_counter()
        found = score(model, data, zero_memory)
        # The device is done: `score` copies the sums to the host.
        total = found if total is None else total.plus(found)
        seconds += time.perf_counter() - started
        read_tokens += data.input_ids.numel() if data.attention_mask is None else int(data.attention_mask.sum())
        text_bytes += scored_bytes(task.tokenizer, data.labels) if task.measure == "perplexity" else 0
    if total is None or not total.scored.any():
        raise ConfigError(f"length={length}: the validation data has no scored token; give other data")
    return summarise(total, Sample(length, task, read_tokens / seconds, text_bytes))


class Sample(NamedTuple):
    """What `summarise` needs besides the sums."""

    length: int
    task: Task
    tokens_per_s: float
    text_bytes: int


def summarise(total: Score, sample: Sample) -> Row:
    """Turn sums into means."""
    scored, right = total.scored.sum(1), total.right.sum(1)
    nll, count = total.nll.sum().item(), int(scored.sum())
    samples = int((scored > 0).sum())
    by_segment = [
        n / c if c else None for n, c in zip(total.nll.sum(0).tolist(), total.scored.sum(0).tolist(), strict=True)
    ]
    return Row(
        length=sample.length,
        unit=sample.task.unit,
        tokens=sample.task.sequence_tokens(sample.length),
        samples=samples,
        accuracy=int(((right == scored) & (scored > 0)).sum()) / samples,
        token_accuracy=int(right.sum()) / count,
        loss=nll / count,
        perplexity=math.exp(min(nll / count, 700)),
        bits_per_byte=nll / math.log(2) / sample.text_bytes if sample.text_bytes else None,
        tokens_per_s=sample.tokens_per_s,
        peak_bytes=total.peak_bytes,
        by_segment=tuple(by_segment),
    )


def score(model: ARMTForCausalLM, batch: Batch, zero_memory: bool) -> Score:
    """Score one batch, each row in the segments that it would have alone."""
    if batch.attention_mask is None or model.config.segment_alignment == "left":
        return score_segments(model, batch, zero_memory)
    segments = -(-batch.input_ids.shape[1] // model.config.segment_tokens)
    rows = [score_segments(model, real_row(batch, row), zero_memory) for row in range(len(batch.input_ids))]
    return reduce(Score.plus, (row.padded(segments) for row in rows))


def real_row(batch: Batch, row: int) -> Batch:
    """Return one row without its padding."""
    assert batch.attention_mask is not None, "only a padded batch has rows of different lengths"
    rows, tokens = slice(row, row + 1), int(batch.attention_mask[row].sum())
    starts = None if batch.document_starts is None else batch.document_starts[rows, :tokens]
    return Batch(batch.input_ids[rows, :tokens], batch.labels[rows, :tokens], None, batch.sample_ids[rows], starts)


@torch.inference_mode()
def score_segments(model: ARMTForCausalLM, batch: Batch, zero_memory: bool) -> Score:
    """Score a batch segment by segment, with logits at the scored positions only; only memory states are kept."""
    config, device = model.config, model.device
    count, tokens = batch.input_ids.shape
    lengths = segment_lengths(tokens, config.segment_tokens, config.segment_alignment)
    nll = torch.zeros(count, len(lengths), dtype=torch.float64, device=device)
    right = torch.zeros(count, len(lengths), dtype=torch.int64, device=device)
    states, peak = model.initial_states(count), 0
    for s, (ids, labels, borders) in enumerate(segments_of(batch, lengths, device)):
        # No mask is needed: padding is on the right, so no scored position comes after it.
        hidden, following = model.segment(ids, states, None, borders)
        states = model.initial_states(count) if zero_memory else following
        if labels.ne(IGNORE).any():
            scores = score_positions(model, hidden, labels)
            nll[:, s].index_add_(0, scores.row, scores.nll.double())
            right[:, s].index_add_(0, scores.row, scores.hit.long())
        peak = max(peak, used_bytes(device))
    scored = torch.stack([part.ne(IGNORE).sum(1) for part in batch.labels.split(lengths, dim=1)], dim=1)
    return Score(nll.cpu(), scored, right.cpu(), peak)


def segments_of(
    batch: Batch, lengths: Sequence[int], device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield tokens [B, T], labels and, where a document begins, its borders, both [B, T]; the labels on the host."""
    sizes = list(lengths)
    documents = itertools.repeat(None) if batch.document_starts is None else batch.document_starts.split(sizes, dim=1)
    for ids, labels, starts in zip(
        batch.input_ids.split(sizes, 1), batch.labels.split(sizes, 1), documents, strict=False
    ):
        yield copied(ids, device), labels, copied(starts, device) if starts is not None and starts.any() else None


class Positions(NamedTuple):
    """The n scored positions of one segment."""

    row: Tensor  # [n] int64, of the batch
    nll: Tensor  # [n] float32
    hit: Tensor  # [n] bool


def score_positions(model: ARMTForCausalLM, hidden: Tensor, labels: Tensor) -> Positions:
    """Score a segment, with logits at its scored positions only. hidden [B, T, D]; labels [B, T] on the host."""
    # As the labels are, so picking positions does not wait for the device.
    where = labels.flatten().ne(IGNORE).nonzero().squeeze(1)
    targets = copied(labels.flatten()[where], hidden.device)
    picked = hidden.flatten(0, 1)[copied(where, hidden.device)]
    head: Any = model.backbone.head
    row = copied(where // labels.shape[1], hidden.device)
    return Positions(row, token_nll(picked, head, targets), hits(picked, head, targets))


def used_bytes(device: torch.device) -> int:
    """Return the peak memory of a GPU since its reset, or the resident memory of the process on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def scored_bytes(tokenizer: PreTrainedTokenizerBase, labels: Tensor) -> int:
    """Count the UTF-8 bytes of the text in the labels [B, N], without special tokens."""
    return sum(spelled_bytes(tokenizer, row[row != IGNORE]) for row in labels)


def spelled_bytes(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> int:
    """Count the UTF-8 bytes of the text of the tokens [n], decoded piece by piece."""
    total = first = 0
    while first < len(ids):
        for end in range(first + DECODED, first + DECODED + CHARACTER):
            text = decode(tokenizer, ids[first:end], skip_special_tokens=True)
            # Avoid cutting a character in two.
            if not text.endswith(BROKEN):
                break
        total, first = total + len(text.encode()), end
    return total
