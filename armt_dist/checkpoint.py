"""Checkpoints that are whole or absent: staged, hashed, renamed, and only then pointed to.

A checkpoint is a DeepSpeed tag folder `step_00000100` with two additions: `rank_R.safetensors` (generators of each
rank) and `manifest.json`, written last, with size and SHA-256 of every file. `latest` and `best` hold a tag's name.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from . import parallel
from .config import ConfigError, one_line

MANIFEST, STAGING = "manifest.json", "staging-"


class CheckpointError(ConfigError):
    """A checkpoint that is missing, unfinished, damaged or of another world."""


def tag_of(step: int) -> str:
    """The folder name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def save(engine, root: Path, tag: str, state: dict) -> None:
    """Write checkpoint `tag` under `root`; `state` is JSON-serialisable. Collective.

    Raises CheckpointError on all ranks where a file cannot be written; what was there before stays as it was.
    """
    staging = root / (STAGING + tag)
    rank = dist.get_rank()

    def write_own() -> None:
        save_file(generators(), staging / f"rank_{rank}.safetensors")

    def finish(hashes: list[dict]) -> None:
        files = {name: entry for part in hashes for name, entry in part.items()}
        manifest = {"tag": tag, "world_size": dist.get_world_size(), "state": state, "files": files}
        write_atomically(staging / MANIFEST, json.dumps(manifest, indent=1))
        sync(staging)
        remove(root / tag)
        staging.rename(root / tag)
        sync(root)
        write_atomically(root / "latest", tag)

    try:
        parallel.together(lambda: remove(staging), only=0)
        parallel.together(
            lambda: engine.save_checkpoint(str(root), tag=staging.name, client_state={}, save_latest=False)
        )
        parallel.together(write_own)
        hashes = [None] * dist.get_world_size()
        dist.all_gather_object(hashes, parallel.together(lambda: hash_share(staging)))
        parallel.together(lambda: finish(hashes), only=0)
    except ConfigError as error:
        raise CheckpointError(f"checkpoint={root / tag}: not written ({one_line(error, 400)})") from None


def hash_share(folder: Path) -> dict[str, dict]:
    """Size and SHA-256 of this rank's share of the files, which are flushed to disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest(path, flush=True)}
        for path in files[dist.get_rank() :: dist.get_world_size()]
    }


def digest(path: Path, flush: bool = False) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict:
    """The manifest of a finished checkpoint. Raises CheckpointError where there is none or it is damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        names = list(manifest["files"])
        int(manifest["world_size"]), dict(manifest["state"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint={folder}: no readable {MANIFEST} ({one_line(error)})") from None
    for name in names:
        # A manifest must not make us read or trust anything outside its folder.
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"checkpoint={folder}: {MANIFEST} names {name!r}, which is outside the folder")
    return manifest


def verify(folder: Path, share: slice = slice(None)) -> dict:
    """Compare (a share of) the files with the manifest. Raises CheckpointError naming the first that differs."""
    manifest = read_manifest(folder)
    for name in sorted(manifest["files"])[share]:
        entry, path = manifest["files"][name], folder / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint={folder}: {name} is missing")
        if path.stat().st_size != entry.get("bytes"):
            raise CheckpointError(f"checkpoint={folder}: {name} has {path.stat().st_size} bytes, not {entry['bytes']}")
        if digest(path) != entry.get("sha256"):
            raise CheckpointError(f"checkpoint={folder}: {name} is damaged (SHA-256 differs)")
    return manifest


def tags(root: Path) -> list[str]:
    """Finished checkpoints, oldest first; staging folders are none."""
    return sorted(path.name for path in root.glob("step_*") if path.is_dir())


def find(root: Path, report: Callable[[str], None]) -> str | None:
    """The newest undamaged checkpoint, or None where there is none at all; damaged ones are reported and passed over.

    Collective: the ranks share the hashing. Raises CheckpointError where all are damaged.
    """
    candidates = parallel.together(lambda: tags(root))
    for tag in reversed(candidates):
        share = slice(dist.get_rank(), None, dist.get_world_size())
        try:
            parallel.together(lambda tag=tag, share=share: verify(root / tag, share))
            return tag
        except ConfigError as error:
            report(f"passing over a damaged checkpoint: {error}")
    if candidates:
        raise CheckpointError(f"resume={root}: no undamaged checkpoint; start anew with another --out")
    return None


def load(engine, root: Path, tag: str) -> dict:
    """Restore engine and generators from a verified checkpoint; returns the state given to `save`. Collective."""
    manifest = parallel.together(lambda: read_manifest(root / tag))
    if manifest["world_size"] != dist.get_world_size():
        raise CheckpointError(
            f"world_size={dist.get_world_size()}: checkpoint {root / tag} was written by {manifest['world_size']} "
            f"ranks; start {manifest['world_size']} ranks"
        )

    def restore() -> None:
        path, _ = engine.load_checkpoint(str(root), tag=tag)
        if path is None:
            raise CheckpointError(f"checkpoint={root / tag}: DeepSpeed found nothing to load in it")
        set_generators(load_file(root / tag / f"rank_{dist.get_rank()}.safetensors"))

    parallel.together(restore)
    return manifest["state"]


def prune(root: Path, keep_last: int, keep: set[str]) -> None:
    """Delete all but the newest `keep_last` checkpoints and those in `keep`, and staging folders. Rank 0 only."""
    for tag in tags(root)[:-keep_last]:
        if tag not in keep:
            remove(root / tag)
    for path in root.glob(STAGING + "*"):
        remove(path)


def generators() -> dict[str, torch.Tensor]:
    """Every random generator of this process."""
    numpy_state = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "numpy_keys": torch.from_numpy(numpy_state[1].astype(np.int64)),
        "numpy_rest": torch.tensor([numpy_state[2], numpy_state[3], numpy_state[4]], dtype=torch.float64),
        "python": torch.tensor(random.getstate()[1], dtype=torch.int64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_generators(states: dict[str, torch.Tensor]) -> None:
    """The inverse of `generators`."""
    torch.set_rng_state(states["torch"])
    position, has_gauss, gauss = states["numpy_rest"].tolist()
    np.random.set_state(
        ("MT19937", states["numpy_keys"].numpy().astype(np.uint32), int(position), int(has_gauss), gauss)
    )
    random.setstate((3, tuple(states["python"].tolist()), None))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old file or the new one."""
    staged = path.with_name(f".{path.name}.tmp")
    with staged.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)
    sync(path.parent)


def sync(folder: Path) -> None:
    """Make renames in `folder` durable, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(folder: Path) -> None:
    """Delete a folder, if it is there; renamed first, so that a half-deleted one is not taken for a checkpoint."""
    if folder.exists():
        doomed = folder if folder.name.startswith(STAGING) else folder.rename(folder.with_name(STAGING + folder.name))
        shutil.rmtree(doomed)
