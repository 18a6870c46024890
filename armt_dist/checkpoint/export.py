"""A checkpoint as a Hugging Face folder: offline, in one process, tensor by tensor.

One rank's piece of one tensor is the most that is ever in memory: it goes from the mapped checkpoint file straight to
its place in a safetensors file.
"""

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from tqdm import tqdm
from transformers.dynamic_module_utils import custom_object_save

from ..config import ConfigError, one_line, read_yaml
from ..model.configuration_armt import ARMTConfig
from ..model.modeling_armt import ARMTForCausalLM
from . import folder as checkpoint
from . import model_card
from .zero_shards import Parameter, is_checkpoint, open_checkpoint

# The engine wraps ScheduledLM, whose `model` is the one to export.
PREFIX = "model."
# Their names in safetensors.
DTYPES = {"float32": "F32", "bfloat16": "BF16"}
# How to evaluate the model as it was trained: the data section of its run.
TASK_FILE = "armt_task.json"


class Source(NamedTuple):
    """A run folder and one of its checkpoints."""

    run: Path
    checkpoint: Path


def export(
    source: Path, out: Path, tag: str | None = None, dtype: str = "float32", max_shard_size: str = "5GB"
) -> Source:
    """Write checkpoint `tag` of `source`, a run or a checkpoint, to the new folder `out`; returns what was exported.

    tag: a folder under checkpoints/, `latest` or `best`; None: best where there is one, else latest.
    dtype: of the written weights, float32, as the optimizer has them, or bfloat16.
    `out` appears when it is complete. Raises ConfigError for a source that is missing or damaged and for an `out` that
    is in use or cannot be written.
    """
    found = locate(Path(source), tag)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={out}: exists and is not an empty folder; give another one")
    if (found.checkpoint / checkpoint.MANIFEST).exists():
        checkpoint.verify_checkpoint(found.checkpoint)
    model = skeleton(found.run / "model", dtype)
    parameters = match(model, open_checkpoint(found.checkpoint), found.checkpoint)
    count = sum(parameter.shape.numel() for parameter in parameters.values())
    with staged(out) as folder:
        shutil.copytree(found.run / "model", folder, dirs_exist_ok=True)
        write_weights(parameters, folder, getattr(torch, dtype), max_shard_size)
        # Also copies the modelling files and writes where they are (auto_map) into the configuration.
        custom_object_save(model, folder, config=model.config)
        model.config.save_pretrained(folder)
        write_task(found.run, folder)
        card = model_card.write_model_card(found.run, found.checkpoint, model.config, count)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return found


def locate(source: Path, tag: str | None) -> Source:
    """The run and checkpoint that are meant. Raises ConfigError where there is none, naming what there is."""
    if not source.is_dir():
        raise ConfigError(f"run={source}: no such folder; give a run folder of launch/train.py")
    if is_checkpoint(source):
        if tag is not None:
            raise ConfigError(f"tag={tag}: {source} is a checkpoint already; leave the tag out")
        found = Source(source.absolute().parents[1], source)
    else:
        root = source if any(map(is_checkpoint, source.glob("*/"))) else source / "checkpoints"
        found = Source(root.absolute().parent, root / resolve_tag(root, tag))
    if not (found.run / "model" / "config.json").is_file():
        raise ConfigError(f"run={found.run}: no model/config.json in it; give a run folder of launch/train.py")
    return found


def resolve_tag(root: Path, tag: str | None) -> str:
    """The name of a checkpoint folder under `root`."""
    tags = sorted(path.name for path in root.glob("*/") if is_checkpoint(path) and not path.name.startswith("staging-"))
    if not tags:
        raise ConfigError(f"run={root.parent}: no checkpoint in {root}; train until one is saved")
    pointers = {name: (root / name).read_text().strip() for name in ("best", "latest") if (root / name).is_file()}
    if tag is None:
        return next((target for target in pointers.values() if target in tags), tags[-1])
    name = pointers.get(tag, tag)
    if name not in tags:
        raise ConfigError(f"tag={tag}: no such checkpoint; there are {', '.join([*pointers, *tags])}")
    return name


def skeleton(folder: Path, dtype: str) -> ARMTForCausalLM:
    """The model without values: names, shapes and ties."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype}: one of {', '.join(DTYPES)}")
    try:
        config = ARMTConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = ARMTForCausalLM(config)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"run={folder}: no readable model configuration ({one_line(error)})") from None
    # As PreTrainedModel.save_pretrained writes it.
    config.dtype = config.base_config.dtype = dtype
    config.architectures = [type(model).__name__]
    return model


def match(model: ARMTForCausalLM, stored: dict[str, Parameter], folder: Path) -> dict[str, Parameter]:
    """The model's parameters, each tensor once however many names it has. Raises ConfigError where one is missing."""
    tied = model.all_tied_weights_keys
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}
    for name, shape in shapes.items():
        held = stored.get(PREFIX + name)
        if held is None or held.shape != shape:
            what = "missing" if held is None else f"of shape {list(held.shape)}, not {list(shape)}"
            raise ConfigError(f"checkpoint={folder}: {name} is {what}; model/config.json is of another model")
    return {name: stored[PREFIX + name] for name in shapes}


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name at the end of the block, or disappears if the block fails."""
    staging = out.absolute().with_name(f".{out.absolute().name}.{uuid.uuid4().hex[:8]}")
    try:
        staging.mkdir(parents=True)
        yield staging
        staging.rename(out)
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written ({one_line(error)}); give another folder") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_weights(parameters: dict[str, Parameter], folder: Path, dtype: torch.dtype, max_shard_size: str) -> None:
    """Safetensors files of at most `max_shard_size` each, and their index where there are several."""
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
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_shard(path: Path, parameters: dict[str, Parameter], dtype: torch.dtype, bar: tqdm) -> None:
    """One safetensors file, written piece by piece; the library's own writer wants all tensors in memory.

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
    """The bytes of a flat tensor, not copied."""
    return memoryview(values.contiguous().view(torch.uint8).numpy())


def write_task(run: Path, folder: Path) -> None:
    """What launch/evaluate.py needs to know of the data that the run was trained on."""
    if (run / "config.yaml").is_file():
        task = {"data": read_yaml(run / "config.yaml").get("data", {})}
        (folder / TASK_FILE).write_text(json.dumps(task, indent=2) + "\n")
