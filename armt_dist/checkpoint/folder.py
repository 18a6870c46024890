"""Checkpoints that are whole or absent: staged, hashed, renamed, and only then pointed to.

A checkpoint is a DeepSpeed tag folder `step_00000100` with two additions: `rank_R.safetensors` (generators of each
rank) and `manifest.json`, written last, with size and SHA-256 of every file. `latest` and `best` hold a tag's name.
`saver` writes checkpoints, `resume` loads them.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import torch.distributed as dist
from pydantic import Field

from ..config import ConfigError, Section, one_line
from ..distributed.collectives import together

MANIFEST, STAGING, UNIVERSAL = "manifest.json", "staging-", "universal-"


class CheckpointError(ConfigError):
    """A checkpoint that is missing, unfinished, damaged or of another world."""


def tag_of(step: int) -> str:
    """The folder name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def publish(root: Path, tag: str, parts: list[dict[str, dict]], state: dict) -> None:
    """Give the staged checkpoint its manifest and its name, and point `latest` at it. Rank 0 only."""
    files = {name: entry for part in parts for name, entry in part.items()}
    write_manifest(
        staging(root, tag), root / tag, files, {"tag": tag, "world_size": dist.get_world_size(), "state": state}
    )
    point_to(root, "latest", tag)


def point_to(root: Path, name: str, tag: str) -> None:
    """Let the pointer `name`, `latest` or `best`, name a checkpoint. Rank 0 only."""
    write_atomically(root / name, tag)


def write_manifest(staged: Path, folder: Path, files: dict[str, dict], facts: dict) -> None:
    """Complete the `staged` folder with a manifest of its `files` and `facts`, and rename it to `folder`."""
    write_atomically(staged / MANIFEST, json.dumps({**facts, "files": files}, indent=1))
    sync(staged)
    remove(folder)
    staged.rename(folder)
    sync(folder.parent)


def staging(root: Path, tag: str) -> Path:
    """Where a checkpoint is written until it is whole."""
    return root / (STAGING + tag)


def hash_files(folder: Path, files: Iterable[Path]) -> dict[str, dict]:
    """Size and SHA-256 of some files below `folder`, which are flushed to disk."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path, flush=True)}
        for path in files
    }


def sha256(path: Path, flush: bool = False) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


class Entry(Section):
    """A file, as it was written."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: str


class Manifest(Section):
    """What a checkpoint is made of; `state` is what `Saver.save` was given."""

    tag: str
    world_size: Annotated[int, Field(ge=0)]
    state: dict[str, dict]
    files: dict[str, Entry]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished checkpoint. Raises CheckpointError where there is none or it is damaged."""
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes(), strict=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint={folder}: no readable {MANIFEST} ({one_line(error)})") from None
    for name in manifest.files:
        # A manifest must not make us read or trust anything outside its folder.
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise CheckpointError(f"checkpoint={folder}: {MANIFEST} names {name!r}, which is outside the folder")
    return manifest


def verify_checkpoint(folder: Path, share: slice = slice(None)) -> Manifest:
    """Compare (a share of) the files with the manifest. Raises CheckpointError naming the first that differs."""
    manifest = read_manifest(folder)
    for name in sorted(manifest.files)[share]:
        entry, path = manifest.files[name], folder / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint={folder}: {name} is missing")
        if path.stat().st_size != entry.bytes:
            raise CheckpointError(f"checkpoint={folder}: {name} has {path.stat().st_size} bytes, not {entry.bytes}")
        if sha256(path) != entry.sha256:
            raise CheckpointError(f"checkpoint={folder}: {name} is damaged (SHA-256 differs)")
    return manifest


def tags(root: Path) -> list[str]:
    """Finished checkpoints, oldest first; staging folders are none."""
    return sorted(path.name for path in root.glob("step_*") if path.is_dir())


def find_newest(root: Path, report: Callable[[str], None]) -> str | None:
    """The newest undamaged checkpoint, or None where there is none at all; damaged ones are reported and passed over.

    Collective: the ranks share the hashing. Raises CheckpointError where all are damaged.
    """
    candidates = together(lambda: tags(root))
    for tag in reversed(candidates):
        share = slice(dist.get_rank(), None, dist.get_world_size())
        try:
            together(lambda tag=tag, share=share: verify_checkpoint(root / tag, share))
            return tag
        except ConfigError as error:
            report(f"passing over a damaged checkpoint: {error}")
    if candidates:
        raise CheckpointError(f"resume={root}: no undamaged checkpoint; start anew with another --out")
    return None


def prune(root: Path, keep: set[str], keep_last: int, keep_every: int | None) -> None:
    """Delete the checkpoints not in `keep`, among the newest `keep_last` or of a step that `keep_every` divides.

    Their universal forms go with them. Rank 0 only.
    """
    for tag in tags(root)[:-keep_last]:
        step = int(tag.removeprefix("step_")) if tag.removeprefix("step_").isdigit() else 0
        if tag not in keep and not (keep_every and step % keep_every == 0):
            remove(root / tag)
    for path in root.glob(UNIVERSAL + "step_*"):
        if not (root / path.name.removeprefix(UNIVERSAL)).exists():
            remove(path)


def clean(root: Path) -> None:
    """Delete what unfinished writing left behind. Rank 0 only, while nothing is being written."""
    for path in root.glob(STAGING + "*"):
        remove(path)


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
