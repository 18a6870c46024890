"""What a user's own module may add to a run: tasks, transforms of batches, and metrics.

The module registers them when it is imported, which `load_extensions` does for those that `extensions` names:

    from armt_dist.data.extensions import metric, register_task, transform

Shapes: b rows of a micro-batch, N tokens of a sequence, G rows of a global batch.
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import entry_points
from typing import Any, NamedTuple, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..config import ConfigError, Section, one_line
from .sampling import Split
from .sections import SCHEMAS
from .task import Batch, Run, Task
from .tasks import KINDS, Kind

# Entry points of installed packages, by the names that `extensions` may give instead of a module.
GROUP = "armt_dist.extensions"


class Rows(NamedTuple):
    """What a metric is computed from: the rows of one or several global batches, on every rank the same."""

    scored: np.ndarray  # float64 [G] scored tokens of each row; 0 in a row that is not counted
    wrong: np.ndarray  # float64 [G] those that were not the most likely ones


Transform = Callable[[Batch, Split, int], Batch]
Metric = Callable[[Rows], float]
F = TypeVar("F", bound=Callable)
TRANSFORMS: dict[str, Transform] = {}
METRICS: dict[str, Metric] = {}
# What a run measures by itself.
TAKEN = ("loss", "accuracy", "token_accuracy")


def register_task(
    name: str,
    section: type[Section],
    tokenizer: Callable[[Any], PreTrainedTokenizerBase],
    build: Callable[[Any, PreTrainedTokenizerBase, Run], Task],
) -> None:
    """Add a task, whose `section` is filled from data.options. Raises ConfigError for a name that is in use.

    tokenizer, build: make the tokenizer and the task; each gets the filled section first.
    """
    check_free(name, KINDS)
    SCHEMAS[name] = section
    KINDS[name] = Kind(tokenizer, build)


def transform(name: str) -> Callable[[F], F]:
    """Register `function(batch, split, step) -> batch`, which changes every micro-batch of a run.

    It must depend on its arguments alone, so that ranks and resumed runs agree, and keep the shapes [b, N].
    """
    return registering(name, TRANSFORMS)


def metric(name: str) -> Callable[[F], F]:
    """Register `function(rows) -> float`, a metric of training steps and validations, which `train.best` may name."""
    if name in TAKEN:
        raise ConfigError(f"metric {name}: every run measures it; choose another name")
    return registering(name, METRICS)


def registering(name: str, table: dict[str, Any]) -> Callable[[F], F]:
    """Return a decorator that puts a function into `table`. Raises ConfigError for a name that is in use."""
    check_free(name, table)

    def register(function: F) -> F:
        table[name] = function
        return function

    return register


def check_free(name: str, table: dict[str, Any]) -> None:
    """Raise ConfigError if a name is in use."""
    if name in table:
        raise ConfigError(f"extension {name}: the name is in use; choose another")


def load_extensions(names: Iterable[str]) -> None:
    """Import the modules, or the entry points of these names. Raises ConfigError naming one that cannot be imported.

    The working directory counts as well, as in `python -m`.
    """
    names = list(names)
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    installed = {point.name: point for point in entry_points(group=GROUP)} if names else {}
    for name in names:
        try:
            installed[name].load() if name in installed else importlib.import_module(name)
        except ConfigError:
            raise
        # Whatever the user's module raises.
        except Exception as error:
            known = f"; installed ones are {', '.join(installed)}" if installed else ""
            raise ConfigError(
                f"extensions={name}: cannot be imported ({type(error).__name__}: {one_line(error, 300)}); it must be "
                f"on PYTHONPATH or in the working directory{known}"
            ) from None


def transformed(batch: Batch, split: Split, step: int) -> Batch:
    """Apply all registered transforms in their order. Raises ConfigError if one fails or changes a shape."""
    for name, function in TRANSFORMS.items():
        shape = batch.input_ids.shape
        batch = guarded(f"transform {name}", partial(function, batch, split, step))
        if not batch.input_ids.shape == batch.labels.shape == shape:
            raise ConfigError(f"transform {name}: changed the shape {list(shape)} of a batch; keep it")
    return batch


def measured(rows: Rows) -> dict[str, float]:
    """Compute all registered metrics. Raises ConfigError if one fails."""
    return {name: float(guarded(f"metric {name}", partial(function, rows))) for name, function in METRICS.items()}


def guarded(what: str, call: Callable[[], Any]) -> Any:
    """Call a user's function. Raises ConfigError in place of what it raises: all ranks then end in one line."""
    try:
        return call()
    except Exception as error:
        raise ConfigError(
            f"{what}: raised {type(error).__name__} ({one_line(error, 300)}); mend the extension"
        ) from error
