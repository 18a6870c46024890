"""How well a model remembers, by the length of what it read: streamed, so that memory does not grow with the length.

Shapes: B batch rows, S segments, T tokens of a segment, D model width, n scored positions.
"""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config import ConfigError
from ..data.task import IGNORE, Batch, Difficulty, Task
from ..model.modeling_armt import ARMTForCausalLM, segment_lengths
from ..runtime.loss import hits, token_nll

# Tokens decoded at a time: a long text is never whole as a list of numbers and as a string.
DECODED = 16384
# A character has at most this many bytes, and so tokens; what is cut in two decodes to this.
CHARACTER, BROKEN = 4, "\ufffd"


class Row(NamedTuple):
    """The evaluation at one length. Means are over all scored tokens; a sample is right when all of its are."""

    length: int  # pairs or segments, as `unit` says
    unit: str
    tokens: int  # of a sample, padding included
    samples: int
    accuracy: float  # of samples
    token_accuracy: float
    loss: float  # nats a token
    perplexity: float
    bits_per_byte: float | None  # of running text only
    tokens_per_s: float
    peak_bytes: int  # device memory; on a CPU resident host memory at the ends of segments
    by_segment: tuple[float | None, ...]  # mean loss by position in the sample; None where nothing is scored


class Score(NamedTuple):
    """Sums over one batch, by row and segment."""

    nll: Tensor  # [B, S] float64
    scored: Tensor  # [B, S] int64
    right: Tensor  # [B, S] int64
    peak_bytes: int

    def plus(self, other: "Score") -> "Score":
        """Both batches' rows."""
        joined = (torch.cat(pair) for pair in zip(self[:3], other[:3], strict=True))
        return Score(*joined, max(self.peak_bytes, other.peak_bytes))


def evaluate(
    model: ARMTForCausalLM,
    task: Task,
    lengths: Sequence[int],
    samples: int,
    batch: int,
    *,
    zero_memory: bool = False,
) -> list[Row]:
    """Validation samples of each of `lengths` pairs or segments, up to `samples` of them, `batch` rows at a time.

    zero_memory: the states are emptied before every segment, which shows what memory is worth. The device is the
    model's. Raises ConfigError as `check`, and where the validation data are empty.
    """
    check_lengths(task, lengths, samples, batch)
    trained = model.training
    model.eval()
    rows = [evaluate_length(model, task, n, (samples, batch), zero_memory) for n in lengths]
    model.train(trained)
    return rows


def check_lengths(task: Task, lengths: Sequence[int], samples: int, batch: int) -> None:
    """Raises ConfigError for numbers below 1 and lengths that the task does not have."""
    if not lengths:
        raise ConfigError("lengths: none given; for example --lengths 5 10 20 50")
    for name, value in (("samples", samples), ("batch", batch), *(("lengths", n) for n in lengths)):
        if value < 1:
            raise ConfigError(f"{name}={value}: must be at least 1")
    for n in lengths:
        task.sequence_tokens(n)


def evaluate_length(model: ARMTForCausalLM, task: Task, length: int, sizes: tuple[int, int], zero_memory: bool) -> Row:
    """`evaluate` at one length; sizes: samples, and rows at a time."""
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
        # Reading the sums waits for the device.
        total = found if total is None else total.plus(found)
        seconds += time.perf_counter() - started
        read_tokens += data.input_ids.numel() if data.attention_mask is None else int(data.attention_mask.sum())
        text_bytes += scored_bytes(task.tokenizer, data.labels) if task.measure == "perplexity" else 0
    if total is None or not total.scored.any():
        raise ConfigError(f"length={length}: the validation data have no scored token; give other data")
    return summarise(total, Sample(length, task, read_tokens / seconds, text_bytes))


class Sample(NamedTuple):
    """What `summarise` must know beside the sums."""

    length: int
    task: Task
    tokens_per_s: float
    text_bytes: int


def summarise(total: Score, sample: Sample) -> Row:
    """The sums as means."""
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


@torch.inference_mode()
def score(model: ARMTForCausalLM, batch: Batch, zero_memory: bool) -> Score:
    """One batch, segment by segment: only the memory states stay. Logits exist for the scored positions alone."""
    config, device = model.config, model.device
    count, tokens = batch.input_ids.shape
    lengths = segment_lengths(tokens, config.segment_tokens, config.segment_alignment)
    parts = zip(batch.input_ids.split(lengths, dim=1), batch.labels.split(lengths, dim=1), strict=True)
    nll = torch.zeros(count, len(lengths), dtype=torch.float64, device=device)
    right = torch.zeros(count, len(lengths), dtype=torch.int64, device=device)
    states, peak = model.initial_states(count), 0
    for s, (ids, labels) in enumerate(parts):
        # No mask: padding is on the right, and nothing scored comes after it to see it.
        hidden, following = model.segment(ids.to(device), states)
        states = model.initial_states(count) if zero_memory else following
        # Picked on the host, where the labels are: the device need not be waited for.
        where = labels.flatten().ne(IGNORE).nonzero().squeeze(1)
        if len(where):
            row = (where // labels.shape[1]).to(device)
            targets = labels.flatten()[where].to(device)
            picked = hidden.flatten(0, 1)[where.to(device)]
            head = model.backbone.head
            nll[:, s].index_add_(0, row, token_nll(picked, head, targets).double())
            right[:, s].index_add_(0, row, hits(picked, head, targets).long())
        peak = max(peak, used_bytes(device))
    scored = torch.stack([part.ne(IGNORE).sum(1) for part in batch.labels.split(lengths, dim=1)], dim=1)
    return Score(nll.cpu(), scored, right.cpu(), peak)


def used_bytes(device: torch.device) -> int:
    """The most memory of a GPU since it was reset; of a CPU what is resident now."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def scored_bytes(tokenizer: PreTrainedTokenizerBase, labels: Tensor) -> int:
    """UTF-8 bytes of the text that the labels [B, N] spell; special tokens spell nothing."""
    return sum(spelled_bytes(tokenizer, row[row != IGNORE]) for row in labels)


def spelled_bytes(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> int:
    """UTF-8 bytes of the text of the tokens [n], decoded piece by piece."""
    total = first = 0
    while first < len(ids):
        for end in range(first + DECODED, first + DECODED + CHARACTER):
            text = tokenizer.decode(ids[first:end], skip_special_tokens=True)
            # Not in the middle of a character, if that can be helped.
            if not text.endswith(BROKEN):
                break
        total, first = total + len(text.encode()), end
    return total
