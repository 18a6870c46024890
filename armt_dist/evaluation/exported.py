"""Loads an exported model, and the task that it was trained on, from its folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import files
from ..checkpoint.export import TASK_FILE, on_meta
from ..config import ConfigError, Section, assign, one_line, validate
from ..data.sections import BUILDERS, SCHEMAS, DataConfig, field_of
from ..data.task import Task
from ..model.configuration_armt import ARMTConfig
from ..model.fields import ARMTFields
from ..model.modeling_armt import ARMTForCausalLM

# Default lengths; those that the task cannot make are left out.
LENGTHS = {"pairs": (5, 10, 20, 50), "segments": (1, 2, 4, 8, 16, 32, 64)}


# Of the model for a self-check, at most.
WIDTH = 2**14


class EvaluationData(Section):
    """The section that ``data.key=value`` overrides change."""

    data: DataConfig = DataConfig()


def load_model(folder: Path, device: str | None = None) -> ARMTForCausalLM:
    """Load the exported model in `folder` with this version's code. Raises ConfigError if it is missing or damaged."""
    where = choose_device(device)
    if not (folder / "config.json").is_file():
        hint = "export it with launch/consolidate.py" if (folder / "checkpoints").is_dir() else "give an exported model"
        raise ConfigError(f"model={folder}: no config.json in it; {hint}")
    try:
        kind = files.read_json(folder / "config.json").get("model_type")
        if kind != ARMTConfig.model_type:
            raise ConfigError(f"model={folder}: its model_type is {kind}; give an ARMT from launch/consolidate.py")
        check_claims(folder)
        model, loading = ARMTForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    except ConfigError:
        raise
    # The readers raise many exceptions for damaged files.
    except Exception as error:
        raise ConfigError(f"model={folder}: cannot be loaded ({one_line(error, 400)}); export it again") from None
    # Hugging Face only warns, and uses random values.
    for name in (*loading["missing_keys"], *loading["unexpected_keys"]):
        raise ConfigError(f"model={folder}: config.json and the weights do not agree about {name}; export it again")
    return model.to(where).eval()


def check_claims(folder: Path) -> None:
    """Check that config.json claims no more parameters than the weights have bytes, before memory is taken for them.

    Raises ValueError, and many exceptions for a damaged configuration.
    """
    claimed = sum(parameter.numel() for parameter in on_meta(folder).parameters())
    held = sum(path.stat().st_size for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
    if claimed > held:
        raise ValueError(f"config.json claims {claimed} parameters, the weights have {held} bytes")


def self_check(model: ARMTForCausalLM) -> None:
    """Run `model.check()`. Raises ConfigError if generation would be wrong with the installed transformers."""
    try:
        model.check()
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(one_line(error, 600)) from None


def small_twin(config: ARMTConfig) -> ARMTForCausalLM:
    """Build a tiny random model of the same family and memory, for a self-check of the code."""
    base = config.base
    width = 8 * base.num_attention_heads * config.n_heads
    if width > WIDTH:
        raise ConfigError(
            f"config.json: {base.num_attention_heads} and {config.n_heads} heads are not those of a model"
        )
    names = type(base).attribute_map
    small = {"hidden_size": width, "num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 16}
    fields = base.to_dict() | {names.get(name, name): value for name, value in small.items()}
    fields |= {name: None for name in ("bos_token_id", "eos_token_id", "pad_token_id", "layer_types") if name in fields}
    own = {name: getattr(config, name) for name in ARMTFields.__annotations__}
    return ARMTForCausalLM(ARMTConfig(base_config=fields, **own)).eval()


def choose_device(name: str | None) -> torch.device:
    """Return the device `name`; None: a GPU if there is one. Raises ConfigError if it is not available."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={name}: {one_line(error)}; for example cpu or cuda:0") from None


def read_task(folder: Path, name: str | None, overrides: Sequence[str], trusted: bool = False) -> DataConfig:
    """Return the task that the model was trained on, or `name`, changed by ``data.key=value`` overrides.

    trusted: whether to read data wherever the folder says, not only below the working directory. Raises ConfigError if
    no task is known, an override does not fit, or the folder names data elsewhere.
    """
    saved, extensions = read_settings(folder)
    if not saved and name is None:
        raise ConfigError(
            f"task: {folder} does not say what it was trained on; give --task, one of {', '.join(SCHEMAS)}"
        )
    name = name or str(saved.get("task", DataConfig().task))
    if name not in SCHEMAS:
        # Not imported unasked: the folder may be a stranger's.
        hint = f", or give --extensions {' '.join(extensions)}, as in training" if extensions else ""
        raise ConfigError(f"task={name}: no such task; one of {', '.join(SCHEMAS)}{hint}")
    section = field_of(name)
    settings = dict(saved.get(section) or {})
    parts = settings.get("parts") if section == "mixture" else [{section: settings}]
    for part in parts if isinstance(parts, list) else ():
        use_here(part, folder)
    tree = {"data": {**{key: saved[key] for key in ("seed",) if key in saved}, "task": name, section: settings}}
    for override in overrides:
        assign(tree, override)
    if not trusted:
        given = [override.partition("=")[0] for override in overrides]
        check_places(folder, tree["data"][section], f"data.{section}", given)
    return validate(EvaluationData, tree).data


def use_here(data: Any, folder: Path) -> None:
    """Change a data section for this machine: tokenizers from the exported folder, the default cache."""
    for name in ("text", "babilong", "instructions") if isinstance(data, dict) else ():
        if isinstance(data.get(name), dict):
            # The tokenizer that training named may no longer exist; the export has a copy.
            data[name]["tokenizer"] = str(folder)
            # Where tokens are kept is up to this machine.
            data[name].pop("cache", None)


# Keys of a task's section that say where data are, and those of a data set on the Hub.
PLACES = ("files", "validation_files", "data_files", "background", "validation_background", "set", "name")


def check_places(folder: Path, section: Any, path: str, given: Sequence[str]) -> None:
    """Raise ConfigError where a section in an exported folder, maybe a stranger's, names data elsewhere.

    given: keys that the user set himself.
    """
    for key, value in section.items() if isinstance(section, dict) else ():
        own = f"{path}.{key}"
        if any(f"{own}.".startswith(f"{name}.") for name in given):
            continue
        check_places(folder, value, own, given)
        for i, child in enumerate(value if isinstance(value, list) else ()):
            check_places(folder, child, f"{own}.{i}", given)
        values = value if isinstance(value, list) else [value]
        for place in values if key in PLACES else ():
            if isinstance(place, str) and (is_elsewhere(place) or is_remote(key, place, section)):
                raise ConfigError(
                    f"{own}={one_line(place)}: {folder} names data outside of the working directory; give your own by "
                    f"--data {own}=..., or --trust-data if you trust the folder"
                )


def is_remote(key: str, place: str, section: dict) -> bool:
    """Return whether a key of a section names a data set that may have to be fetched."""
    if key == "set":
        return not section.get("files")
    return key == "name" and place not in BUILDERS and not Path(place).exists()


def is_elsewhere(place: str) -> bool:
    """Return whether a file name leads out of the working directory: a URL, an absolute path, or one with `..`."""
    return "://" in place or "::" in place or place.startswith(("/", "~")) or ".." in Path(place).parts


def read_settings(folder: Path) -> tuple[dict, list[str]]:
    """Return the data section of the training run and its extensions; empty if there are none.

    Raises ConfigError if they are damaged.
    """
    path = folder / TASK_FILE
    try:
        saved = files.read_json(path) if path.is_file() else {"data": {}}
        return dict(saved["data"]), [str(name) for name in saved.get("extensions", [])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"model={path}: not readable ({one_line(error)}); export the model again") from None


def default_lengths(task: Task) -> list[int]:
    """Return the LENGTHS that the task can make."""
    lengths = []
    for n in LENGTHS[task.unit]:
        try:
            task.sequence_tokens(n)
            lengths.append(n)
        except ConfigError:
            continue
    return lengths
