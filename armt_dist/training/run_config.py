"""The run configuration, and the run folder in which it is written down."""

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field
from transformers import GenerationConfig

from ..config import ConfigError, Section, one_line, read_yaml
from ..data.task import Task
from ..data.tasks import DataConfig
from ..model.configuration_armt import ARMTConfig
from ..monitoring.bad_steps import Rollback
from ..monitoring.watchdog import WatchdogConfig
from ..runtime.executor import ParallelConfig
from ..runtime.segment_bptt import BPTTConfig
from ..zero3.partitioned_model import ModelConfig
from .curriculum import Stage

Positive = Annotated[int, Field(ge=1)]
PACKAGES = ("armt_dist", "torch", "deepspeed", "transformers", "accelerate", "datasets", "numpy")


class TrainConfig(Section):
    """The loop around the steps."""

    seed: Annotated[int, Field(ge=0)] = 0
    max_steps: Positive | None = None
    """Stop after so many steps in all, wherever the curriculum is."""
    log_every: Positive = 10
    """Steps between two lines in a log file; metrics.jsonl has every step."""
    save_every: Positive = 500
    keep_last: Positive = 2
    keep_every: Positive | None = None
    """Keep the checkpoints of every so many steps for good, besides the newest and the best."""
    save_in_background: bool = False
    """Go on while a checkpoint's files are written, from a copy of the rank's state in host memory."""
    validate_every: Positive = 200
    validation_steps: Positive = 4
    """Global batches of one validation; fewer where the validation data end before."""
    patience: Positive | None = None
    """End a stage after so many validations without a new best."""
    best: str | None = None
    """Validation metric that decides which checkpoint is best; left out: accuracy where there is one, else loss."""
    max_skipped: Positive = 5
    """End the run, exit code 1, after so many steps in a row whose loss or gradients were not finite."""
    rollback: Rollback | None = None
    """Answer a jump of the loss with the last checkpoint and other samples; left out: go on."""


class RunConfig(Section):
    """Everything but the ds_config, which owns batch, precision, optimizer, clipping, ZeRO and offload."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    bptt: BPTTConfig = BPTTConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    curriculum: Annotated[list[Stage], Field(min_length=1)]
    watchdog: WatchdogConfig = WatchdogConfig()
    profile: bool = False
    """Write a timeline of all ranks, as a picture and a Chrome trace, after the third step."""
    deterministic: bool = False
    """Only kernels that give the same bits in every run; slower."""
    digests: bool = False
    """Write a digest of every memory state of every step, for `python -m armt_dist.digest RUN_A RUN_B`; slow."""


# What may not change when a run goes on.
FIXED = ("model", "data", "curriculum")


def describe_run(folder: Path, config: RunConfig, ds_config: dict, armt: ARMTConfig, task: Task) -> None:
    """Write the resolved configuration, versions, and model/ (configuration and tokenizer) into the run folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(resolved(config), sort_keys=False))
        (folder / "ds_config.json").write_text(json.dumps(ds_config, indent=2) + "\n")
        (folder / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
        armt.save_pretrained(folder / "model")
        task.tokenizer.save_pretrained(folder / "model")
        tokens = task.tokenizer
        GenerationConfig(
            bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id
        ).save_pretrained(folder / "model")
    except OSError as error:
        raise ConfigError(f"out={folder}: {error.strerror}; give --out a folder that can be written") from None


def resolved(config: RunConfig) -> dict:
    """The configuration with its defaults, as plain values."""
    return config.model_dump(mode="json")


def check_same(folder: Path, config: RunConfig) -> None:
    """Raise ConfigError where a run that goes on was started with another model, data or curriculum."""
    before, now = read_yaml(folder / "config.yaml"), resolved(config)
    for section in FIXED:
        old, new = flat(before.get(section), section), flat(now[section], section)
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                raise ConfigError(
                    f"{key}={one_line(new.get(key))}: the run in {folder} was started with "
                    f"{one_line(old.get(key))}; keep that, or give another --out"
                )


def flat(value: object, path: str) -> dict[str, object]:
    """Leaves of nested mappings and lists by their path."""
    if isinstance(value, dict):
        return {k: v for name, child in value.items() for k, v in flat(child, f"{path}.{name}").items()}
    if isinstance(value, list):
        return {k: v for i, child in enumerate(value) for k, v in flat(child, f"{path}.{i}").items()}
    return {path: value}


def environment() -> dict:
    """Versions, Python and git commit, as far as they can be known."""
    facts = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except ModuleNotFoundError:
            facts[package] = None
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    facts["commit"] = git.stdout.strip() or None
    return facts
