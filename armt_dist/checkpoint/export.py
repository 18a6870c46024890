"""Exports a checkpoint as a Hugging Face folder: offline, in one process, in memory that does not grow with the model.

Each rank's piece of each tensor is copied from its mapped file straight to its place in a safetensors file, by the same
read that verifies the file (`verified_copy`).
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from tqdm import tqdm
from transformers.dynamic_module_utils import custom_object_save

from .. import files
from ..config import ConfigError, one_line, read_object, read_yaml
from ..model.configuration_armt import ARMTConfig
from ..model.modeling_armt import ARMTForCausalLM
from ..records import write_json
from .adapters import Parameter, merged, read_lora
from .folder import STAGING, building, check_files, read_pointer, verify_checkpoint
from .model_card import write_model_card
from .published import copy_known_files, public, without_code
from .verified_copy import Target, copy_verified
from .zero_shards import is_checkpoint, open_checkpoint

# The engine wraps ScheduledLM, whose `model` is the one to export.
PREFIX = "model."
# Weight types and their names in safetensors.
DTYPES = {"float32": "F32", "bfloat16": "BF16"}
# Of a model: each takes memory even without values.
LAYERS = 10_000
# The data section of the run, from which launch/evaluate.py makes the task.
TASK_FILE = "armt_task.json"


class Source(NamedTuple):
    """A run folder and one of its checkpoints."""

    run: Path
    checkpoint: Path
    left_out: tuple[str, ...] = ()  # files in the run's model folder that an export does not publish


def export(
    source: Path, out: Path, tag: str | None = None, dtype: str = "float32", max_shard_size: str = "5GB"
) -> Source:
    """Export checkpoint `tag` of `source`, a run or a checkpoint, to the new folder `out`; return what was exported.

    tag: a folder under checkpoints/, `latest` or `best`; None: best if there is one, else latest.
    dtype: type of the written weights, float32 (as in the optimizer) or bfloat16.
    `out` appears only when it is complete. Raises ConfigError if the source is missing or damaged, or if `out` is in
    use or cannot be written.
    """
    out = Path(out)
    found = open_source(Path(source), out, tag)
    with damage_first(found.checkpoint):
        model = skeleton(found.run / "model", dtype)
        parameters, addresses = open_parameters(found, model)
    try:
        with building(out) as folder:
            left_out = copy_known_files(found.run / "model", folder)
            targets = lay_out_weights(parameters, folder, getattr(torch, dtype), max_shard_size)
            copy_weights(found.checkpoint, addresses, targets)
            write_rest(model, found, parameters, folder)
            left_out = [name for name in left_out if not (folder / name).exists()]
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written ({one_line(error)}); give another folder") from None
    return found._replace(left_out=tuple(left_out))


def open_source(source: Path, out: Path, tag: str | None) -> Source:
    """Find the checkpoint to be exported to `out`; its files are there, and not verified. Raises ConfigError."""
    found = locate(source, tag)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={out}: exists and is not an empty folder; give another one")
    check_files(found.checkpoint)
    return found


@contextmanager
def damage_first(checkpoint: Path) -> Iterator[None]:
    """Say of a checkpoint that it is damaged, if it is, rather than what else cannot be done with it.

    For what is done before it has been verified. Raises CheckpointError, or what the block raises.
    """
    try:
        yield
    except Exception:
        verify_checkpoint(checkpoint)
        raise


def write_rest(model: ARMTForCausalLM, source: Source, parameters: dict[str, Parameter], folder: Path) -> None:
    """Write configuration, modelling code, task and model card into `folder`."""
    config: Any = model.config
    # A run's configuration may name code; what is recorded from here on is ours.
    config.auto_map = {}
    # Also copies the modelling files, and records them in the configuration as auto_map.
    custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    tree = read_object(folder / "config.json", "out")
    write_json(folder / "config.json", {**without_code(tree), "auto_map": tree["auto_map"]}, sort_keys=True)
    write_task(source.run, folder)
    count = sum(parameter.shape.numel() for parameter in parameters.values())
    write_model_card(folder / "README.md", source.run, source.checkpoint, config, count)


def locate(source: Path, tag: str | None) -> Source:
    """Find the run and the checkpoint. Raises ConfigError if there is none, naming those that exist."""
    if not source.is_dir():
        raise ConfigError(f"run={source}: no such folder; give a run folder of launch/train.py")
    if is_checkpoint(source):
        if tag is not None:
            raise ConfigError(f"tag={tag}: {source} is a checkpoint itself; leave the tag out")
        found = Source(source.absolute().parents[1], source)
    else:
        root = source if any(map(is_checkpoint, source.glob("*/"))) else source / "checkpoints"
        found = Source(root.absolute().parent, root / resolve_tag(root, tag))
    if not (found.run / "model" / "config.json").is_file():
        raise ConfigError(f"run={found.run}: no model/config.json; give a run folder of launch/train.py")
    return found


def resolve_tag(root: Path, tag: str | None) -> str:
    """Return the name of a checkpoint folder under `root`. Raises ConfigError."""
    tags = sorted(path.name for path in root.glob("*/") if is_checkpoint(path) and not path.name.startswith(STAGING))
    if not tags:
        raise ConfigError(f"run={root.parent}: no checkpoint in {root}; train until one is saved")
    if tag in tags:
        return tag
    pointers = {name: read_pointer(root, name) for name in ("best", "latest") if (root / name).exists()}
    if tag is None:
        return next((target for target in pointers.values() if target in tags), tags[-1])
    name = pointers.get(tag, tag)
    if name not in tags:
        raise ConfigError(f"tag={tag}: no such checkpoint; choose from {', '.join([*pointers, *tags])}")
    return name


def skeleton(folder: Path, dtype: str) -> ARMTForCausalLM:
    """Build the model without values, for names, shapes and ties. Raises ConfigError."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype}: one of {', '.join(DTYPES)}")
    try:
        model = on_meta(folder)
    # A configuration of a stranger, or a damaged one, raises many exceptions.
    except Exception as error:
        raise ConfigError(
            f"run={folder}: no readable model configuration ({one_line(error)}); give an undamaged run"
        ) from None
    # As PreTrainedModel.save_pretrained does.
    config = model.config
    base: Any = config.base_config
    config.dtype = base.dtype = dtype
    config.architectures = [type(model).__name__]
    return model


def on_meta(folder: Path) -> ARMTForCausalLM:
    """Build the model that config.json in `folder` describes, without values. Raises many exceptions."""
    files.read_json(folder / "config.json")
    config = ARMTConfig.from_pretrained(folder)
    layers = max(config.num_hidden_layers, config.base.num_hidden_layers)
    if layers > LAYERS:
        raise ValueError(f"num_hidden_layers={layers}: more than {LAYERS}")
    with torch.device("meta"):
        return ARMTForCausalLM(config)


def open_parameters(source: Source, model: ARMTForCausalLM) -> tuple[dict[str, Parameter], dict[Path, range]]:
    """Map the model's parameters, with adapters merged; return them, and where the files are mapped.

    Raises ConfigError for a checkpoint that does not fit.
    """
    stored, addresses = open_checkpoint(source.checkpoint)
    lora = read_lora(source.run)
    try:
        found = stored if lora is None else merged(stored, model, PREFIX, lora)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ConfigError(f"checkpoint={source.checkpoint}: its adapters do not fit ({one_line(error)})") from None
    return match(model, found, source.checkpoint), addresses


def match(model: ARMTForCausalLM, stored: Mapping[str, Parameter], folder: Path) -> dict[str, Parameter]:
    """Return the model's parameters, tied ones under one name only. Raises ConfigError if one is missing."""
    tied = model.all_tied_weights_keys
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}
    for name, shape in shapes.items():
        held = stored.get(PREFIX + name)
        if held is None or held.shape != shape:
            what = "missing" if held is None else f"of shape {list(held.shape)}, not {list(shape)}"
            raise ConfigError(f"checkpoint={folder}: {name} is {what}; model/config.json belongs to another model")
    return {name: stored[PREFIX + name] for name in shapes}


def lay_out_weights(
    parameters: dict[str, Parameter], folder: Path, dtype: torch.dtype, max_shard_size: str
) -> list[tuple[Parameter, Target]]:
    """Make safetensors files of at most `max_shard_size` each, and an index if there are several, as `lay_out`."""
    shapes = {name: torch.empty(p.shape, dtype=dtype, device="meta") for name, p in parameters.items()}
    try:
        plan = split_torch_state_dict_into_shards(
            shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise ConfigError(f"max_shard_size={max_shard_size}: {one_line(error)}; for example 5GB") from None
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index, sort_keys=True)
    targets: list[tuple[Parameter, Target]] = []
    for file, names in plan.filename_to_tensors.items():
        targets += lay_out(folder / file, {name: parameters[name] for name in names}, dtype)
    return targets


def lay_out(path: Path, parameters: dict[str, Parameter], dtype: torch.dtype) -> list[tuple[Parameter, Target]]:
    """Make a safetensors file without values, and return where they go; the library's writer needs them in memory.

    Format: length of the header (uint64, little-endian), header as JSON padded to 8 bytes, values. Raises OSError.
    """
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, parameter in parameters.items():
        start, end = end, end + parameter.shape.numel() * dtype.itemsize
        header[name] = {
            "dtype": DTYPES[str(dtype).removeprefix("torch.")],
            "shape": list(parameter.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        file.truncate(8 + len(text) + end)
    starts = (8 + len(text) + header[name]["data_offsets"][0] for name in parameters)
    return [(each, Target(path, start, dtype)) for each, start in zip(parameters.values(), starts, strict=True)]


def copy_weights(checkpoint: Path, addresses: dict[Path, range], targets: list[tuple[Parameter, Target]]) -> None:
    """Fill the files of `lay_out`, and verify the checkpoint; as `copy_verified`."""
    total = sum(parameter.shape.numel() * target.dtype.itemsize for parameter, target in targets)
    with tqdm(total=total, unit="B", unit_scale=True, desc="export", disable=None) as bar:
        copy_verified(checkpoint, addresses, targets, bar)


def write_task(run: Path, folder: Path) -> None:
    """Write TASK_FILE from the configuration of the run, if there is one."""
    if (run / "config.yaml").is_file():
        tree = read_yaml(run / "config.yaml")
        facts = {"data": public(tree.get("data", {})), "extensions": tree.get("extensions") or []}
        write_json(folder / TASK_FILE, facts)
