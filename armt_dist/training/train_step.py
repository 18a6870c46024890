"""One optimizer step, and one validation: global batches through the engine, and what came of them."""

import time
from collections.abc import Sequence
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.retrieval import Retrieval
from ..data.task import Batch
from ..distributed.collectives import together
from ..monitoring.bad_steps import BadRows, find_bad_rows, spiked, weigh
from ..monitoring.step_metrics import StepMetrics
from ..runtime.executor import run_backward
from ..runtime.host_copy import copied
from ..runtime.piece import Totals
from ..zero3.trained_parameters import set_rates
from .carried_states import Carrying
from .curriculum import Stage, learning_rate
from .free_memory import FreeMemory
from .global_batch import Batches, MicroBatch, MicroResult, Sums, add_up
from .progress import Progress
from .run_config import LossConfig, TrainConfig


class StepParts(NamedTuple):
    """What steps are made with; the same throughout a run."""

    config: TrainConfig
    batches: Batches
    engine: Any  # DeepSpeed's
    metrics: StepMetrics
    peak_lr: float
    carrying: Carrying | None  # of states from step to step
    free: FreeMemory | None  # sets how many cells keep their graphs; None: that is fixed

    @property
    def counts(self) -> bool:
        """Whether the task has an accuracy."""
        return self.batches.task.measure == "accuracy"


class StepResult(NamedTuple):
    """The outcome of one step."""

    progress: Progress  # after the step
    metrics: dict[str, float]
    bad_rows: BadRows | None  # of a skipped step
    spiked: bool  # whether the loss calls for a rollback
    stop: bool  # whether any rank was told to stop
    carried: Tensor | None  # what the next step starts from; see `Carrying.entering`


def train_step(
    parts: StepParts, stage: Stage, progress: Progress, told_to_stop: bool, carried: Tensor | None
) -> StepResult:
    """Make one optimizer step, or skip it on all ranks. Collective.

    progress: before the step; told_to_stop: whether this rank received a stop signal; carried: `StepResult.carried` of
    the step before, None where all rows start from empty states.
    """
    started = time.perf_counter()
    rate = learning_rate(stage, progress.stage_step, parts.peak_lr)
    rates = set_rates(parts.engine.optimizer.param_groups, rate)
    # What one rank cannot read ends all of them with its reason, before they wait for each other.
    micro_batches = together(lambda: parts.batches.micro_batches("train", progress.batch, stage.difficulty))
    if parts.free:
        parts.free.before_step(max(part.batch.input_ids.shape[1] for part in micro_batches))
    carrying = parts.carrying
    first = carrying.entering(carried, progress.batch, stage) if carrying else None
    results = run_micro_batches(parts, micro_batches, progress.step + 1, first)
    sums = parts.batches.sum_up(results, told_to_stop)
    if parts.free:
        parts.free.after_step()
    seconds = time.perf_counter() - started
    tokens = parts.batches.sizes.global_batch * micro_batches[0].batch.input_ids.shape[1]
    means, rollback = sums.metrics(), parts.config.rollback
    window = stage.until.over if stage.until else 1
    after = progress.after_step(means["accuracy"], tokens, seconds, window)
    loss_spiked = spiked(means["loss"], after.losses, rollback)
    bad_rows = carried = None
    if parts.engine.was_step_applied():
        after = after.after_loss(means["loss"], rollback.over if rollback else 0)
        # After a step that is skipped, what made its numbers bad may be in its states.
        carried = carrying.leaving([part.totals for part in results]) if carrying else None
    else:
        after = after.after_skip()
        bad_rows = find_bad_rows([(part.rows, part.batch.sample_ids, part.totals.nll) for part in results])
    norm = parts.engine.get_global_grad_norm()
    metrics = {
        # Hits are counted in validation only, unless the task has an accuracy.
        **(means if parts.counts else {name: value for name, value in means.items() if name in ("loss", "divergence")}),
        "stage": after.stage,
        **rates,
        "grad_norm": float(norm) if norm is not None else 0.0,
        "tokens": after.tokens,
        "tokens_per_s": tokens / seconds,
        "step_s": seconds,
        "skipped": after.skipped,
        **guessing(parts.batches, micro_batches[0].batch),
        **parts.metrics.measure(results[-1].grid),
    }
    return StepResult(after, metrics, bad_rows, loss_spiked, sums.stop, carried)


def run_micro_batches(
    parts: StepParts, micro_batches: Sequence[MicroBatch], step: int, first: list[list[tuple]] | None
) -> list[MicroResult]:
    """Run forward and backward of the micro-batches of `step`; after the last one the engine updates. Collective.

    first: the states that enter each micro-batch; None: empty ones.
    """
    factor = loss_factor(parts.batches, micro_batches)
    log_step = step % parts.config.log_every == 0
    results = []
    for (rows, batch), states in zip(micro_batches, first or repeat(None), strict=False):
        piece = parts.batches.piece(batch)
        observe = parts.metrics.observer(step, rows.start, piece, smallest_read=log_step)
        keep_last = parts.carrying is not None
        windows = parts.batches.windows(batch, piece)
        totals = parts.engine(
            piece, count=parts.counts, observe=observe, first=states, keep_last=keep_last, windows=windows
        )
        run_backward(parts.engine, weigh(objective(totals, parts.batches.loss), factor))
        parts.engine.step()
        results.append(MicroResult(rows, batch, totals, piece.grid))
    return results


def objective(totals: Totals, loss: LossConfig) -> Tensor:
    """Return what a rank's micro-batch is trained on, summed over its scored positions: scalar float32."""
    if loss.distill is None or totals.divergence is None:
        return totals.nll
    return torch.lerp(totals.nll, totals.divergence, loss.distill.weight)


def loss_factor(batches: Batches, micro_batches: Sequence[MicroBatch]) -> torch.Tensor:
    """Return the factor that makes the engine's loss the mean over all scored tokens of the global batch. Collective.

    DeepSpeed takes the mean over ranks and accumulation steps, however the tokens are spread.
    """
    own = sum(int(batch.labels.ge(0).sum()) for _, batch in micro_batches)
    scored = copied(torch.tensor(own, dtype=torch.float32), batches.device)
    dist.all_reduce(scored)
    # Every rank of an sp group has counted the labels of their common rows. A batch in which nothing is scored, such as
    # texts of one segment without the loss of the first, gives zeros.
    mesh, scored = batches.mesh, scored.clamp_min(1)
    return mesh.dp * mesh.sp * batches.sizes.accumulation * mesh.sp / scored


def guessing(batches: Batches, batch: Batch) -> dict[str, float]:
    """Return the pairs of a retrieval batch and the accuracy of guessing without the key; empty for other tasks."""
    if not isinstance(batches.task, Retrieval):
        return {}
    pairs = batch.input_ids.shape[1] // batches.task.segment_tokens - 1
    return {"pairs": pairs, "key_blind": batches.task.key_blind(batch)}


@torch.no_grad()
def validate(parts: StepParts, stage: Stage) -> dict[str, float]:
    """Return means over validation batches at the stage's full length; empty without validation data. Collective."""
    batches = parts.batches
    steps, size = parts.config.validation_steps, batches.task.size("validation")
    if size is not None:
        steps = min(steps, -(-size // batches.sizes.global_batch))
    difficulty = stage.difficulty._replace(minimum=stage.length)
    parts.engine.eval()
    found: list[Sums] = []
    for step in range(steps):
        results = []
        for rows, batch in together(partial(batches.micro_batches, "validation", step, difficulty)):
            piece = batches.piece(batch)
            results.append(MicroResult(rows, batch, parts.engine(piece, count=True), piece.grid))
        found.append(batches.sum_up(results, told_to_stop=False))
    parts.engine.train()
    if not found:
        return {}
    means = add_up(found).metrics()
    # The accuracy of whole rows of text means nothing.
    return means if parts.counts else {name: value for name, value in means.items() if name != "accuracy"}
