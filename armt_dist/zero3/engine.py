"""ds_config in, DeepSpeed engine out: what of it is honoured, and which limits follow from model and schedule.

The ds_config owns batch, precision, optimizer, clipping, ZeRO and offload. A key that is not honoured is an error.
"""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.cpp_extension import get_default_build_root

from ..config import ConfigError, one_line
from ..model.modeling_armt import ARMTLayer
from ..runtime.executor import ScheduledLM
from ..schedule.grid import Grid, prefetch_window

STALE_LOCK_S = 900


class Limits(NamedTuple):
    """Parameters (elements) of the largest layer, and of the whole model."""

    layer: int
    model: int


def measure(model: nn.Module) -> Limits:
    """Counts that hold for partitioned parameters too."""

    def count(module: nn.Module) -> int:
        return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())

    return Limits(max(count(m) for m in model.modules() if isinstance(m, ARMTLayer)), count(model))


def derive_limits(ds: dict, limits: Limits, grid: Grid, device: torch.device) -> dict:
    """ZeRO-3's windows and buckets from the model and the schedule, unless they are set by hand.

    DeepSpeed's defaults of 1e9, 1e9 and 5e7 elements are right for neither a tiny nor an 8B model. Raises ConfigError
    where a value set by hand would make the wavefront serial.
    """
    window = prefetch_window(grid)
    zero = ds["zero_optimization"]
    rest = limits.model - grid.layers * limits.layer
    derived = {
        "stage3_prefetch_bucket_size": window * limits.layer,
        "stage3_max_live_parameters": (window + 2) * limits.layer + max(rest, 0),
        "stage3_max_reuse_distance": 2 * limits.layer,
        # On gloo a reduction blocks the host: before the last one nothing may be reduced, or the wavefront serialises.
        "reduce_bucket_size": limits.model + 1 if device.type == "cpu" else max(2 * limits.layer, 50_000_000),
    }
    needed = {
        "stage3_prefetch_bucket_size": derived["stage3_prefetch_bucket_size"],
        "stage3_max_live_parameters": (window + 2) * limits.layer,
    }
    if device.type == "cpu":
        needed["reduce_bucket_size"] = limits.model + 1
    for name, least in needed.items():
        given = zero.get(name)
        if grid.sp > 1 and given is not None and given < least:
            raise ConfigError(
                f"ds_config zero_optimization.{name}={given}: the wavefront of sp={grid.sp} has {window} layers in "
                f"flight and would run serially; set at least {least}, or leave it out to have it derived"
            )
    return {**ds, "zero_optimization": {**derived, **zero}}


def clear_stale_locks() -> None:
    """Remove the locks that interrupted builds of DeepSpeed's operators left behind: torch would wait for ever.

    A run that is preempted while `cpu_adam` compiles, about a minute, leaves one.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in root.rglob("lock"):
        with suppress(OSError):
            if time.time() - lock.stat().st_mtime > STALE_LOCK_S:
                lock.unlink(missing_ok=True)
                print(f"removed {lock}, left over from an interrupted build", flush=True)


def start_engine(runner: ScheduledLM, ds: dict, grid: Grid, device: torch.device):
    """The DeepSpeed engine around `runner`; its ds_config is `ds` with the derived limits."""
    import deepspeed

    clear_stale_locks()
    # One unit for gathers and gradients. Without it SegmentBPTT's parameters would not be whole when it is applied.
    deepspeed.utils.set_z3_leaf_modules(runner, [ARMTLayer])
    for part in runner.loss_head.parts:
        for parameter in part.parameters():
            deepspeed.zero.register_external_parameter(runner.loss_head, parameter)
    ds = derive_limits(ds, measure(runner), grid, device)
    try:
        engine, *_ = deepspeed.initialize(
            model=runner, model_parameters=[p for p in runner.parameters() if p.requires_grad], config=ds
        )
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(f"ds_config: DeepSpeed refuses it ({one_line(error, 400)})") from error
    # Behind DeepSpeed's own hooks, so that the output is the one that its backward starts from.
    for layer in runner.modules():
        if isinstance(layer, ARMTLayer):
            layer.register_forward_hook(release_after_each_backward)
    return engine


def release_after_each_backward(layer: ARMTLayer, _: tuple, output: Tensor | tuple) -> None:
    """A forward hook: let DeepSpeed release the layer after the backward of every call.

    It counts the inputs whose gradient is still to come from 0 in every forward, so that of several calls, one a round,
    only the first backward would end with a release: the others' layers stayed gathered until the step, and as that
    many count against `stage3_max_live_parameters`, nothing was prefetched any more (DeepSpeed 0.19.8).
    A tuple is a single cell's, of the plain loop, which nobody trains.
    """
    if isinstance(output, Tensor) and output.requires_grad:
        output.register_hook(lambda _: setattr(layer, "ds_grads_remaining", 1))
