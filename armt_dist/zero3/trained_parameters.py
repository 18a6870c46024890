"""Which parameters are trained: chosen by patterns of their names, which are those of an export."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ..config import ConfigError

BASE = "base"
"""In place of a pattern: every parameter but those of the memory."""


def is_memory(name: str) -> bool:
    """Tell whether a parameter is what ARMT adds to its base: memory rows, sinks, and each layer's memory."""
    return name.startswith("memory_tokens.") or ".memory." in name


def matches(name: str, pattern: str) -> bool:
    """Tell whether a pattern, or `BASE`, covers a parameter; `*` also stands for dots."""
    return not is_memory(name) if pattern == BASE else fnmatchcase(name, pattern)


def check_patterns(names: Sequence[str], patterns: Iterable[str], field: str) -> None:
    """Require that every pattern covers a parameter. Raises ConfigError naming `field`."""
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise ConfigError(
                f"{field}={pattern}: matches no parameter; names are those of an export, such as {names[0]} and "
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
