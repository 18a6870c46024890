"""What to say when a rank runs out of memory: what it was doing, what was planned, and settings that would fit."""

import re
from collections.abc import Callable, Iterator
from itertools import chain, combinations
from typing import NamedTuple

import torch

from ..config import ConfigError, one_line
from ..schedule.hardware import HARDWARE, Hardware
from ..schedule.model_sizes import StepWork
from ..schedule.planned_run import PlannedRun, RunTree, planned_run
from ..schedule.planner import plan
from ..schedule.program import Instruction
from .run_config import RunConfig, resolved

# torch on CUDA, and on the CPU.
WANTED = re.compile(r"[Tt]ried to allocate ([\d.]+ \w+)")
# Of the device, for what the plan does not know, such as fragments.
MARGIN = 0.95
SHOWN = 3
GB = 1e9


class Remedy(NamedTuple):
    """A setting that saves memory; the ones that cost least time come first."""

    setting: Callable[[PlannedRun], str]
    work: Callable[[StepWork], StepWork]
    applies: Callable[[StepWork], bool]


REMEDIES = (
    Remedy(lambda run: "bptt.keep=0", lambda w: w._replace(keep=0), lambda w: w.keep != 0),
    Remedy(lambda run: "bptt.states=rebuild", lambda w: w._replace(states="rebuild"), lambda w: w.states == "store"),
    Remedy(
        lambda run: f"ds_config.train_micro_batch_size_per_gpu={run.work.micro_batch // 2}",
        lambda w: w._replace(micro_batch=w.micro_batch // 2, accumulation=2 * w.accumulation),
        lambda w: w.micro_batch % 2 == 0,
    ),
    Remedy(
        lambda run: "ds_config.activation_checkpointing.cpu_checkpointing=true",
        lambda w: w._replace(offload_activations=True),
        lambda w: not w.offload_activations,
    ),
    Remedy(
        lambda run: "ds_config.zero_optimization.offload_optimizer.device=cpu",
        lambda w: w._replace(offload_optimizer=True),
        lambda w: not w.offload_optimizer,
    ),
)


class Need(NamedTuple):
    """Bytes of the device when an allocation failed."""

    used: float
    capacity: float


def describe(
    error: Exception, config: RunConfig, ds_config: dict, world: int, at: Instruction | None, need: Need, device: str
) -> str:
    """Return one line about an allocation that failed on a rank of `world` in instruction `at`; device: cuda or cpu."""
    wanted = WANTED.search(str(error))
    doing = f" in {at} (layer {at.layer})" if at else ""
    more = f"{wanted[1]} more were wanted" if wanted else "no more could be had"
    line = f"out of memory{doing}: {more}, beside {need.used / GB:.3g} GB in use of {need.capacity / GB:.3g} GB"
    try:
        run = planned_run(RunTree(resolved(config), ds_config), world)
        hardware = HARDWARE["cpu" if device == "cpu" else "h100"]._replace(memory_bytes=need.capacity)
        planned = gb(run, run.work, hardware)
        found = list(fitting(run, hardware, need, planned))
    except ConfigError as mistake:
        # Tasks of extensions are not planned.
        return f"{line}; this run cannot be planned ({one_line(mistake, 200)}), try bptt.states=rebuild or more ranks"
    said = "; ".join(f"{setting} ({size:.3g} GB)" for setting, size in found[:SHOWN])
    remedy = f"by the plan these would fit: {said}" if found else "by the plan no setting would fit; use more ranks"
    return f"{line}; planned were {planned:.3g} GB; {remedy}"


def gb(run: PlannedRun, work: StepWork, hardware: Hardware) -> float:
    """Return the planned GB of a rank."""
    return sum(plan(run.model, work, run.layout, hardware).gpu_bytes.values()) / GB


def fitting(run: PlannedRun, hardware: Hardware, need: Need, planned: float) -> Iterator[tuple[str, float]]:
    """Yield settings, single ones first, with the GB that the plan has for them, if they would fit.

    Where more is in use than was planned, so much more is counted for each setting too.
    """
    beyond = max(1.0, need.used / GB / planned)
    useful = [remedy for remedy in REMEDIES if remedy.applies(run.work)]
    for remedies in chain(*(combinations(useful, count) for count in range(1, len(useful) + 1))):
        work = run.work
        for remedy in remedies:
            work = remedy.work(work)
        if run.layout.chunks > work.micro_batch:
            continue
        size = gb(run, work, hardware)
        if size < planned and size * beyond <= MARGIN * need.capacity / GB:
            yield " ".join(remedy.setting(run) for remedy in remedies), size


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an allocation failed, on a device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # Pinned host memory, on a machine with GPUs; any host memory.
    return any(words in str(error) for words in ("CUDA error: out of memory", "can't allocate memory"))
