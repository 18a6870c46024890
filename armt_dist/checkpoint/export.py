"""Exports a checkpoint as a Hugging Face folder: offline, in one process, tensor by tensor.

At most one rank's piece of one tensor is in memory at a time: it is copied from the mapped checkpoint file straight to
its place in a safetensors file.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from tqdm import tqdm
from transformers.dynamic_module_utils import custom_object_save

from .. import files
from ..config import ConfigError, one_line, read_object, read_yaml
from ..model.configuration_armt import ARMTConfig
from ..model.modeling_armt import ARMTForCausalLM
from ..records import write_json
from .adapters import Parameter, merged, read_lora
from .folder import STAGING, building, read_pointer, verify_checkpoint
from .model_card import write_model_card
from .published import copy_known_files, public, without_code
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
    model = skeleton(found.run / "model", dtype)
    parameters = open_parameters(found, model)
    try:
        with building(out) as folder:
            left_out = copy_known_files(found.run / "model", folder)
            write_weights(parameters, folder, getattr(torch, dtype), max_shard_size)
            write_rest(model, found, parameters, folder)
            left_out = [name for name in left_out if not (folder / name).exists()]
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written ({one_line(error)}); give another folder") from None
    return found._replace(left_out=tuple(left_out))


def open_source(source: Path, out: Path, tag: str | None) -> Source:
    """Find and verify the checkpoint to be exported to `out`. Raises ConfigError as `export`."""
    found = locate(source, tag)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={out}: exists and is not an empty folder; give another one")
    verify_checkpoint(found.checkpoint)
    return found


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


def open_parameters(source: Source, model: ARMTForCausalLM) -> dict[str, Parameter]:
    """Map the model's parameters, with adapters merged. Raises ConfigError for a checkpoint that does not fit."""
    stored, lora = open_checkpoint(source.checkpoint), read_lora(source.run)
    try:
        found = stored if lora is None else merged(stored, model, PREFIX, lora)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ConfigError(f"checkpoint={source.checkpoint}: its adapters do not fit ({one_line(error)})") from None
    return match(model, found, source.checkpoint)


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


def write_weights(parameters: dict[str, Parameter], folder: Path, dtype: torch.dtype, max_shard_size: str) -> None:
    """Write safetensors files of at most `max_shard_size` each, and an index if there are several."""
    shapes = {name: torch.empty(p.shape, dtype=dtype, device="meta") for name, p in parameters.items()}
    try:
        plan = split_torch_state_dict_into_shards(
            shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise ConfigError(f"max_shard_size={max_shard_size}: {one_line(error)}; for example 5GB") from None
    total = plan.metadata["total_size"]
    with tqdm(total=total, unit="B", unit_scale=True, desc="export", disable=None) as bar:
        for file, names in plan.filename_to_tensors.items():
            write_shard(folder / file, {name: parameters[name] for name in names}, dtype, bar)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index, sort_keys=True)


def write_shard(path: Path, parameters: dict[str, Parameter], dtype: torch.dtype, bar: tqdm) -> None:
    """Write one safetensors file piece by piece; the library's own writer needs all tensors in memory.

    Format: length of the header (uint64, little-endian), header as JSON padded to 8 bytes, values.
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
        for parameter in parameters.values():
            for piece in parameter.pieces:
                bar.update(file.write(raw(piece.to(dtype))))


def raw(values: Tensor) -> memoryview:
    """Return the bytes of a flat tensor without a copy."""
    return values.contiguous().view(torch.uint8).numpy().data


def write_task(run: Path, folder: Path) -> None:
    """Write TASK_FILE from the configuration of the run, if there is one."""
    if (run / "config.yaml").is_file():
        tree = read_yaml(run / "config.yaml")
        facts = {"data": public(tree.get("data", {})), "extensions": tree.get("extensions") or []}
        write_json(folder / TASK_FILE, facts)
