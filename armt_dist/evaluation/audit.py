"""What a memory does with the length of its input: which layer's state drifts, and whether that does harm.

A state that serves at the lengths of training can fail far beyond them: writes that are almost closed, but alike in
every segment, fill the same directions without end. The mean of A over samples then grows while the deviation from it
stays, and what a query finds is that mean. Whether it does harm is tried: one layer at a time gets the state of the
last segments alone.

Shapes: B batch rows, S segments, T tokens of a segment, N positions of its row, h memory heads, f features a head, d
        channels a head; see `model.memory`.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import accumulate, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import ConfigError
from ..data.task import IGNORE, Batch, Difficulty, Task
from ..model.memory import EPS, AssociativeMemory, State, faded
from ..model.modeling_armt import ARMTForCausalLM
from ..model.segment_rows import segment_lengths
from .credit import credit
from .evaluate import Positions, score_positions, segments_of

# Upper ends of the gate sizes that writes are counted by.
GATES = (0.02, 0.1, 0.3, 0.6, 1.0)
# The state of the last S / RECENT segments takes the place of a layer's own.
RECENT = 4


class LayerAudit(NamedTuple):
    """One layer's state."""

    mean: list[float]  # by segment: norm of the mean of A over samples
    deviation: list[float]  # by segment: root mean square over samples of the norm of what is left
    gates: list[float]  # share of writes up to each of GATES
    signal: float | None  # norm of what the question reads of the last needed write, mean over samples; None: unknown
    residual: float | None  # of everything else
    with_recent: float  # the task's measure with this layer's state of the last `Audit.recent` segments alone
    credit: list[float]  # by lag in segments, from 1: norm of the last loss's gradient to the state, mean over rows


class Age(NamedTuple):
    """Samples by the segments between the last needed fact and the question."""

    most: int  # and more than the one before
    samples: int
    accuracy: float


class Audit(NamedTuple):
    """What `audit` found."""

    measure: str  # accuracy of samples, or loss: nats per token of the last segment
    segments: int
    samples: int
    recent: int
    value: float  # of the measure, with the states as they are
    layers: list[LayerAudit]
    ages: list[Age]  # empty where it is not known what is needed


class Question(NamedTuple):
    """The end of a batch, which is scored again with other states."""

    segments: list[tuple[Tensor, Tensor, Tensor | None]]  # from the first scored one on, as `segments_of`
    kept: Tensor  # [B] bool, rows that count


def audit(model: ARMTForCausalLM, task: Task, length: int, samples: int) -> Audit:
    """Audit a model on `samples` validation samples of `length` pairs or segments, all at a time.

    Raises ConfigError for a memory without associations and for samples of fewer than 8 segments.
    """
    memories = [layer.memory for layer in model.layers]
    if not all(isinstance(memory, AssociativeMemory) for memory in memories):
        raise ConfigError(f"audit: memory_kind={model.config.memory_kind} has no associations; audit an ARMT")
    available = task.size("validation")
    rows = samples if available is None else min(samples, available)
    batch = task.batch("validation", 0, range(rows), Difficulty.fixed(length))
    lengths = segment_lengths(batch.input_ids.shape[1], model.config.segment_tokens, model.config.segment_alignment)
    count = len(lengths)
    border = first_scored(batch, lengths) if task.measure == "accuracy" else count - 1
    recent = max(1, count // RECENT)
    if border < 2 * RECENT:
        raise ConfigError(f"audit length={length}: too short to tell; give --lengths with at least {3 * RECENT}")
    needed = needed_segments(batch, lengths)
    with torch.inference_mode():
        seen = watch(model, batch, lengths, border, needed)
        states, short = seen.states, read(model, batch, lengths, range(border - recent, border))
        kept = torch.ones(rows, dtype=torch.bool) if needed is None else needed >= border - recent
        question = Question(list(islice(segments_of(batch, lengths, model.device), border, None)), kept)
        mixed = [[*states[:i], short[i], *states[i + 1 :]] for i in range(len(memories))]
        value, *with_recent = (score(model, question, each, task.measure) for each in (states, *mixed))
        right = answered(model, question, states)
        reads: Sequence[tuple[float | None, float | None]] = [(None, None)] * len(memories)
        if seen.signals:
            reads = found_at(model, question, states, seen.signals)
    parts = zip(seen.norms, seen.gates, reads, with_recent, credit(model, batch, lengths), strict=True)
    layers = [LayerAudit(*norms, gates, *read, recent_value, lags) for norms, gates, read, recent_value, lags in parts]
    ages = [] if needed is None else by_age(right, border - needed)
    return Audit(
        "accuracy" if task.measure == "accuracy" else "loss", count, int(kept.sum()), recent, value, layers, ages
    )


def needed_segments(batch: Batch, lengths: Sequence[int]) -> Tensor | None:
    """Return the segment of each row's last needed fact, int64 [B] on the host; None where one is not known."""
    if batch.needed is None or (batch.needed < 0).any():
        return None
    return torch.bucketize(batch.needed, torch.tensor(list(accumulate(lengths))), right=True)


def first_scored(batch: Batch, lengths: Sequence[int]) -> int:
    """Return the first segment in which a row has a scored token."""
    for s, labels in enumerate(batch.labels.split(list(lengths), dim=1)):
        if labels.ne(IGNORE).any():
            return s
    raise ConfigError("audit: the samples have no scored token; give other data")


class Seen(NamedTuple):
    """What `watch` saw, by layer."""

    states: list[tuple]  # after the last segment
    norms: list[tuple[list[float], list[float]]]  # mean and deviation by segment
    gates: list[list[float]]
    signals: list[State]  # what is left of the last needed write; empty where it is not known


def watch(model: ARMTForCausalLM, batch: Batch, lengths: Sequence[int], count: int, needed: Tensor | None) -> Seen:
    """Read the first `count` segments from empty states; needed [B]: the segment of each row's last needed fact."""
    memories: list[Any] = [layer.memory for layer in model.layers]
    rows, device = len(batch.input_ids), model.device
    states = model.initial_states(rows)
    norms: list[tuple[list[float], list[float]]] = [([], []) for _ in memories]
    signals = [State(*associations(state)) for state in states[: len(memories)]]
    counted = [torch.zeros(len(GATES), device=device) for _ in memories]
    with ExitStack() as hooks:
        for memory, counts in zip(memories, counted, strict=True):
            hooks.enter_context(watching(memory.W_mb, partial(count_gates, counts)))
        for s, (ids, _, borders) in enumerate(islice(segments_of(batch, lengths, device), count)):
            _, following = model.segment(ids, states, None, borders)
            for i, memory in enumerate(memories):
                decay, after = memory.decay(associations(states[i])), associations(following[i])
                if needed is not None:
                    before = faded(associations(states[i]), decay)
                    signals[i] = latest(signals[i], before, after, (needed == s).to(device), decay)
                mean = after.A.mean(0)
                norms[i][0].append(mean.norm().item())
                norms[i][1].append((after.A - mean).square().flatten(1).sum(1).mean().sqrt().item())
            states = following
    gates = [(counts / counts.sum().clamp_min(1)).tolist() for counts in counted]
    return Seen(states, norms, gates, signals if needed is not None else [])


def associations(state: Any) -> State:
    """Return A and z of any state that has them."""
    return State(state.A, state.z)


def latest(signal: State, before: State, after: State, now: Tensor, decay: Tensor | None) -> State:
    """Return what is left of the needed write after a segment; now [B]: whether it is this segment's."""
    old = faded(signal, decay)
    A = torch.where(now.view(-1, 1, 1, 1), after.A - before.A, old.A)
    return State(A, torch.where(now.view(-1, 1, 1), after.z - before.z, old.z))


def count_gates(counts: Tensor, strengths: Tensor) -> None:
    """Add the gates of a segment's writes to `counts` [len(GATES)]; strengths: what W_mb gives."""
    ends = torch.tensor(GATES[:-1], device=counts.device)
    places = torch.bucketize(torch.sigmoid(strengths.float()).flatten(), ends)
    counts += torch.bincount(places, minlength=len(GATES))


@contextmanager
def watching(module: nn.Module, see: Any) -> Iterator[None]:
    """Call `see(output)` whenever the module is called within the block."""
    handle = module.register_forward_hook(lambda _module, _inputs, output: see(output))
    try:
        yield
    finally:
        handle.remove()


def read(model: ARMTForCausalLM, batch: Batch, lengths: Sequence[int], segments: range) -> list[tuple]:
    """Return the states after some consecutive segments that are read from empty states."""
    states = model.initial_states(len(batch.input_ids))
    for ids, _, borders in islice(segments_of(batch, lengths, model.device), segments.start, segments.stop):
        _, states = model.segment(ids, states, None, borders)
    return states


def answer(model: ARMTForCausalLM, question: Question, states: list[tuple]) -> Positions:
    """Read the question from `states`, and return the scores of its tokens, on the host."""
    found = []
    for ids, labels, borders in question.segments:
        hidden, states = model.segment(ids, states, None, borders)
        found.append(score_positions(model, hidden, labels))
    return Positions(*(torch.cat(parts).cpu() for parts in zip(*found, strict=True)))


def answered(model: ARMTForCausalLM, question: Question, states: list[tuple]) -> Tensor:
    """Return whether each row's scored tokens are all right. bool [B]."""
    scores = answer(model, question, states)
    return torch.ones(len(question.kept)).scatter_reduce(0, scores.row, scores.hit.float(), "amin") > 0


def score(model: ARMTForCausalLM, question: Question, states: list[tuple], measure: str) -> float:
    """Return the accuracy of the rows that count, or their loss in nats per token; NaN if there are none."""
    if not question.kept.any():
        return math.nan
    if measure == "accuracy":
        return answered(model, question, states)[question.kept].float().mean().item()
    scores = answer(model, question, states)
    return scores.nll[question.kept[scores.row]].mean().item()


def found_at(
    model: ARMTForCausalLM, question: Question, states: list[tuple], signals: Sequence[State]
) -> list[tuple[float, float]]:
    """Return by layer the norms of what the question reads of the needed write, and of everything else.

    Of all positions up to the first scored one, each row counts where it reads most of the needed write.
    """
    memories: list[Any] = [layer.memory for layer in model.layers]
    projected: list[Tensor] = []
    with ExitStack() as hooks:
        for memory in memories:
            hooks.enter_context(watching(memory.W_mq, projected.append))
        ids, labels, borders = question.segments[0]
        model.segment(ids, states, None, borders)
    scored = labels.ne(IGNORE).int().argmax(1).to(model.device)
    found = []
    for memory, x, state, signal in zip(memories, projected, states, signals, strict=False):
        q, decay = memory.features(x), memory.decay(associations(state))
        whole, own = faded(associations(state), decay), faded(signal, decay)
        scale = (q @ whole.z.unsqueeze(-1) + EPS) if memory.options.use_denom else torch.ones_like(q[..., :1])
        # [B, N]
        signal_norms, rest_norms = (
            (q @ A / scale).transpose(1, 2).flatten(2).norm(dim=2) for A in (own.A, whole.A - own.A)
        )
        tokens = torch.arange(x.shape[1], device=x.device) - model.config.head_rows
        asked = (tokens >= 0) & (tokens <= scored[:, None])
        place = signal_norms.masked_fill(~asked, -1).argmax(1, keepdim=True)
        found.append((signal_norms.gather(1, place).mean().item(), rest_norms.gather(1, place).mean().item()))
    return found


def by_age(right: Tensor, ages: Tensor) -> list[Age]:
    """Return the accuracy by age: 1, 2, up to 4, up to 8, ... segments. right bool [B], ages int64 [B]."""
    found, low = [], 0
    for power in range(int(ages.max()).bit_length() + 1):
        own = (ages > low) & (ages <= 2**power)
        if own.any():
            found.append(Age(2**power, int(own.sum()), right[own].float().mean().item()))
        low = 2**power
    return found
