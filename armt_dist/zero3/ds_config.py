"""The rules of the ds_config: which keys are honoured, and what takes the place of the others.

It owns batch, precision, optimizer, clipping, ZeRO and offload. A key that is not honoured is an error. It comes from a
JSON file, from a recipe's `ds_config` section, which is merged over the file, and from the command line.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from ..config import ConfigError, as_number, assign, describe_errors, one_line, read_object
from ..schedule.planned_run import BatchSizes, batch_sizes
from .ds_config_keys import DEFAULT_BETAS, DEFAULT_LR, DEFAULT_WEIGHT_DECAY, HONOURED, DsConfigKeys, OptimizerKeys
from .optimizer import choose

if TYPE_CHECKING:
    import torch

# Of overrides that belong here.
PREFIX = "ds_config."
# Keys that other DeepSpeed runs use, and what takes their place.
REMEDIES = {
    "scheduler": "learning-rate schedules are part of the curriculum's stages in the YAML config",
    "fp16": "use bf16 (float16's range does not fit the memory states)",
    "activation_checkpointing": "DeepSpeed's reentrant checkpointing gives wrong gradients for a layer that is run "
    "for several segments; segment BPTT always recomputes, and only cpu_checkpointing is honoured here",
    "tensorboard": "use train.trackers in the YAML config",
    "wandb": "use train.trackers in the YAML config",
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


class Prepared(NamedTuple):
    """A checked ds_config: what DeepSpeed gets, and what we take from it ourselves."""

    ds_config: dict
    sizes: BatchSizes
    lr: float
    offload_activations: bool
    optimizer: str  # its implementation, for people


def split_overrides(overrides: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the ``key=value`` of the recipe, and those of the ds_config without their prefix."""
    overrides = list(overrides)
    own = [text for text in overrides if text.startswith(PREFIX)]
    return [text for text in overrides if text not in own], [text.removeprefix(PREFIX) for text in own]


def complete_ds_config(
    section: dict, recipe: str | Path, file: Path | None, default_file: Path, overrides: Iterable[str] = ()
) -> dict:
    """Return the ds_config of a run: `recipe`'s `section` over the file, ``a.b=value`` overrides over both.

    The file is `default_file` where none was given and the section does not stand alone (`is_whole`). Raises
    ConfigError.
    """
    section = check_section(section, recipe)
    return read_ds_config(default_file if file is None and not is_whole(section) else file, overrides, section)


def read_ds_config(path: str | Path | None, overrides: Iterable[str] = (), section: dict | None = None) -> dict:
    """Return the file `path` (None: empty), the recipe's `section` over it, and ``a.b=value`` overrides over both.

    Raises ConfigError for what is not a JSON object or not honoured. `section` was checked by `check_section`.
    """
    config = merge(read_file(path) if path is not None else {}, section or {})
    for override in overrides:
        assign(config, override)
    check_keys(config)
    check_stage(config)
    config = plain_values(config)
    check_values(config)
    return config


def read_file(path: str | Path) -> dict:
    """Read a ds_config from JSON and check its keys. Raises ConfigError naming the file."""
    config = read_object(Path(path), "ds_config", "for example ds_configs/zero3.json")
    check_keys(config, f" in {path}")
    return config


def check_section(section: dict, where: str | Path) -> dict:
    """Check a recipe's `ds_config` section as a file is checked, and return its `plain_values`.

    Raises ConfigError naming the recipe `where`.
    """
    check_keys(section, f" in {where}")
    return plain_values(section, f" in {where}")


def plain_values(config: dict, where: str = "") -> dict:
    """Return a copy with ``1e-4``, which is text in YAML, as a number. Raises ConfigError for what JSON lacks."""

    def plain(value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return {str(name): plain(child, f"{path}.{name}") for name, child in value.items()}
        if isinstance(value, list):
            return [plain(child, f"{path}.{i}") for i, child in enumerate(value)]
        value = as_number(value) if isinstance(value, str) else value
        if not isinstance(value, str | int | float | None) or (isinstance(value, float) and not math.isfinite(value)):
            raise ConfigError(f"ds_config {path}={one_line(value)}{where}: not a JSON value; give a number or text")
        return value

    try:
        return {key: plain(value, key) for key, value in config.items()}
    except RecursionError:
        raise ConfigError(f"ds_config{where}: contains itself; write its values out") from None


def is_whole(section: dict) -> bool:
    """Tell whether a recipe's section stands without a file: it names the stage of ZeRO."""
    zero = section.get("zero_optimization")
    return isinstance(zero, dict) and "stage" in zero


def merge(under: dict, over: Mapping[str, Any]) -> dict:
    """Return `under` with `over` merged over it, key by key; another optimizer type replaces the whole optimizer."""
    if isinstance(under.get("optimizer"), dict) and isinstance(over.get("optimizer"), dict):
        types = under["optimizer"].get("type"), over["optimizer"].get("type")
        if types[1] not in (None, types[0]):
            under = {**under, "optimizer": {}}
    return merge_mappings(under, over)


def merge_mappings(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict:
    """Return the entries of both, those of `over` where both have one; mappings are merged in turn."""
    merged = dict(under)
    for key, value in over.items():
        before = merged.get(key)
        merged[key] = merge_mappings(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged


def check_keys(config: dict, where: str = "") -> None:
    """Require that every key has an effect here. Raises ConfigError naming the first that has none, and `where`."""
    for key, value in config.items():
        if key not in HONOURED:
            remedy = REMEDIES.get(key, f"remove it; honoured are {', '.join(HONOURED)}")
            raise ConfigError(f"ds_config {key}={one_line(value)}{where}: not honoured; {remedy}")
        known = HONOURED[key]
        if known is None:
            continue
        if not isinstance(value, dict):
            raise ConfigError(f"ds_config {key}={one_line(value)}{where}: expected an object")
        for name in value:
            if name not in known:
                remedy = REMEDIES.get(key, f"remove it; honoured are {', '.join(sorted(known))}")
                raise ConfigError(f"ds_config {key}.{name}={one_line(value[name])}{where}: not honoured; {remedy}")
    for key, name in OBJECTS:
        if not isinstance(config.get(key, {}).get(name, {}), dict):
            raise ConfigError(f"ds_config {key}.{name}={one_line(config[key][name])}{where}: expected an object")


def check_values(config: dict) -> None:
    """Check the types and ranges of all values. Raises ConfigError naming the first that does not fit."""

    def whole(value: Any) -> Any:
        """Return 2e5, as JSON and YAML have it for a large count, as an integer."""
        if isinstance(value, dict):
            return {name: whole(child) for name, child in value.items()}
        return int(value) if isinstance(value, float) and value.is_integer() else value

    try:
        # Strict: DeepSpeed would take "yes" for a text.
        DsConfigKeys.model_validate(whole(config), strict=True)
    except ValidationError as error:
        raise ConfigError(f"ds_config {describe_errors(error.errors(), DsConfigKeys)}") from None


def check_stage(config: dict) -> None:
    """Require ZeRO's stage 3. Raises ConfigError."""
    stage = config.get("zero_optimization", {}).get("stage")
    if stage != 3 or isinstance(stage, bool):
        raise ConfigError(
            f"ds_config zero_optimization.stage={stage}: the schedules are built on ZeRO-3's gathers; set stage to 3"
        )


def check_secondary(ds: dict, world: int) -> None:
    """Check that the ranks divide evenly into groups with a copy of the parameters each. Raises ConfigError."""
    ranks = ds["zero_optimization"].get("zero_hpz_partition_size", 1)
    if ranks > 1 and world % min(ranks, world):
        raise ConfigError(
            f"ds_config zero_optimization.zero_hpz_partition_size={ranks}: {world} ranks do not divide into groups of "
            f"{ranks}; give the ranks of a node, or leave it out"
        )


def prepare(config: dict, dp: int, world: int, device: "torch.device") -> Prepared:
    """Check a ds_config and complete it as far as that is possible before there is a model."""
    check_keys(config)
    check_stage(config)
    # As JSON has it: a caller's tuples are lists there.
    ds = json.loads(json.dumps(config))
    check_values(ds)
    sizes = batch_sizes(config, dp)
    check_secondary(ds, world)
    defaults = {"lr": DEFAULT_LR, "betas": list(DEFAULT_BETAS), "weight_decay": DEFAULT_WEIGHT_DECAY}
    optimizer = ds.setdefault("optimizer", {"type": "AdamW", "params": defaults})
    # Without a type DeepSpeed makes no optimizer at all.
    optimizer.setdefault("type", OptimizerKeys().type)
    params = optimizer.setdefault("params", {})
    lr = params.setdefault("lr", DEFAULT_LR)
    chosen = choose(ds, device.type)
    optimizer["params"], ds["zero_force_ds_cpu_optimizer"] = chosen.params, chosen.forced
    # DeepSpeed counts every rank as data-parallel. Its sizes only feed its own arithmetic; ours are in `sizes`.
    ds["train_micro_batch_size_per_gpu"] = sizes.micro
    ds["gradient_accumulation_steps"] = sizes.accumulation
    ds["train_batch_size"] = sizes.micro * sizes.accumulation * world
    ds.setdefault("steps_per_print", 2**31)
    # DeepSpeed's own default, made explicit: without the key it clips all the same. 0 turns clipping off.
    ds.setdefault("gradient_clipping", 1.0)
    offload = ds.pop("activation_checkpointing", {}).get("cpu_checkpointing", False)
    return Prepared(ds, sizes, float(lr), bool(offload), chosen.name)
