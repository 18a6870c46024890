"""Whether a memory carries what was read: the loss with a text's own memory, with another text's, and with none.

A memory helps in two ways: it adapts the model to text that is cut into segments, for which any memory will do, and it
carries content of this text. What tells them apart is the memory of another text at the same position. In each segment
the state that enters is exchanged for it, and all else stays: the tokens, and the window, which is the text's own.

Shapes: B batch rows, S segments, T tokens of a segment, n samples, G groups of segments.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import ConfigError
from ..data.task import IGNORE, Batch, Difficulty, Task
from ..data.text.task import Text
from ..model.modeling_armt import ARMTForCausalLM
from ..model.segment_rows import segment_lengths
from ..model.sliding_window import Window
from .evaluate import score_positions, segments_of, spelled_bytes

OWN, OTHER, NONE, FULL = "own", "other", "none", "full"
# Of Student's distribution, two-sided 95 %, from one degree of freedom on; beyond, the normal distribution's.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
NORMAL = 2.0


class Estimate(NamedTuple):
    """A number and its standard error over texts."""

    value: float
    error: float
    texts: int  # that the error is over

    @property
    def is_clear(self) -> bool:
        """Whether it differs from zero at 95 %."""
        freedom = self.texts - 1
        return abs(self.value) > self.error * (STUDENT[freedom - 1] if freedom <= len(STUDENT) else NORMAL)


class Position(NamedTuple):
    """The result in some consecutive segments, counted from 1. By name: own, other, none and, where measured, full."""

    first: int
    last: int
    bits_per_byte: dict[str, float]
    bits_per_token: dict[str, float]
    worse: dict[str, Estimate]  # than with its own memory, in bits per byte, paired by text


class Control(NamedTuple):
    """What `control` found."""

    segments: int
    samples: int
    texts: int
    same_text: int  # samples whose other memory is that of another part of the same text
    positions: list[Position]
    after: Position  # the segments that a memory enters: all but the first
    share: (
        float | None
    )  # (other - own) / (other - full) in these, up to where full attention was measured and is better


class Sums(NamedTuple):
    """Sums over the scored tokens of each sample."""

    nll: dict[str, Tensor]  # [n, S] float64, nats; FULL: [n, segments within its limit]
    scored: Tensor  # [n, S] int64
    sizes: Tensor  # [n, G] int64, bytes of UTF-8
    texts: list[int]  # [n]

    def joined(self, more: "Sums") -> "Sums":
        """Return the sums of both batches' samples."""
        nll = {name: torch.cat((part, more.nll[name])) for name, part in self.nll.items()}
        scored, sizes = torch.cat((self.scored, more.scored)), torch.cat((self.sizes, more.sizes))
        return Sums(nll, scored, sizes, self.texts + more.texts)


def control(
    model: ARMTForCausalLM, task: Task, length: int, samples: int, batch: int, *, full_tokens: int | None = None
) -> Control:
    """Measure up to `samples` validation texts of `length` segments, about `batch` rows at a time, in constant memory.

    Samples are taken evenly from all validation texts; shorter ones are left out. full_tokens: how many tokens the base
    also reads in one pass, with full attention; None: it does not. Raises ConfigError as `check_control`, and where
    fewer than two samples are long enough.
    """
    text = check_control(model, task, length, full_tokens)
    trained = model.training
    model.eval()
    groups = grouped(length)
    total, same = None, 0
    for data in batches(text, length, samples, batch):
        texts = [text.text_of(number) for number in data.sample_ids]
        partners = partners_of(texts)
        nll = score_batch(model, data, partners)
        if full_tokens is not None:
            nll[FULL] = score_full(model, data, full_tokens)
        found = Sums(nll, scored_in(model, data), sizes_of(text, data, groups), texts)
        total = found if total is None else total.joined(found)
        same += sum(texts[i] == texts[j] for i, j in enumerate(partners.tolist()))
    model.train(trained)
    assert total is not None, "batches yields at least one"
    return summarise(total, groups, same)


def check_control(model: ARMTForCausalLM, task: Task, length: int, full_tokens: int | None) -> Text:
    """Return the task. Raises ConfigError where there is nothing to exchange or to compare."""
    if not isinstance(task, Text):
        raise ConfigError("control: compares how well text is predicted; give --task text")
    if not any(memory_fields(state) for state in model.initial_states(1)):
        raise ConfigError(
            f"control: memory_kind={model.config.memory_kind} carries a window and no memory, so nothing can be "
            "exchanged; evaluate it with and without --zero-memory"
        )
    if length < 2:
        raise ConfigError(f"control length={length}: no memory enters the first segment; give --lengths 2 or more")
    if full_tokens is None:
        return task
    most = getattr(model.config.base, "max_position_embeddings", None) or math.inf
    if not 2 * model.config.segment_tokens <= full_tokens <= most:
        raise ConfigError(
            f"full-attention={full_tokens}: must be from {2 * model.config.segment_tokens}, two segments, to {most}, "
            "which the base can read at once"
        )
    if task.config.pack:
        raise ConfigError("full-attention: the base would read joined texts as one; set data.text.pack=false")
    return task


def memory_fields(state: Any) -> list[str]:
    """Return the fields of a state that are not its window."""
    return [name for name in state._fields if name not in Window._fields]


def with_memory(states: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """Return `states` with the memory of `others`; windows stay."""
    return [
        state._replace(**{name: getattr(other, name) for name in memory_fields(state)})
        for state, other in zip(states, others, strict=True)
    ]


def batches(task: Text, length: int, samples: int, batch: int) -> Iterator[Batch]:
    """Yield samples of `length` segments without padding, at least two at a time. Raises ConfigError for fewer."""
    available = task.size("validation") or 0
    count = min(samples, available)
    numbers = [i * available // count for i in range(count)]
    whole = [number for number in numbers if sample(task, number, length).attention_mask is None]
    if len(whole) < 2:
        raise ConfigError(
            f"control: {len(whole)} of {count} samples has {length} segments, and another text's memory takes two; "
            "give more or longer validation texts, more --samples or shorter --lengths"
        )
    turns = min(-(-len(whole) // batch), len(whole) // 2)
    # Neighbours, which may be parts of one text, are in different batches.
    for turn in range(turns):
        rows = [sample(task, number, length) for number in whole[turn::turns]]
        starts = None
        if any(row.document_starts is not None for row in rows):
            found = [row.document_starts for row in rows]
            starts = torch.cat(
                [torch.zeros_like(rows[0].input_ids, dtype=torch.bool) if s is None else s for s in found]
            )
        ids, labels = (torch.cat(parts) for parts in zip(*((row.input_ids, row.labels) for row in rows), strict=True))
        yield Batch(ids, labels, None, [number for row in rows for number in row.sample_ids], starts)


def sample(task: Text, number: int, length: int) -> Batch:
    """Return one validation sample, of at most `length` segments, as a batch."""
    step, row = divmod(number, task.global_batch)
    return task.batch("validation", step, range(row, row + 1), Difficulty.fixed(length))


def partners_of(texts: Sequence[int]) -> Tensor:
    """Return for each row the row whose memory it gets, int64 [B]: a rotation that pairs parts of one text least."""
    count = len(texts)

    def same(shift: int) -> int:
        """Count the rows that would get the memory of their own text."""
        return sum(texts[i] == texts[(i + shift) % count] for i in range(count))

    return (torch.arange(count) + min(range(1, count), key=same)) % count


@torch.inference_mode()
def score_batch(model: ARMTForCausalLM, batch: Batch, partners: Tensor) -> dict[str, Tensor]:
    """Return the loss in nats by sample and segment, [B, S] float64, with each memory. Only memory states are kept."""
    count, device = len(batch.input_ids), model.device
    lengths, partners = lengths_of(model, batch), partners.to(device)
    nll = {name: torch.zeros(count, len(lengths), dtype=torch.float64, device=device) for name in (OTHER, NONE, OWN)}
    states, empty = model.initial_states(count), model.initial_states(count)
    for s, (ids, labels, borders) in enumerate(segments_of(batch, lengths, device)):
        others = [type(state)(*(tensor[partners] for tensor in state)) for state in states]
        entering = {OTHER: with_memory(states, others), NONE: with_memory(states, empty), OWN: states}
        for name, state in entering.items():
            # The last one is its own, with which the text goes on.
            hidden, states = model.segment(ids, state, None, borders)
            add_scores(model, hidden, labels, nll[name][:, s])
    return {name: nll[name].cpu() for name in (OWN, OTHER, NONE)}


@torch.inference_mode()
def score_full(model: ARMTForCausalLM, batch: Batch, most: int) -> Tensor:
    """Return the base's loss in nats by sample and segment, as far as `most` tokens go, read in one pass. [B, s]."""
    lengths = lengths_of(model, batch)
    lengths = lengths[: most // model.config.segment_tokens]
    nll = torch.zeros(len(batch.input_ids), len(lengths), dtype=torch.float64, device=model.device)
    with plain_base(model) as base:
        # One at a time: attention scores of long texts take room.
        for row, sums in enumerate(nll):
            ids = batch.input_ids[row : row + 1, : sum(lengths)].to(model.device)
            hidden = base(input_ids=ids, use_cache=False).last_hidden_state
            labels = batch.labels[row : row + 1, : sum(lengths)]
            for s, (part, own) in enumerate(zip(hidden.split(lengths, 1), labels.split(lengths, 1), strict=True)):
                add_scores(model, part, own, sums[s : s + 1])
    return nll.cpu()


@contextmanager
def plain_base(model: ARMTForCausalLM) -> Iterator[Any]:
    """Give the base's own decoder, without memory, within the block."""
    layers: Any = model.backbone.layers
    wrapped = list(layers)
    for i, layer in enumerate(wrapped):
        layers[i] = layer.layer
    try:
        yield model.base.base_model
    finally:
        for i, layer in enumerate(wrapped):
            layers[i] = layer


def add_scores(model: ARMTForCausalLM, hidden: Tensor, labels: Tensor, sums: Tensor) -> None:
    """Add a segment's losses to the `sums` [B] of its rows; hidden [B, T, D], labels [B, T] on the host."""
    if labels.ne(IGNORE).any():
        scores = score_positions(model, hidden, labels)
        sums.index_add_(0, scores.row, scores.nll.double())


def lengths_of(model: ARMTForCausalLM, batch: Batch) -> list[int]:
    """Return the tokens of each segment, which are all the same, as samples are whole."""
    return segment_lengths(batch.input_ids.shape[1], model.config.segment_tokens, model.config.segment_alignment)


def scored_in(model: ARMTForCausalLM, batch: Batch) -> Tensor:
    """Count the scored tokens. int64 [B, S]."""
    parts = batch.labels.split(lengths_of(model, batch), dim=1)
    return torch.stack([part.ne(IGNORE).sum(1) for part in parts], dim=1)


def sizes_of(task: Text, batch: Batch, groups: Sequence[range]) -> Tensor:
    """Count the bytes of the scored text. int64 [B, G]."""
    T = task.segment_tokens
    parts = [[labels[group.start * T : group.stop * T] for group in groups] for labels in batch.labels]
    return torch.tensor([[spelled_bytes(task.tokenizer, part[part != IGNORE]) for part in row] for row in parts])


def grouped(segments: int) -> list[range]:
    """Group segments, counted from 0: the first, the second, two more, four more, and so on."""
    ends = [min(2**power, segments) for power in range((segments - 1).bit_length() + 1)]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def summarise(total: Sums, groups: Sequence[range], same: int) -> Control:
    """Turn sums into bits and their errors."""
    positions = [position(total, [i], groups) for i in range(len(groups))]
    share = None
    if FULL in total.nll:
        reached = slice(1, total.nll[FULL].shape[1])
        own, other, full = (total.nll[name][:, reached].sum().item() for name in (OWN, OTHER, FULL))
        share = (other - own) / (other - full) if other > full else None
    after = position(total, range(1, len(groups)), groups)
    samples, texts = len(total.texts), len(set(total.texts))
    return Control(groups[-1].stop, samples, texts, same, positions, after, share)


def position(total: Sums, chosen: Sequence[int], groups: Sequence[range]) -> Position:
    """Summarise the `chosen`, consecutive groups of segments."""
    first, last = groups[chosen[0]].start, groups[chosen[-1]].stop
    measured = {name: part[:, first:last].sum(1) for name, part in total.nll.items() if part.shape[1] >= last}
    bits = {name: part.sum().item() / math.log(2) for name, part in measured.items()}
    size = total.sizes[:, list(chosen)].sum(1)
    tokens = int(total.scored[:, first:last].sum())
    return Position(
        first + 1,
        last,
        {name: value / int(size.sum()) for name, value in bits.items()},
        {name: value / tokens for name, value in bits.items()},
        {
            name: estimate((part - measured[OWN]) / math.log(2), size, total.texts)
            for name, part in measured.items()
            if name != OWN
        },
    )


def estimate(sums: Tensor, size: Tensor, texts: Sequence[int]) -> Estimate:
    """Return the ratio of two sums over samples [n] with its standard error over texts.

    Parts of a text are not independent and count as one; if there is one text only, each part counts.
    """
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    groups = [number[text] for text in texts] if len(number) > 1 else list(range(len(texts)))
    count = max(groups) + 1
    value = (sums.sum() / size.sum()).item()
    left = torch.zeros(count, dtype=torch.float64).index_add_(0, torch.tensor(groups), sums - value * size)
    error = math.sqrt(count / (count - 1) * left.square().sum().item()) / int(size.sum())
    return Estimate(value, error, count)
