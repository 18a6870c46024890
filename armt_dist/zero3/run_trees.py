"""A recipe and its complete ds_config as plain values, for the planner. Imports no torch."""

from collections.abc import Iterable
from pathlib import Path

from ..config import assign, read_yaml
from ..schedule.planned_run import DS_CONFIG, RunTree, check_keys, section
from .ds_config import complete_ds_config, split_overrides


def read_trees(recipe: Path, ds_config: Path | None, default_ds_config: Path, overrides: Iterable[str] = ()) -> RunTree:
    """Read the run that `launch/train.py` would start with the same arguments, by the same rules.

    Raises ConfigError for a file that cannot be read, a malformed override or an unknown key.
    """
    of_recipe, of_ds_config = split_overrides(overrides)
    run = read_yaml(recipe)
    for override in of_recipe:
        assign(run, override)
    check_keys(run)
    own = section(run, DS_CONFIG, "")
    return RunTree(run, complete_ds_config(own, recipe, ds_config, default_ds_config, of_ds_config))
