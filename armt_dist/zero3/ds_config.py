"""The rules of the ds_config: which keys are honoured, and what takes the place of the others.

It owns batch, precision, optimizer, clipping, ZeRO and offload. A key that is not honoured is an error.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from ..config import ConfigError, assign, one_line

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
