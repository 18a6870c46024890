"""ds_config in, DeepSpeed engine out: what of it is honoured, and which limits follow from model and schedule.

The ds_config owns batch, precision, optimizer, clipping, ZeRO and offload. A key that is not honoured is an error.
"""

import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.cpp_extension import get_default_build_root

from ..config import ConfigError, assign, one_line
from ..model.modeling_armt import ARMTLayer
from ..runtime.executor import ScheduledLM
from ..schedule.program import Grid, prefetch_window

ANY = object()
# Key -> its honoured sub-keys, or ANY.
HONOURED = {
    "train_batch_size": ANY,
    "train_micro_batch_size_per_gpu": ANY,
    "gradient_accumulation_steps": ANY,
    "optimizer": {"type", "params"},
    "gradient_clipping": ANY,
    "bf16": {"enabled"},
    "communication_data_type": ANY,
    "data_types": {"grad_accum_dtype"},
    "zero_optimization": {
        "stage",
        "contiguous_gradients",
        "overlap_comm",
        "reduce_scatter",
        "reduce_bucket_size",
        "sub_group_size",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold",
        "offload_param",
        "offload_optimizer",
        "zero_hpz_partition_size",
        "round_robin_gradients",
    },
    "activation_checkpointing": {"cpu_checkpointing"},
    "zero_allow_untested_optimizer": ANY,
    "zero_force_ds_cpu_optimizer": ANY,
    "steps_per_print": ANY,
    "wall_clock_breakdown": ANY,
    "memory_breakdown": ANY,
    "comms_logger": ANY,
    "aio": ANY,
}
# Keys that people do have, and what takes their place.
REMEDIES = {
    "scheduler": "learning-rate schedules are part of the curriculum's stages in the YAML config",
    "fp16": "use bf16 (float16's range does not fit the memory states)",
    "activation_checkpointing": "DeepSpeed's reentrant checkpointing gives wrong gradients for a layer that is run "
    "for several segments; segment BPTT always recomputes, and only cpu_checkpointing is honoured here",
    "tensorboard": "TensorBoard is always written to the run folder",
    "curriculum_learning": "use the curriculum section of the YAML config",
    "data_efficiency": "use the curriculum section of the YAML config",
    "gradient_checkpointing": "segment BPTT always recomputes; remove it",
}
# What must be an object where it is given.
OBJECTS = (
    ("optimizer", "params"),
    ("zero_optimization", "offload_optimizer"),
    ("zero_optimization", "offload_param"),
)
STALE_LOCK_S = 900
DEFAULT_OPTIMIZER = {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.999], "weight_decay": 1e-3}}


class BatchSizes(NamedTuple):
    """Sequences: of one optimizer step, of one rank's micro-batch; and micro-batches a step."""

    global_batch: int
    micro: int
    accumulation: int


class Prepared(NamedTuple):
    """A checked ds_config: what DeepSpeed gets, and what we take from it ourselves."""

    ds_config: dict
    sizes: BatchSizes
    lr: float
    offload_activations: bool


def read_ds_config(path: str | Path, overrides: Iterable[str] = ()) -> dict:
    """The file, with ``a.b=value`` overrides. Raises ConfigError for what is not a JSON object or not honoured."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"ds_config={path}: {error.strerror}; for example ds_configs/zero3.json") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"ds_config={path}: not valid JSON ({one_line(error)})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"ds_config={path}: expected a JSON object, got {type(config).__name__}")
    for override in overrides:
        assign(config, override)
    check_keys(config)
    return config


def check_keys(config: dict) -> None:
    """Every key must be one that has an effect here. Raises ConfigError naming the first that has none."""
    for key, value in config.items():
        if key not in HONOURED:
            remedy = REMEDIES.get(key, f"remove it; honoured are {', '.join(HONOURED)}")
            raise ConfigError(f"ds_config {key}={one_line(value)}: not honoured; {remedy}")
        if HONOURED[key] is ANY:
            continue
        if not isinstance(value, dict):
            raise ConfigError(f"ds_config {key}={one_line(value)}: expected an object")
        for name in value:
            if name not in HONOURED[key]:
                remedy = REMEDIES.get(key, f"remove it; honoured are {', '.join(sorted(HONOURED[key]))}")
                raise ConfigError(f"ds_config {key}.{name}={one_line(value[name])}: not honoured; {remedy}")
    for key, name in OBJECTS:
        if not isinstance(config.get(key, {}).get(name, {}), dict):
            raise ConfigError(f"ds_config {key}.{name}={one_line(config[key][name])}: expected an object")
    stage = config.get("zero_optimization", {}).get("stage")
    if stage != 3 or isinstance(stage, bool):
        raise ConfigError(
            f"ds_config zero_optimization.stage={stage}: the schedules are built on ZeRO-3's gathers; set stage to 3"
        )


def batch_sizes(config: dict, dp: int) -> BatchSizes:
    """DeepSpeed's rule, train_batch_size = micro x accumulation x dp, with the missing one filled in.

    Raises ConfigError for sizes that are not positive integers or do not fit the world.
    """
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    values = [config.get(name) for name in names]
    for name, value in zip(names, values, strict=True):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(f"ds_config {name}={one_line(value)}: expected a positive integer")
    total, micro, accumulation = values
    if total is None and micro is None:
        raise ConfigError("ds_config train_batch_size: missing; set it, or train_micro_batch_size_per_gpu")
    if accumulation is None:
        accumulation = 1 if total is None or micro is None else max(1, total // (micro * dp))
    if micro is None:
        micro = max(1, total // (accumulation * dp))
    if total is None:
        total = micro * accumulation * dp
    if total != micro * accumulation * dp:
        raise ConfigError(
            f"ds_config train_batch_size={total} is not {micro} (micro-batch) x {accumulation} (accumulation) x {dp} "
            f"(data-parallel ranks); try train_batch_size={micro * accumulation * dp} or another world size"
        )
    return BatchSizes(total, micro, accumulation)


def prepare(config: dict, dp: int, world: int, device: torch.device) -> Prepared:
    """Check a ds_config and complete it as far as that is possible before there is a model."""
    check_keys(config)
    sizes = batch_sizes(config, dp)
    ds = json.loads(json.dumps(config))
    optimizer = ds.setdefault("optimizer", json.loads(json.dumps(DEFAULT_OPTIMIZER)))
    params = optimizer.setdefault("params", {})
    lr = params.setdefault("lr", DEFAULT_OPTIMIZER["params"]["lr"])
    if not isinstance(lr, int | float) or isinstance(lr, bool) or lr <= 0:
        raise ConfigError(f"ds_config optimizer.params.lr={one_line(lr)}: expected a positive number")
    offloaded = ds["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
    if device.type == "cpu" and not offloaded and optimizer.get("type") in ("Adam", "AdamW"):
        # DeepSpeed's fused CPU Adam is compiled at first use, for about a minute; torch's is there.
        params.setdefault("torch_adam", True)
    # DeepSpeed counts every rank as data-parallel. Its sizes only feed its own arithmetic; ours are in `sizes`.
    ds["train_micro_batch_size_per_gpu"] = sizes.micro
    ds["gradient_accumulation_steps"] = sizes.accumulation
    ds["train_batch_size"] = sizes.micro * sizes.accumulation * world
    ds.setdefault("steps_per_print", 2**31)
    # DeepSpeed's own default, said aloud: without the key it clips all the same. 0 turns clipping off.
    ds.setdefault("gradient_clipping", 1.0)
    offload = ds.pop("activation_checkpointing", {}).get("cpu_checkpointing", False)
    return Prepared(ds, sizes, float(lr), bool(offload))


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
