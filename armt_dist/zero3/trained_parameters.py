"""Which parameters are trained, and how fast: chosen by patterns of their names, which are those of an export."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from ..config import ConfigError
from ..model.memory_kind import is_memory
from .private import whole_dimensions
from .sections import OptimizerGroup

BASE = "base"
"""In place of a pattern: every parameter but those of the memory and of adapters."""


def matches(name: str, pattern: str) -> bool:
    """Tell whether a pattern, or `BASE`, covers a parameter; `*` also stands for dots."""
    return not is_memory(name) and ".lora_" not in name if pattern == BASE else fnmatchcase(name, pattern)


def check_patterns(names: Sequence[str], patterns: Iterable[str], field: str, what: str = "parameter") -> None:
    """Require that every pattern covers one of `names`. Raises ConfigError naming `field`; what: what they are."""
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise ConfigError(
                f"{field}={pattern}: matches no {what}; names are those of an export, such as {names[0]} and "
                f"{names[-1]}, and * stands for anything"
            )


def frozen_names(names: Sequence[str], freeze: str | Sequence[str] | None) -> set[str]:
    """Return which of a model's parameters are frozen; freeze: `TrainConfig.freeze`. Raises ConfigError."""
    patterns = [freeze] if isinstance(freeze, str) else freeze or []
    check_patterns(names, patterns, "train.freeze")
    return {name for name in names if any(matches(name, pattern) for pattern in patterns)}


def freeze_parameters(model: nn.Module, freeze: str | Sequence[str] | None) -> None:
    """Exclude parameters from training, beside those that are excluded already; before there is an engine.

    Raises ConfigError for a pattern that matches nothing, and where nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for name in frozen_names(list(parameters), freeze):
        parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError(f"train.freeze={freeze}: nothing is left to train; freeze less (or model.freeze_mem=false)")


def parameter_groups(model: nn.Module, chosen: Sequence[OptimizerGroup], optimizer: dict) -> list[dict[str, Any]]:
    """Return the trained parameters as groups of the optimizer, of which none is empty.

    chosen: `TrainConfig.optimizer_groups`; optimizer: its parameters in the ds_config. A group holds beside torch's
    keys `lr_scale`, and `metric`, the name of its rate. Raises ConfigError where one of `chosen` gets no parameter.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    check_groups(list(trained), chosen)
    default, groups = OptimizerGroup(match=["*"]), dict[tuple, dict]()
    for name, parameter in trained.items():
        number = group_of(name, chosen)
        own = default if number is None else chosen[number]
        decay = own.weight_decay
        if decay is None and (optimizer.get("weight_decay") == 0 or not decays(name, parameter)):
            decay = 0.0
        scale = own.lr_scale or (own.lr / optimizer["lr"] if own.lr is not None else 1.0)
        new: dict[str, Any] = {"params": [], "lr_scale": scale, "metric": rate_name(number)}
        group = groups.setdefault((number, decay), new if decay is None else {**new, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def check_groups(names: Sequence[str], chosen: Sequence[OptimizerGroup]) -> None:
    """Require that every pattern covers a trained parameter, and every group gets one. Raises ConfigError."""
    used = {group_of(name, chosen) for name in names}
    for number, group in enumerate(chosen):
        field = f"train.optimizer_groups.{number}.match"
        check_patterns(names, group.match, field, "trained parameter")
        if number not in used:
            raise ConfigError(f"{field}={group.match}: groups before it have all of these parameters; put it first")


def group_of(name: str, chosen: Sequence[OptimizerGroup]) -> int | None:
    """Return the number of the first group that covers a parameter, None where none does."""
    return next((i for i, group in enumerate(chosen) if any(matches(name, each) for each in group.match)), None)


def decays(name: str, parameter: Tensor) -> bool:
    """Tell whether weight decay does a parameter good: not a norm, bias or other vector, nor the memory rows."""
    return whole_dimensions(parameter) > 1 and not name.startswith("memory_tokens.")


def rate_name(number: int | None) -> str:
    """Return the metric of the learning rate of a chosen group; None: of the parameters in none."""
    return "lr" if number is None else f"lr_group_{number}"


def set_rates(groups: Iterable[dict], rate: float) -> dict[str, float]:
    """Give each group of an optimizer its part of the step's rate; return the rates by the names of their metrics."""
    rates = {"lr": rate}
    for group in groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
        rates[group.get("metric", "lr")] = group["lr"]
    return rates
