"""The parameters in a ZeRO-3 checkpoint folder, each as the ranks' pieces, mapped from disk and not yet read.

DeepSpeed's own reader (`zero_to_fp32`) runs any code that a checkpoint was pickled with, and reads the frozen
parameters of all ranks into memory. Here files are opened with torch's restricted unpickler, and bytes are read only
when a piece is used. Needs neither DeepSpeed nor a process group.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import ConfigError, one_line
from .deepspeed_files import addresses_of, read_tensors

# Files of a rank: fp32 master weights with the optimizer's states, and everything else. Seen in DeepSpeed 0.19.8.
OPTIMIZER, MODEL = "*zero_pp_rank_{}_mp_rank_00_optim_states.pt", "zero_pp_rank_{}_mp_rank_00_model_states.pt"
# What may stand for the asterisk: DeepSpeed 0.19.8 marks the files of bfloat16 runs.
PREFIXES = ("", "bf16_")


class StoredParameter(NamedTuple):
    """One parameter; its flat pieces, without ZeRO's padding, make up the whole tensor in order."""

    shape: torch.Size
    pieces: tuple[Tensor, ...]


class StoredCheckpoint(NamedTuple):
    """What `open_checkpoint` has mapped."""

    parameters: dict[str, StoredParameter]  # by their names in the engine
    addresses: dict[Path, range]  # of the tensors of each file


def is_checkpoint(folder: Path) -> bool:
    """Return whether `folder` holds files of a ZeRO checkpoint."""
    return any(folder.glob(OPTIMIZER.format("*"))) or any(folder.glob(MODEL.format("*")))


def open_checkpoint(folder: Path) -> StoredCheckpoint:
    """Map every parameter, trained and frozen.

    Raises ConfigError for a file that is missing, truncated or not of a ZeRO-3 checkpoint.
    """
    addresses: dict[Path, range] = {}

    def opened(pattern: str, rank: int) -> dict:
        path = find_file(folder, pattern, rank)
        content = open_path(path, pattern)
        addresses[path] = addresses_of(content)
        return content

    first = opened(OPTIMIZER, 0)["optimizer_state_dict"]
    stage, world = first.get("zero_stage"), first.get("partition_count")
    if stage != 3:
        raise ConfigError(f"checkpoint={folder}: written by ZeRO stage {one_line(stage)}; only stage 3 can be exported")
    if type(world) is not int or world < 1:
        raise ConfigError(f"checkpoint={folder}: partition_count={one_line(world)} is no number of ranks")
    ranks = [first, *(opened(OPTIMIZER, rank)["optimizer_state_dict"] for rank in range(1, world))]
    models = [opened(MODEL, 0)]
    frozen = models[0].get("frozen_param_shapes") or {}
    if frozen:
        models += [opened(MODEL, rank) for rank in range(1, world)]
    try:
        trained = {name: shape for group in models[0]["param_shapes"] for name, shape in group.items()}
        parameters = dict(trained_parameters(trained, [rank["fp32_flat_groups"] for rank in ranks]))
        for name, shape in frozen.items():
            parameters[name] = join(shape, [[model["frozen_param_fragments"][name]] for model in models])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"checkpoint={folder}: its files do not fit together ({one_line(error)})") from None
    return StoredCheckpoint(parameters, addresses)


def open_file(folder: Path, pattern: str, rank: int) -> dict:
    """Map one file of one rank from disk. Raises ConfigError naming it."""
    return open_path(find_file(folder, pattern, rank), pattern)


def find_file(folder: Path, pattern: str, rank: int) -> Path:
    """Return the path of one file of one rank. Raises ConfigError if there is none."""
    name = pattern.format(rank).removeprefix("*")
    # Not searched for in a list of the folder: every rank's search would read the whole list.
    candidates = (folder / f"{prefix}{name}" for prefix in PREFIXES[: 1 + pattern.startswith("*")])
    path = next((path for path in candidates if path.exists()), None)
    if path is None:
        raise ConfigError(f"checkpoint={folder}: {name} of rank {rank} is missing; restore it or choose another --tag")
    return path


def open_path(path: Path, pattern: str) -> dict:
    """Map a file that has the name `pattern` from disk. Raises ConfigError naming it."""
    try:
        content = read_tensors(path)
        required = "optimizer_state_dict" if pattern is OPTIMIZER else "param_shapes"
        if not isinstance(content, dict) or required not in content:
            raise ValueError(f"no {required} in it")
        if required == "optimizer_state_dict" and not isinstance(content[required], dict):
            raise ValueError(f"{required} is no mapping")
        return content
    # The restricted unpickler raises many exceptions for damaged files.
    except Exception as error:
        raise ConfigError(
            f"checkpoint={path}: truncated or not a DeepSpeed file ({one_line(error)}); choose another --tag"
        ) from None


def trained_parameters(
    shapes: dict[str, torch.Size], groups: list[list[Tensor]]
) -> Iterator[tuple[str, StoredParameter]]:
    """Yield the parameters, which follow one another in each rank's flat groups, in equal parts over the ranks.

    Raises ValueError if the groups are longer or shorter than the parameters.
    """
    world, start = len(groups), 0
    for name, shape in shapes.items():
        part = -(-shape.numel() // world)
        yield name, join(shape, [list(stretch_of(flat, start, part)) for flat in groups])
        start += part
    for rank, flat in enumerate(groups):
        held = sum(group.numel() for group in flat)
        if held != start:
            raise ValueError(f"rank {rank} holds {held} values, the parameters have {start}")


def stretch_of(groups: list[Tensor], start: int, count: int) -> Iterator[Tensor]:
    """Yield views of the values `start` to `start + count` of the concatenated flat `groups`."""
    for group in groups:
        taken = group[max(start, 0) : max(start + count, 0)]
        if len(taken):
            yield taken
        start -= len(group)


def join(shape: torch.Size, by_rank: list[list[Tensor]]) -> StoredParameter:
    """Join the parts of all ranks and drop the padding at the end. Raises ValueError if they are too short."""
    left, pieces = shape.numel(), list[Tensor]()
    for piece in (piece.flatten() for parts in by_rank for piece in parts):
        if left:
            pieces.append(piece[:left])
            left -= len(pieces[-1])
    if left:
        raise ValueError(f"{left} values of a parameter of shape {list(shape)} are missing")
    return StoredParameter(torch.Size(shape), tuple(pieces))
