"""What a run records about itself before its first step, and what may not change when it resumes."""

import json
import platform
import re
import subprocess
from pathlib import Path

from transformers import GenerationConfig

from ..config import ConfigError, one_line, read_yaml
from ..data.task import Task
from ..files import write_atomically
from ..model.configuration_armt import ARMTConfig
from ..records import RUN_CONFIG, read_json, read_json_lines, write_json
from ..versions import installed
from ..zero3.ds_config_keys import Bf16Keys, OptimizerKeys
from .run_config import RunConfig, as_yaml, resolved

PACKAGES = ("armt_dist", "torch", "deepspeed", "transformers", "accelerate", "datasets", "numpy", "peft", "wandb")
# Sections that may not change when a run resumes.
FIXED = ("model", "data", "curriculum")
# And keys of the others.
FIXED_KEYS = ("train.carry_state", "train.freeze", "ds_config.optimizer.type", "ds_config.bf16.enabled")
# But not where something is kept, in the section of any task, and how fast it is trained.
FREE_KEY = re.compile(r"data\.(.*\.)?(text|instructions)\.cache|curriculum\..*\.(lr|warmup_steps|schedule|final)")
# What a run changed when it resumed.
CHANGES = "changes.jsonl"
# Text files that the run has read.
TEXTS = "texts.json"


def describe_run(folder: Path, config: RunConfig, ds_config: dict, armt: ARMTConfig, task: Task) -> None:
    """Write the resolved configuration, versions, and model/ (configuration and tokenizer) into the run folder.

    config.yaml has the complete `ds_config` too, so that it alone describes the run.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The next start reads it, also if this one is killed now.
        write_atomically(folder / RUN_CONFIG, as_yaml(config.model_copy(update={"ds_config": ds_config})))
        write_json(folder / "ds_config.json", ds_config)
        write_json(folder / "environment.json", environment())
        write_texts(folder, task)
        armt.save_pretrained(folder / "model")
        task.tokenizer.save_pretrained(folder / "model")
        tokens = task.tokenizer
        GenerationConfig(
            bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id
        ).save_pretrained(folder / "model")
    except OSError as error:
        raise ConfigError(f"out={folder}: {error.strerror}; give --out a folder that can be written") from None


def check_same(folder: Path, config: RunConfig) -> None:
    """Raise ConfigError where a run that resumes was started with another model, data or curriculum."""
    old, new = fixed(read_yaml(folder / RUN_CONFIG)), fixed(resolved(config))
    for key in sorted(old.keys() | new.keys()):
        # A run of an earlier version lacks the keys that it did not have; they are off.
        off = key not in old and not new[key]
        if old.get(key) != new.get(key) and not off:
            raise ConfigError(
                f"{key}={one_line(new.get(key))}: the run in {folder} was started with {one_line(old.get(key))}; keep "
                "that, or give another --out"
            )


def fixed(config: dict) -> dict[str, object]:
    """Return what may not change when a run resumes, by key."""
    below = tuple(f"{key}." for key in FIXED_KEYS)
    kept = {
        k: v
        for k, v in leaves(config).items()
        if k.partition(".")[0] in FIXED or k in FIXED_KEYS or k.startswith(below)
    }
    kept.setdefault("ds_config.optimizer.type", OptimizerKeys().type)
    kept.setdefault("ds_config.bf16.enabled", Bf16Keys().enabled)
    return {key: value for key, value in kept.items() if not FREE_KEY.fullmatch(key)}


def record_changes(folder: Path, config: RunConfig, step: int, ranks: int) -> str:
    """Add a line to CHANGES if this start differs from the one before; return what differs, for people.

    To be called before `describe_run`; config: with the complete `ds_config`. The line has `step` and `ranks`, and
    under `changed` the values before and now, by key. The first start of a run has a line without changes.
    """
    path = folder / CHANGES
    try:
        lines = list(read_json_lines(path))
    except (OSError, ValueError):
        # None so far, or a damaged file.
        lines = []
    changed = {}
    if (folder / RUN_CONFIG).exists():
        old, new = leaves(read_yaml(folder / RUN_CONFIG)), leaves(resolved(config))
        differ = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        changed = {key: {"before": old.get(key), "now": new.get(key)} for key in differ}
    before = lines[-1].get("ranks") if lines else None
    if lines and not changed and before == ranks:
        return ""
    record = json.dumps({"step": step, "ranks": ranks, "changed": changed}, default=str)
    try:
        write_atomically(path, "".join(f"{json.dumps(line)}\n" for line in lines) + f"{record}\n")
    except OSError as error:
        raise ConfigError(f"out={folder}: {error.strerror}; give --out a folder that can be written") from None
    said = [f"{key} {one_line(each['before'])} -> {one_line(each['now'])}" for key, each in changed.items()]
    return ", ".join([*said, *[f"ranks {before} -> {ranks}"] * (before not in (None, ranks))])


def leaves(config: dict) -> dict[str, object]:
    """Return all values of a configuration by key."""
    return {key: value for section, child in config.items() for key, value in flat(child, section).items()}


def write_texts(folder: Path, task: Task) -> None:
    """Write name, size and hash of all text files that the run has read, by split, those of earlier starts included."""
    before = read_json(folder / TEXTS)
    found = {
        split: list({text["sha256"]: text for text in [*before.get(split, []), *(t._asdict() for t in texts)]}.values())
        for split, texts in task.texts().items()
    }
    if any(found.values()):
        write_json(folder / TEXTS, found)


def check_texts(folder: Path, task: Task) -> None:
    """Raise ConfigError where a run that resumes would validate on a text that it was trained on, or the reverse."""
    before = read_json(folder / TEXTS)
    for split, texts in task.texts().items():
        other = "validation" if split == "train" else "train"
        known = {text["sha256"] for text in before.get(other, [])}
        for text in texts:
            if text.sha256 in known:
                raise ConfigError(
                    f"data.text: {text.name} would be used for {split}, and the run in {folder} has used it for "
                    f"{other} ({TEXTS}); restore the files of that run, or give another --out"
                )


def flat(value: object, path: str) -> dict[str, object]:
    """Return the leaves of nested mappings and lists by their path."""
    if isinstance(value, dict):
        return {k: v for name, child in value.items() for k, v in flat(child, f"{path}.{name}").items()}
    if isinstance(value, list):
        return {k: v for i, child in enumerate(value) for k, v in flat(child, f"{path}.{i}").items()}
    return {path: value}


def environment() -> dict:
    """Return versions, Python and git commit, as far as they can be known."""
    facts = {**installed(PACKAGES), "platform": platform.platform()}
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        facts["commit"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        # There is no git.
        facts["commit"] = None
    return facts
