"""DeepSpeed's private parts that concern checkpoint files, one function each; the others are in `zero3.private`.

Each docstring names the version that the part was seen in. tests/unit/test_deepspeed_files.py fails if DeepSpeed
changes one. DeepSpeed is imported inside the functions: an export needs only `read_tensors`.
"""

import os
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..files import open_regular


class Inert:
    """Stands in for an object of DeepSpeed's that is not needed."""


# The only classes that DeepSpeed 0.19.8 pickles beside tensors and plain values, and what stands in for each.
PICKLED: dict[str, type] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": Inert,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": Inert,
}


# What their tensors and plain values are made of. torch's own list is longer: it has bytearray, for example, which
# makes gigabytes of a number.
BUILT_FROM = frozenset(
    (
        *("collections.OrderedDict", "torch.Size", "torch.Tensor", "torch.device", "torch.nn.parameter.Parameter"),
        *("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch._tensor._rebuild_from_type_v2"),
        *PICKLED,
    )
)


def read_tensors(path: Path) -> Any:
    """Map a file of tensors and plain values from disk, by torch's restricted unpickler and without DeepSpeed.

    A file with anything else in it, one that claims more values than it holds, or a damaged one, raises one of many
    exceptions, before memory is taken for it.
    """
    check_archive(path)
    with torch.serialization.safe_globals([(kind, name) for name, kind in PICKLED.items()]):
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    claimed, held = tensor_bytes(content), path.stat().st_size
    if claimed > held:
        raise ValueError(f"its tensors claim {claimed} bytes, and the file has {held}")
    return content


def check_archive(path: Path) -> None:
    """Check that a file of torch's has its records as they are, once each, and pickles only what tensors need.

    Raises ValueError, UnpicklingError, and many exceptions for a damaged file.
    """
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        held = os.fstat(file.fileno()).st_size
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("its records are compressed")
        if sum(record.file_size for record in records) > held:
            raise ValueError(f"its records claim more than the {held} bytes of the file")
        if len({record.filename for record in records}) < len(records):
            raise ValueError("it has several records of one name")
        for record in records:
            if record.filename.endswith(".pkl"):
                for code, name, _ in pickletools.genops(archive.read(record)):
                    if code.name in ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
                        check_built_from(str(name).replace(" ", "."))


def check_built_from(name: str) -> None:
    """Raise UnpicklingError unless a pickle may name this class or function."""
    inside = getattr(torch, name.removeprefix("torch."), None) if name.startswith("torch.") else None
    if name not in BUILT_FROM and not isinstance(inside, torch.dtype) and not name.endswith("Storage"):
        raise pickle.UnpicklingError(f"it names {name[:100]}")


def tensor_bytes(content: Any) -> int:
    """Return the bytes that all tensors in nested mappings and lists would take if each were copied."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(content))


def addresses_of(content: Any) -> range:
    """Return the addresses from the first to the last tensor of a mapped file, in nested mappings and lists."""
    storages = [tensor.untyped_storage() for tensor in tensors_in(content)]
    held = [(storage.data_ptr(), storage.nbytes()) for storage in storages if storage.nbytes()]
    return range(min(start for start, _ in held), max(start + size for start, size in held)) if held else range(0)


def tensors_in(content: Any) -> Iterator[Tensor]:
    """Yield each tensor in nested mappings and lists once."""
    seen, left = set[int](), [content]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            left.extend(value.values())
        elif isinstance(value, list | tuple | set):
            left.extend(value)


@contextmanager
def restricted_unpickling() -> Iterator[None]:
    """Make DeepSpeed's own readers use torch's restricted unpickler.

    They pass `weights_only=False`, which would run any code in a file. Seen in DeepSpeed 0.19.8.
    """
    known = [getattr(import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in PICKLED]
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        with torch.serialization.safe_globals(known):
            yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


@contextmanager
def writing_through(engine: Any, writer: Any) -> Iterator[None]:
    """Make the engine pass the files of its checkpoints to `writer`, a TorchCheckpointEngine.

    `engine.checkpoint_engine`, seen in DeepSpeed 0.19.8.
    """
    before, engine.checkpoint_engine = engine.checkpoint_engine, writer
    try:
        yield
    finally:
        engine.checkpoint_engine = before


def leave_out_recovery_script(engine: Any) -> None:
    """Keep the engine from copying its script into checkpoints: it runs any code that a checkpoint was pickled with.

    `engine._copy_recovery_script`, seen in DeepSpeed 0.19.8.
    """
    engine._copy_recovery_script = lambda path: None


class FlatGroup(NamedTuple):
    """A rank's parts of some trained parameters, one after another in one tensor."""

    flat: Tensor  # master weights, float32
    states: dict[str, Any]  # the optimizer's, empty before its first step
    shapes: dict[str, torch.Size]  # of the whole parameters, by their names in the engine


def flat_groups(engine: Any) -> list[FlatGroup]:
    """Return the flat groups of this rank, to be changed in place. Raises ValueError where they are on NVMe disks.

    `fp16_groups`, `fp32_partitioned_groups_flat` and `param_names` of its optimizer, `ds_shape` of a parameter; seen in
    DeepSpeed 0.19.8.
    """
    zero = engine.optimizer
    if zero.swap_optimizer:
        raise ValueError(
            "the optimizer's states are on NVMe disks; start as many ranks, with the groups, that wrote it"
        )
    return [
        FlatGroup(flat, zero.optimizer.state.get(flat, {}), {zero.param_names[p]: p.ds_shape for p in group})
        for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
    ]


def trained_layout(engine: Any) -> list[list[str]]:
    """Return the names of the parameters in each flat group: `fp16_groups`, `param_names`, DeepSpeed 0.19.8."""
    zero = engine.optimizer
    return [[zero.param_names[p] for p in group] for group in zero.fp16_groups]


# Of a group of the optimizer: what it holds, and how torch computes.
NOT_SETTINGS = ("params", "fused", "foreach", "capturable", "differentiable")


@contextmanager
def keeping_settings(engine: Any) -> Iterator[None]:
    """Give the groups of the optimizer their rates, weight decays and other settings back after the block.

    DeepSpeed loads those of the run that saved. How torch computes stays as loaded, because the states fit it.
    `param_groups` of the engine's optimizer, seen in DeepSpeed 0.19.8.
    """
    groups = engine.optimizer.param_groups
    before = [{key: value for key, value in group.items() if key not in NOT_SETTINGS} for group in groups]
    yield
    for group, settings in zip(engine.optimizer.param_groups, before, strict=True):
        group.update(settings)


def load_optimizer(engine: Any, states: list[dict]) -> None:
    """Give the optimizer its state for each flat group, and copy the master weights, already filled, to the model.

    `load_state_dict` of the engine's optimizer takes what each rank has saved, and uses its own. Seen in DeepSpeed
    0.19.8.
    """
    zero = engine.optimizer
    held: list[list[int]] = [[] for _ in zero.param_groups]
    for number in range(len(states)):
        held[zero.sub_group_to_group_id[number]].append(number)
    base = {
        "state": dict(enumerate(states)),
        "param_groups": [{**group, "params": numbers} for group, numbers in zip(zero.param_groups, held, strict=True)],
    }
    own = {
        "loss_scaler": zero.loss_scaler,
        "dynamic_loss_scale": zero.dynamic_loss_scale,
        "overflow": False,
        "optimizer_state_dict": base,
        "fp32_flat_groups": zero.fp32_partitioned_groups_flat,
    }
    zero.load_state_dict([own] * dist.get_world_size())


def frozen_parts(engine: Any) -> Iterator[tuple[str, torch.Size, Tensor]]:
    """Yield name, shape and this rank's part of each frozen parameter: `ds_shape`, `ds_tensor`, DeepSpeed 0.19.8."""
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            yield name, parameter.ds_shape, parameter.ds_tensor.data.flatten()


def count_steps(engine: Any, model_states: dict) -> None:
    """Set the engine's counters to those in a file of model states. Seen in DeepSpeed 0.19.8."""
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, int(model_states[counter]))


@contextmanager
def partitioned(engine: Any) -> Iterator[None]:
    """Let no parameter be whole within the block, so that the parts may change. Collective after the block.

    `checkpoint_event_prologue` and `checkpoint_event_epilogue`, which gathers small parameters again, of the engine's
    optimizer; seen in DeepSpeed 0.19.8.
    """
    engine.optimizer.checkpoint_event_prologue()
    yield
    engine.optimizer.checkpoint_event_epilogue()
