"""Tokens that are made once and kept: one process tokenises, and all others that need the same tokens wait for it.

A store lies below its key, a hash of texts, tokenizer and options, so that other ones are never mistaken for it. It is
written into a folder beside it and renamed when it is whole. A lock keeps others from doing the same work; where a file
system has none that holds between machines, several do it, and the last ones use what the first one made.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from huggingface_hub import constants

from ...config import ConfigError, one_line
from .token_store import TOKENS, TokenStore, open_store

# Seconds between two looks at what another process has written.
POLL_S = 1.0
# Seconds without a sign of life after which the process that tokenises is given up.
STALLED_S = 600.0

Progress = Callable[[str], None]
Make = Callable[[Path], None]


def cached(
    folder: str | None, identity: Any, make: Make, progress: Progress, field: str = "data.text.cache"
) -> TokenStore:
    """Return the store of `identity` below `folder`, which `make` writes into an empty folder if there is none yet.

    folder: None: in the cache of huggingface_hub. identity: JSON. progress: called with a line while this process, or
    the one that it waits for, gets on. field: what messages call the folder. Raises ConfigError, also where the disk is
    full.
    """
    root = Path(folder).expanduser() if folder else Path(constants.HF_ASSETS_CACHE, "armt_dist", "text")
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    try:
        root.mkdir(parents=True, exist_ok=True)
        wait_for(root / key, make, progress, field)
        return open_store(root / key, field)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise ConfigError(
            f"{field}={root}: tokens cannot be kept there ({reason}); make room, or set another folder"
        ) from None


def wait_for(target: Path, make: Make, progress: Progress, field: str) -> None:
    """Return once the folder `target` exists, made by this process or another one. Raises ConfigError and OSError."""
    lock = FileLock(target.with_suffix(".lock"), poll_interval=POLL_S / 4)
    before, since = -1, time.monotonic()
    while not target.is_dir():
        try:
            with lock.acquire(timeout=POLL_S):
                if not target.is_dir():
                    build(target, make)
        except Timeout:
            size = written(target)
            if size != before:
                before, since = size, time.monotonic()
                progress(f"another process tokenises the texts: {size / 1e6:,.0f} MB of tokens so far")
            elif time.monotonic() - since > STALLED_S:
                raise ConfigError(
                    f"{field}={target.parent}: the process that holds {lock.lock_file} has written nothing for "
                    f"{STALLED_S:.0f} s; end it, or set another folder"
                ) from None


def build(target: Path, make: Make) -> None:
    """Make the folder `target` as a whole, unless another process has made it meanwhile."""
    staging = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        now = staging.stat().st_mtime
        for left in stagings(target):
            # Of a process that was killed. Both times are those of the file system.
            if now - last_change(left) > STALLED_S:
                shutil.rmtree(left, ignore_errors=True)
        make(staging)
        # mkdtemp lets only this user in.
        staging.chmod(target.parent.stat().st_mode & 0o777)
        try:
            os.rename(staging, target)
        except OSError:
            # Another process made it meanwhile, where locks do not hold between machines.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def stagings(target: Path) -> list[Path]:
    """Return the folders in which `target` is being made."""
    return [path for path in target.parent.glob(f"{target.name}.*") if path.is_dir()]


def last_change(folder: Path) -> float:
    """Return when something in a folder was written last, in seconds of its file system."""
    with suppress(FileNotFoundError):
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    return float("inf")


def written(target: Path) -> int:
    """Return the bytes of tokens that processes have written for `target` so far."""
    total = 0
    for folder in stagings(target):
        with suppress(OSError):
            total += (folder / TOKENS).stat().st_size
    return total
