"""Restores a run from a checkpoint, on any number of ranks.

With as many ranks as wrote it, DeepSpeed loads its own files bit for bit. Otherwise they are converted to DeepSpeed's
universal format first, one file per parameter and optimizer moment. The result is kept beside the checkpoint as
`universal-step_N` and reused. All files are read by torch's restricted unpickler.
"""

import fnmatch
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..config import one_line
from ..distributed.collectives import together
from .deepspeed_files import read_tensors, reading_universal, restricted_unpickling, write_universal
from .folder import (
    MANIFEST,
    UNIVERSAL,
    CheckpointError,
    Manifest,
    building,
    hash_files,
    rank_file,
    read_manifest,
    remove,
    verify_checkpoint,
    verify_together,
    write_manifest,
)
from .rng_state import set_generators
from .zero_shards import MODEL, OPTIMIZER, open_checkpoint


def load_checkpoint(engine: Any, root: Path, tag: str, verified: bool = False) -> dict:
    """Restore engine and random generators from a checkpoint; return the state passed to `save`. Collective.

    verified: whether `find_newest` has just returned it. Raises CheckpointError on all ranks if it is damaged or cannot
    be loaded.
    """
    if not verified:
        verify_together(root / tag)
    manifest = together(lambda: read_manifest(root / tag))
    together(lambda: check_whole(root / tag, manifest))
    together(lambda: check_trust(root / tag))
    elastic = manifest.world_size != dist.get_world_size()
    if elastic:
        together(lambda: convert(root, tag), only=0)
        together(lambda: check_trust(root / (UNIVERSAL + tag)))

    def restore() -> None:
        try:
            with restricted_unpickling(), reading_universal(engine, elastic):
                path, _ = engine.load_checkpoint(str(root), tag=UNIVERSAL + tag if elastic else tag)
            # Ranks beyond those of the checkpoint keep the generators of a fresh start.
            own = rank_file(root / tag, dist.get_rank())
            if own.exists():
                set_generators(load_file(own))
        # Tensors that do not fit the model raise many exceptions.
        except Exception as error:
            raise CheckpointError(
                f"checkpoint={root / tag}: does not fit this run ({one_line(repr(error), 300)}); use another one"
            ) from None
        if path is None:
            raise CheckpointError(f"checkpoint={root / tag}: DeepSpeed found nothing to load in it")

    together(restore)
    if elastic:
        restore_frozen(engine, root / tag)
    return manifest.state


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
    if manifest.world_size > held or not all(
        fnmatch.filter(manifest.files, pattern.format(rank))
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


def convert(root: Path, tag: str) -> None:
    """Make the universal form of checkpoint `tag`, unless it exists undamaged. One rank only.

    Raises CheckpointError if that fails; an incomplete one is removed.
    """
    done = root / (UNIVERSAL + tag)
    with suppress(CheckpointError):
        if verify_checkpoint(done).tag == tag:
            return
    print(f"converting {root / tag} to a universal checkpoint for another number of ranks", flush=True)
    try:
        remove(done)
        with building(done) as staged:
            write_universal(root / tag, staged)
            paths = [path for path in staged.rglob("*") if path.is_file()]
            write_manifest(staged, hash_files(staged, paths), {"tag": tag, "world_size": 0, "state": {}})
    except Exception as error:
        raise CheckpointError(
            f"checkpoint={root / tag}: cannot be converted to a universal checkpoint for {dist.get_world_size()} ranks "
            f"({one_line(error, 300)}); start as many ranks as wrote it"
        ) from None


def restore_frozen(engine: Any, folder: Path) -> None:
    """Restore frozen parameters, which a universal checkpoint does not contain. Collective."""
    import deepspeed

    frozen = [(name, p) for name, p in engine.module.named_parameters() if not p.requires_grad]
    if not frozen:
        return
    saved = together(lambda: open_checkpoint(folder))
    for name, parameter in frozen:
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if dist.get_rank() == 0:
                pieces = [piece.float() for piece in saved[name].pieces]
                parameter.copy_(torch.cat(pieces).view(saved[name].shape))
