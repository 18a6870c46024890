"""Stands for the package wandb: appends every call to the file $STAND_IN_CALLS as a line of JSON.

$STAND_IN_FAILS names modes in which `init` fails: online, offline.
"""

import json
import os


class Error(Exception):
    """Of wandb."""


class Settings:
    """Keeps what it is given."""

    def __init__(self, **values):
        self.values = values


def record(call, **values):
    """Append a call."""
    with open(os.environ["STAND_IN_CALLS"], "a") as file:
        file.write(json.dumps({"call": call, **values}) + "\n")


def setup(settings):
    """Called before `init`."""
    record("setup", **settings.values)


def teardown():
    """Called after an `init` that failed."""
    record("teardown")


def init(config, settings):
    """Start a run."""
    mode = settings.values.get("mode", "online")
    record("init", config=config, settings=settings.values, pid=os.getpid())
    if mode in os.environ.get("STAND_IN_FAILS", ""):
        raise Error(f"cannot start\n{mode}")
    return Run(mode == "offline")


class Run:
    """A run."""

    url, dir = "https://wandb.test/run", "folder/of/wandb"

    def __init__(self, offline):
        self.offline = offline

    def define_metric(self, name, step_metric=None):
        """Choose what a metric is drawn over."""
        record("define_metric", name=name, step_metric=step_metric)

    def log(self, values):
        """Log values."""
        record("log", values=values)

    def finish(self, exit_code):
        """End."""
        record("finish", exit_code=exit_code)
