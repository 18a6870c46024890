"""Checkpoint folders that are complete or absent: staged, hashed, renamed, and only then pointed to.

A checkpoint is a DeepSpeed tag folder `step_00000100` with two additions: `rank_R.safetensors` (random generators of
each rank, and memory states that pass on to the next step) and `manifest.json`, written last, with size and SHA-256 of
every file. `latest` and `best` hold a tag.
`save` writes checkpoints, `load` restores them.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import torch.distributed as dist
from pydantic import Field

from .. import files
from ..config import ConfigError, Section, one_line
from ..distributed.collectives import together

MANIFEST, STAGING = "manifest.json", "staging-"
# What `tag_of` returns, and the only names of checkpoints that are taken from an argument or a file.
TAG = r"^step_[0-9]{8,12}$"
# Files that are loaded, and so must be in the manifest.
LOADED = (".pt", ".safetensors")
# That hash at a time: more than storage can feed.
THREADS = 16


class CheckpointError(ConfigError):
    """A checkpoint is missing, incomplete, damaged, or does not fit this run."""


def tag_of(step: int) -> str:
    """Return the folder name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def rank_file(folder: Path, rank: int) -> Path:
    """Return the path of a rank's own file."""
    return folder / f"rank_{rank}.safetensors"


def publish(root: Path, tag: str, parts: list[dict[str, dict]], state: dict) -> None:
    """Complete the staged checkpoint with its manifest and its name, and point `latest` to it. Rank 0 only.

    parts: `hash_files` of each rank's files.
    """
    staged = staging(root / tag)
    entries = {name: entry for part in parts for name, entry in part.items()}
    write_manifest(staged, entries, {"tag": tag, "world_size": dist.get_world_size(), "state": state})
    # One of the same step, of a run that now goes on from an older checkpoint.
    remove(root / tag)
    take_name(staged, root / tag)
    point_to(root, "latest", tag)


def point_to(root: Path, name: str, tag: str) -> None:
    """Point `name`, `latest` or `best`, to a checkpoint. Rank 0 only."""
    files.write_atomically(root / name, tag)


def write_manifest(folder: Path, entries: dict[str, dict], facts: dict) -> None:
    """Write the manifest of the files in `folder`, by `hash_files`; facts: the other fields of Manifest."""
    files.write_atomically(folder / MANIFEST, json.dumps({**facts, "files": entries}, indent=1))


def staging(path: Path) -> Path:
    """Return the folder in which `path` is written until it is complete."""
    return path.with_name(STAGING + path.name)


@contextmanager
def building(path: Path) -> Iterator[Path]:
    """Yield a new folder that takes the name `path` at the end of the block, or is removed if the block fails.

    Raises OSError if the folder cannot be made, or if `path` is in use by then: an empty folder is replaced.
    """
    staged = staging(path.absolute())
    staged = staged.with_name(f"{staged.name}.{uuid.uuid4().hex[:8]}")
    try:
        staged.mkdir(parents=True)
        yield staged
        take_name(staged, path.absolute())
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def take_name(staged: Path, path: Path) -> None:
    """Rename a staged folder, durably."""
    files.sync(staged)
    staged.rename(path)
    files.sync(path.parent)


def make_anew(folder: Path) -> None:
    """Make an empty folder, and delete the one that is there."""
    remove(folder)
    folder.mkdir(parents=True)


def hash_files(folder: Path, paths: Iterable[Path]) -> dict[str, dict]:
    """Flush files below `folder` to disk and return their sizes and SHA-256, as in a manifest."""
    paths = list(paths)
    hashes = hash_in_threads(paths, partial(sha256, flush=True))
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": found}
        for path, found in zip(paths, hashes, strict=True)
    }


def hash_in_threads(paths: Sequence[Path], hash_file: Callable[[Path], str]) -> Iterator[str]:
    """Yield the SHA-256 of each file, in order; hashlib lets other threads run meanwhile. Raises what they raise."""
    with ThreadPoolExecutor(max_workers=min(THREADS, len(os.sched_getaffinity(0)))) as pool:
        try:
            yield from pool.map(hash_file, paths)
        finally:
            # Whoever has seen one damaged file does not wait for all others.
            pool.shutdown(cancel_futures=True)


def sha256(path: Path, flush: bool = False) -> str:
    """Return the SHA-256 of a file."""
    with files.open_regular(path) as file:
        if flush:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


class Entry(Section):
    """Size and hash of a file when it was written."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: str


class Manifest(Section):
    """The files of a checkpoint, and the `state` passed to `Saver.save`."""

    tag: str
    world_size: Annotated[int, Field(ge=0)]
    state: dict[str, dict]
    files: dict[str, Entry]


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a complete checkpoint. Raises CheckpointError if it is missing or damaged."""
    try:
        manifest = Manifest.model_validate(files.read_json(folder / MANIFEST), strict=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint={folder}: no readable {MANIFEST} ({one_line(error)})") from None
    for name in manifest.files:
        # A manifest must not refer to files outside its folder.
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise CheckpointError(f"checkpoint={folder}: {MANIFEST} names {name!r}, which is outside the folder")
    return manifest


def verify_checkpoint(folder: Path, share: slice = slice(None), hash_file: Callable[[Path], str] = sha256) -> Manifest:
    """Compare the files, or a share of them, with the manifest. Raises CheckpointError naming the first difference.

    hash_file: returns the SHA-256 of a file, having read all of it; called by several threads.
    """
    manifest = check_files(folder, share)
    names = sorted(manifest.files)[share]
    for name, found in zip(names, hash_in_threads([folder / name for name in names], hash_file), strict=True):
        if found != manifest.files[name].sha256:
            raise CheckpointError(f"checkpoint={folder}: {name} is damaged (SHA-256 differs)")
    return manifest


def check_files(folder: Path, share: slice = slice(None)) -> Manifest:
    """Compare names and sizes of the files, or of a share of them, with the manifest. Raises CheckpointError."""
    manifest = read_manifest(folder)
    check_listed(folder, manifest)
    for name in sorted(manifest.files)[share]:
        entry, path = manifest.files[name], folder / name
        if not path.exists():
            raise CheckpointError(f"checkpoint={folder}: {name} is missing")
        if not path.is_file():
            raise CheckpointError(f"checkpoint={folder}: {name} is not a regular file")
        if path.stat().st_size != entry.bytes:
            raise CheckpointError(f"checkpoint={folder}: {name} has {path.stat().st_size} bytes, not {entry.bytes}")
    return manifest


def check_listed(folder: Path, manifest: Manifest) -> None:
    """Check that the manifest has every file that is loaded, and that none is a link. Raises CheckpointError."""
    if not manifest.files:
        raise CheckpointError(f"checkpoint={folder}: {MANIFEST} lists no files")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise CheckpointError(f"checkpoint={folder}: {name} is a symbolic link; put a copy of the file there")
        if path.suffix in LOADED and name not in manifest.files and not path.is_dir():
            raise CheckpointError(f"checkpoint={folder}: {name} is not in {MANIFEST}; remove it")


def verify_together(folder: Path) -> None:
    """Verify a checkpoint; the ranks share the hashing. Collective. Raises CheckpointError on all ranks."""
    share = slice(dist.get_rank(), None, dist.get_world_size())
    together(partial(verify_checkpoint, folder, share))


def is_tag(name: str) -> bool:
    """Return whether a name is that of a checkpoint in this run, and not a path."""
    return re.fullmatch(TAG, name) is not None


def find_tag(root: Path, name: str) -> str:
    """Return the checkpoint of this name, or to which `latest` or `best` points. Raises CheckpointError."""
    tag = read_pointer(root, name) if name in ("latest", "best") else name
    if not is_tag(tag):
        raise CheckpointError(f"resume={one_line(name)}: no checkpoint's name; for example step_00000100")
    if not (root / tag).is_dir():
        known = ", ".join(tags(root)) or "none"
        raise CheckpointError(f"resume={name}: there is no {tag} in {root}; there are: {known}")
    return tag


def read_pointer(root: Path, name: str) -> str:
    """Return the tag in `latest` or `best`. Raises CheckpointError if it holds anything else."""
    try:
        tag = files.read_text(root / name, most=100).strip()
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint={root / name}: not readable ({one_line(error)}); name a checkpoint"
        ) from None
    if not is_tag(tag):
        raise CheckpointError(f"checkpoint={root / name}: holds {tag!r}, no checkpoint's name; name a checkpoint")
    return tag


def tags(root: Path) -> list[str]:
    """List the complete checkpoints, oldest first."""
    return sorted(path.name for path in root.glob("step_*") if is_tag(path.name) and path.is_dir())


def find_newest(root: Path, report: Callable[[str], None]) -> str | None:
    """Return the newest undamaged checkpoint; None if there is no checkpoint. Damaged ones are reported and skipped.

    Collective: the ranks share the hashing. Raises CheckpointError if all are damaged.
    """
    candidates = together(lambda: tags(root))
    for tag in reversed(candidates):
        try:
            verify_together(root / tag)
            return tag
        except ConfigError as error:
            report(f"skipping a damaged checkpoint: {error}")
    if candidates:
        raise CheckpointError(f"resume={root}: all checkpoints are damaged; start a new run with another --out")
    return None


def prune(root: Path, keep: set[str], keep_last: int, keep_every: int | None) -> None:
    """Delete old checkpoints. Rank 0 only.

    Kept are those in `keep`, the newest `keep_last`, and those of every `keep_every`-th step.
    """
    for tag in tags(root)[:-keep_last]:
        if tag not in keep and not (keep_every and int(tag.removeprefix("step_")) % keep_every == 0):
            remove(root / tag)


def clean(root: Path) -> None:
    """Delete folders of interrupted saves. Rank 0 only, while nothing is being written."""
    for path in root.glob(STAGING + "*"):
        remove(path)


def remove(folder: Path) -> None:
    """Delete a folder if it exists; it is renamed first, so that a half-deleted one never passes for a checkpoint."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        # Not ours, and in the way.
        folder.unlink()
    elif folder.exists():
        if not folder.name.startswith(STAGING):
            # Not `staging(folder)`, where its successor may wait for the name.
            folder = folder.rename(f"{staging(folder)}.{uuid.uuid4().hex[:8]}")
        shutil.rmtree(folder)
