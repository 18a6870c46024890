"""The DeepSpeed engine around a model: limits that follow from model and schedule, and the hooks of segment BPTT."""

import os
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.cpp_extension import get_default_build_root

from ..config import ConfigError, one_line
from ..model.memory_kind import ARMTLayer
from ..runtime.executor import ScheduledLM
from ..schedule.grid import Grid, prefetch_window, reduction_layers
from ..schedule.step_memory import CUDA_BUCKET_ELEMENTS
from .private import mark_gradients_ready, operators, release_after_next_backward, whole_numel

STALE_LOCK_S = 900


class Limits(NamedTuple):
    """Elements of all parameters of the largest layer, and of the whole model."""

    layer: int
    model: int


def measure(model: nn.Module) -> Limits:
    """Count the elements of a model's parameters, partitioned or not."""

    def count(module: nn.Module) -> int:
        return sum(whole_numel(parameter) for parameter in module.parameters())

    return Limits(max(count(m) for m in model.modules() if isinstance(m, ARMTLayer)), count(model))


def derive_limits(ds: dict, limits: Limits, grid: Grid, device: torch.device, window: int | None = None) -> dict:
    """Complete a ds_config with ZeRO-3's windows and buckets, derived from the model and the schedule.

    window: layers to gather ahead; None: as many as the wavefront wants. DeepSpeed's defaults of 1e9, 1e9 and 5e7
    elements suit neither a tiny nor an 8B model. Values that the user sets are kept; ConfigError for one that would
    make the wavefront serial.
    """
    window = window or prefetch_window(grid)
    zero = ds["zero_optimization"]
    rest, reduced = limits.model - grid.layers * limits.layer, reduction_layers(grid) * limits.layer
    derived = {
        "stage3_prefetch_bucket_size": window * limits.layer,
        "stage3_max_live_parameters": (window + 2) * limits.layer + max(rest, 0),
        "stage3_max_reuse_distance": 2 * limits.layer,
        # On gloo a reduction blocks the host: before the last one nothing may be reduced, or the wavefront serialises.
        "reduce_bucket_size": limits.model + 1 if device.type == "cpu" else max(reduced, CUDA_BUCKET_ELEMENTS),
    }
    needed = {
        "stage3_prefetch_bucket_size": derived["stage3_prefetch_bucket_size"],
        "stage3_max_live_parameters": (window + 2) * limits.layer,
        "reduce_bucket_size": limits.model + 1 if device.type == "cpu" else reduced,
    }
    for name, least in needed.items():
        given = zero.get(name)
        if grid.sp > 1 and given is not None and given < least:
            raise ConfigError(
                f"ds_config zero_optimization.{name}={given}: the wavefront of sp={grid.sp} has {window} layers in "
                f"flight and would run serially; set at least {least}, or leave it out, and it is derived"
            )
    return {**ds, "zero_optimization": {**derived, **zero}}


def clear_stale_locks() -> None:
    """Remove the locks that interrupted builds of DeepSpeed's operators left: torch would wait for them forever.

    A run that is preempted while `cpu_adam` compiles, which takes about a minute, leaves one. Locks of other extensions
    and of other users are not touched.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    names = operators()
    # torch puts a folder for Python and CUDA between them, unless the variable is set.
    for lock in (path for pattern in ("*/lock", "*/*/lock") for path in root.glob(pattern)):
        with suppress(OSError):
            found = lock.lstat()
            ours = lock.parent.name in names and stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid()
            if ours and time.time() - found.st_mtime > STALE_LOCK_S:
                lock.unlink(missing_ok=True)
                print(f"removed {lock}, left over from an interrupted build", flush=True)


def start_engine(
    runner: ScheduledLM,
    ds: dict,
    grid: Grid,
    device: torch.device,
    groups: list[dict] | None = None,
    window: int | None = None,
) -> Any:
    """Return the DeepSpeed engine around `runner`; its ds_config is `ds` with the derived limits.

    groups: of the optimizer, as `parameter_groups`; None: one of all that is trained. window: as `derive_limits`.
    """
    import deepspeed

    clear_stale_locks()
    # Each layer is one unit for gathers and gradients: SegmentBPTT needs all its parameters whole when it is applied.
    deepspeed.utils.set_z3_leaf_modules(runner, [ARMTLayer])
    for part in runner.loss_head.parts:
        for parameter in part.parameters():
            deepspeed.zero.register_external_parameter(runner.loss_head, parameter)
    runner.mark_gradients_ready = mark_gradients_ready
    # from_pretrained leaves a model in evaluation, where dropout is off.
    runner.train()
    ds = derive_limits(ds, measure(runner), grid, device, window)
    trained: list = [p for p in runner.parameters() if p.requires_grad] if groups is None else groups
    try:
        engine, *_ = deepspeed.initialize(model=runner, model_parameters=trained, config=ds)
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(f"ds_config: DeepSpeed refuses it ({one_line(error, 400)})") from error
    # Registered after DeepSpeed's own hooks, so that the output is the tensor at which its backward hooks begin.
    for layer in runner.modules():
        if isinstance(layer, ARMTLayer):
            layer.register_forward_hook(release_after_each_backward)
    return engine


def release_after_each_backward(layer: ARMTLayer, _: tuple, output: Tensor | tuple) -> None:
    """Make DeepSpeed release the layer after the backward pass of every call; a forward hook.

    A tuple is the output of a single cell in the plain loop, which is never trained.
    """
    if isinstance(output, Tensor) and output.requires_grad:
        output.register_hook(lambda _: release_after_next_backward(layer))
