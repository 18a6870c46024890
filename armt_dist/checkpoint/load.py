"""Restores a run from a checkpoint, on any number of ranks.

With as many ranks as wrote it, and the same groups of the optimizer, DeepSpeed loads its own files. Otherwise each rank
reads its values from the shards of all (`resharding`). All files are read by torch's restricted unpickler.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..config import ConfigError, one_line
from ..distributed.collectives import together
from .deepspeed_files import keeping_settings, partitioned, read_tensors, restricted_unpickling
from .folder import MANIFEST, CheckpointError, Manifest, rank_file, read_manifest, verify_together
from .resharding import fits_as_it_is, reshard
from .rng_state import set_generators
from .zero_shards import MODEL, OPTIMIZER

# Where the names of all ranks' files begin to be alike.
COMMON = "zero_pp_rank_"
T = TypeVar("T")


def load_checkpoint(engine: Any, root: Path, tag: str, say: Callable[[str], None], verified: bool = False) -> dict:
    """Restore engine and random generators from a checkpoint; return the state passed to `save`. Collective.

    say: told again and again how far it is. verified: whether `find_newest` has just returned it. Raises
    CheckpointError on all ranks if it is damaged or cannot be loaded.
    """
    if not verified:
        verify_together(root / tag)
    manifest = together(lambda: read_manifest(root / tag))
    together(lambda: check_whole(root / tag, manifest))
    together(lambda: check_trust(root / tag))
    if together(lambda: fitting(root / tag, lambda: fits_as_it_is(engine, root / tag, manifest.world_size))):
        together(lambda: fitting(root / tag, lambda: load_own(engine, root, tag)))
    else:
        with partitioned(engine):
            together(lambda: fitting(root / tag, lambda: reshard(engine, root / tag, manifest.world_size, say)))
    # Ranks beyond those of the checkpoint keep the generators of a fresh start.
    own = rank_file(root / tag, dist.get_rank())
    together(lambda: fitting(root / tag, lambda: set_generators(load_file(own)) if own.exists() else None))
    return manifest.state


def load_own(engine: Any, root: Path, tag: str) -> None:
    """Let DeepSpeed load what as many ranks have saved. Collective."""
    with restricted_unpickling(), keeping_settings(engine):
        path, _ = engine.load_checkpoint(str(root), tag=tag)
    if path is None:
        raise ValueError("DeepSpeed found nothing to load in it")


def fitting(folder: Path, work: Callable[[], T]) -> T:
    """Do some work of loading. Raises CheckpointError where it fails: what does not fit the model raises much else."""
    try:
        return work()
    except ConfigError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"checkpoint={folder}: does not fit this run ({one_line(repr(error), 300)}); use another one"
        ) from None


def read_rows(folder: Path, rank: int, name: str, rows: Sequence[int]) -> torch.Tensor:
    """Return some rows of the tensor `name` that `rank` passed to `Saver.save`. Raises CheckpointError."""
    path = rank_file(folder, rank)
    try:
        with safe_open(path, "pt") as file:
            saved = file.get_slice(name)
            return torch.cat([saved[row : row + 1] for row in rows])
    except (OSError, SafetensorError, IndexError) as error:
        raise CheckpointError(f"checkpoint={path}: {name} cannot be read ({one_line(error, 200)})") from None


def check_whole(folder: Path, manifest: Manifest) -> None:
    """Check that a checkpoint is the one that its folder says, with files of every rank. Raises CheckpointError."""
    if manifest.tag != folder.name:
        raise CheckpointError(f"checkpoint={folder}: its {MANIFEST} is that of {one_line(manifest.tag)}")
    held = len(manifest.files)
    # DeepSpeed puts a precision before some names.
    names = {name[name.find(COMMON) :] for name in manifest.files if COMMON in name}
    if manifest.world_size > held or not all(
        pattern.format(rank).lstrip("*") in names
        for rank in range(manifest.world_size)
        for pattern in (OPTIMIZER, MODEL)
    ):
        raise CheckpointError(
            f"checkpoint={folder}: its {held} files are not those of {manifest.world_size} ranks; use another one"
        )


def check_trust(folder: Path) -> None:
    """Check that this rank's share of the pickled files holds only tensors and plain values; tensors are not read.

    To be called before DeepSpeed loads them, where a rank that fails leaves the others waiting. Raises CheckpointError.
    """
    for path in sorted(folder.rglob("*.pt"))[dist.get_rank() :: dist.get_world_size()]:
        try:
            read_tensors(path)
        except Exception as error:
            raise CheckpointError(
                f"checkpoint={path}: holds more than tensors and plain values, or is damaged "
                f"({one_line(error, 200)}); use another checkpoint"
            ) from None
