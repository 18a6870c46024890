"""What a run writes down about itself before its first step, and what may not change when it goes on."""

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import yaml
from transformers import GenerationConfig

from ..config import ConfigError, one_line, read_yaml
from ..data.task import Task
from ..model.configuration_armt import ARMTConfig
from .run_config import RunConfig

PACKAGES = ("armt_dist", "torch", "deepspeed", "transformers", "accelerate", "datasets", "numpy")
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
