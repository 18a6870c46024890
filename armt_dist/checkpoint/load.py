"""Going on from a checkpoint, on as many ranks as there are now.

At the world size that wrote it DeepSpeed's files are loaded as they are, bit for bit. For any other they are turned
into DeepSpeed's universal checkpoint first, one file per parameter and optimizer moment; the result is kept beside the
checkpoint as `universal-step_N` and used again. Files are read by torch's restricted unpickler only.
"""

import contextlib
import io
import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from ..config import one_line
from ..distributed.collectives import together
from . import zero_shards
from .folder import (
    UNIVERSAL,
    CheckpointError,
    hash_files,
    read_manifest,
    remove,
    staging,
    verify_checkpoint,
    write_manifest,
)
from .rng_state import set_generators


def load_checkpoint(engine, root: Path, tag: str) -> dict:
    """Restore engine and generators from a verified checkpoint; returns the state given to `save`. Collective.

    Raises CheckpointError on all ranks where it cannot be loaded.
    """
    manifest = together(lambda: read_manifest(root / tag))
    together(lambda: check_trust(root / tag))
    elastic = manifest.world_size != dist.get_world_size()
    if elastic:
        together(lambda: convert(root, tag), only=0)

    def restore() -> None:
        with restricted_unpickling(), universal(engine, elastic):
            path, _ = engine.load_checkpoint(str(root), tag=UNIVERSAL + tag if elastic else tag)
        if path is None:
            raise CheckpointError(f"checkpoint={root / tag}: DeepSpeed found nothing to load in it")
        # A rank that the checkpoint did not have keeps the generators of a fresh start.
        own = root / tag / f"rank_{dist.get_rank()}.safetensors"
        if own.exists():
            set_generators(load_file(own))

    together(restore)
    if elastic:
        restore_frozen(engine, root / tag)
    return manifest.state


def check_trust(folder: Path) -> None:
    """Whether this rank's share of the pickled files holds tensors and plain values alone; tensors are not read.

    Before DeepSpeed loads them, since a rank that fails within leaves the others waiting. Raises CheckpointError.
    """
    for path in sorted(folder.glob("*.pt"))[dist.get_rank() :: dist.get_world_size()]:
        try:
            with restricted_unpickling():
                torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"checkpoint={path}: holds more than tensors and plain values, or is damaged "
                f"({one_line(error, 200)}); use another checkpoint"
            ) from None


def convert(root: Path, tag: str) -> None:
    """Make the universal form of checkpoint `tag`, unless it is there, undamaged. One rank only.

    Raises CheckpointError where it cannot be made; nothing half-made is left under its name.
    """
    from deepspeed.checkpoint import ds_to_universal

    done = root / (UNIVERSAL + tag)
    with contextlib.suppress(CheckpointError):
        verify_checkpoint(done)
        return
    staged = staging(root, UNIVERSAL + tag)
    remove(staged)
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False}
    arguments = Namespace(
        input_folder=str(root / tag), output_folder=str(staged), strict=True, inject_missing_state=False, **options
    )
    print(f"{root / tag} is turned into a universal checkpoint for another number of ranks", flush=True)
    try:
        # It reports on standard output and by progress bars.
        silent = io.StringIO()
        with restricted_unpickling(), contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            ds_to_universal.main(arguments)
        # Its pointer; ours is the name.
        (root / "latest_universal").unlink(missing_ok=True)
        remove(done)
        files = [path for path in staged.rglob("*") if path.is_file()]
        write_manifest(staged, done, hash_files(staged, files), {"tag": tag, "world_size": 0, "state": {}})
    except Exception as error:
        remove(staged)
        raise CheckpointError(
            f"checkpoint={root / tag}: cannot be turned into a universal one for {dist.get_world_size()} ranks "
            f"({one_line(error, 300)}); start as many ranks as wrote it"
        ) from None


def restore_frozen(engine, folder: Path) -> None:
    """Parameters without an optimizer state, which a universal checkpoint does not bring back. Collective."""
    import deepspeed

    frozen = [(name, p) for name, p in engine.module.named_parameters() if not p.requires_grad]
    if not frozen:
        return
    saved = together(lambda: zero_shards.open_checkpoint(folder))
    for name, parameter in frozen:
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if dist.get_rank() == 0:
                pieces = [piece.float() for piece in saved[name].pieces]
                parameter.copy_(torch.cat(pieces).view(saved[name].shape))


@contextlib.contextmanager
def universal(engine, elastic: bool) -> Iterator[None]:
    """Let the engine take a tag for a universal checkpoint while this lasts."""
    config = engine._config
    before, config.load_universal_checkpoint = config.load_universal_checkpoint, elastic
    try:
        yield
    finally:
        config.load_universal_checkpoint = before


@contextlib.contextmanager
def restricted_unpickling() -> Iterator[None]:
    """DeepSpeed asks torch to run whatever a file was pickled with; torch refuses while this lasts."""
    from deepspeed.runtime.fp16 import loss_scaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    known = [ZeroStageEnum, loss_scaler.LossScaler, loss_scaler.DynamicLossScaler]
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(known):
            yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})
