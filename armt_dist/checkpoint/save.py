"""Writes checkpoints, at once or while the run goes on.

DeepSpeed collects what belongs into a checkpoint; `Writer` keeps it from writing, so that the files can be written,
flushed and hashed in one place: by the caller, or from a copy in host memory by a thread. Publishing (manifest,
rename, `latest`) is collective and done by the main threads alone: the background writes files and nothing else.
"""

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from safetensors.torch import save_file
from torch.utils._pytree import tree_map

from ..config import ConfigError, one_line
from ..distributed.collectives import device, together
from .folder import CheckpointError, hash_files, point_to, publish, remove, staging
from .rng_state import generators


class Writer(TorchCheckpointEngine):
    """Collects (content, path) instead of writing; `copy`: the contents as they are now, in host memory."""

    def __init__(self, copy: bool):
        super().__init__()
        self.copy, self.files = copy, []

    def save(self, state_dict: dict, path: str) -> None:
        content = tree_map(host_copy, state_dict, is_leaf=is_shape) if self.copy else state_dict
        self.files.append((content, Path(path)))

    def write(self, generator_states: dict, folder: Path, rank: int) -> dict[str, dict]:
        """Write and flush this rank's files; their sizes and hashes. Needs no other rank. OSError where it cannot."""
        own = folder / f"rank_{rank}.safetensors"
        try:
            save_file(generator_states, own)
            for content, path in self.files:
                torch.save(content, path)
            return hash_files(folder, [own, *(path for _, path in self.files)])
        # A full disk is a RuntimeError of torch, which does not say so, and a SafetensorError of safetensors.
        except Exception as error:
            left = shutil.disk_usage(folder).free / 2**20
            raise OSError(f"{one_line(error, 200)}; {left:.0f} MB left on the disk") from error


def is_shape(value: object) -> bool:
    """`tree_map` would turn a shape into a plain tuple."""
    return isinstance(value, torch.Size)


def host_copy(value: object) -> object:
    """A tensor as it is now, in host memory; anything else as it is."""
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


class Pending(NamedTuple):
    """A checkpoint whose files are being written."""

    tag: str
    state: dict
    best: bool  # whether it is to become `best`
    written: Future


class Saver:
    """The checkpoints of one run. All methods are collective and return the same on every rank."""

    def __init__(self, engine, root: Path, background: bool, say: Callable[[str], None]):
        """`background`: go on while files are written, at the price of a copy of the rank's state in host memory."""
        self.engine, self.root, self.background, self.say = engine, root, background, say
        self.pool = ThreadPoolExecutor(max_workers=1) if background else None
        self.pending: Pending | None = None
        # The newest checkpoint that is whole.
        self.saved: str | None = None
        # DeepSpeed's scripts run whatever a checkpoint was pickled with; launch/consolidate.py does not.
        engine._copy_recovery_script = lambda path: None

    def save(self, tag: str, state: dict, best: bool = False) -> None:
        """Write checkpoint `tag` with the JSON-serialisable `state`, unless it is there; `best`: point `best` to it.

        Waits for one that is still being written. Raises CheckpointError on all ranks where a file cannot be written;
        what was there before stays as it was. In the background that is raised by the next call of any method.
        """
        self.wait()
        if tag == self.saved:
            if best:
                together(lambda: point_to(self.root, "best", tag), only=0)
            return
        staged = staging(self.root, tag)
        try:
            together(lambda: make_anew(staged), only=0)
            written = together(lambda: self.start_writing(staged))
        except ConfigError as error:
            raise self.give_up(tag, error) from None
        self.pending = Pending(tag, state, best, written)
        if not self.background:
            self.wait()

    def start_writing(self, staged: Path) -> Future:
        """This rank's files: written now, or by the thread from a copy."""
        writer = Writer(copy=self.background)
        before, self.engine.checkpoint_engine = self.engine.checkpoint_engine, writer
        try:
            self.engine.save_checkpoint(str(self.root), tag=staged.name, client_state={}, save_latest=False)
        finally:
            self.engine.checkpoint_engine = before
        arguments = (generators(), staged, dist.get_rank())
        if self.pool is not None:
            return self.pool.submit(writer.write, *arguments)
        written = Future()
        written.set_result(writer.write(*arguments))
        return written

    def poll(self) -> None:
        """Publish what was written in the background, once all ranks have written it; does not wait for files.

        Raises CheckpointError on all ranks where a file could not be written.
        """
        if self.pending is None:
            return
        done = torch.tensor(float(self.pending.written.done()))
        done = done.to(device())
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        if done.item():
            self.wait()

    def wait(self) -> None:
        """Wait for the files and publish them. Raises CheckpointError as `poll` does."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        try:
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, together(pending.written.result))
            together(lambda: publish(self.root, pending.tag, parts, pending.state), only=0)
            if pending.best:
                together(lambda: point_to(self.root, "best", pending.tag), only=0)
        except ConfigError as error:
            raise self.give_up(pending.tag, error) from None
        self.saved = pending.tag

    def give_up(self, tag: str, error: ConfigError) -> CheckpointError:
        """Make room again, and say what happened."""
        if dist.get_rank() == 0:
            shutil.rmtree(staging(self.root, tag), ignore_errors=True)
        return CheckpointError(f"checkpoint={self.root / tag}: not written ({one_line(error, 400)})")


def make_anew(folder: Path) -> None:
    """An empty folder, whatever was there."""
    remove(folder)
    folder.mkdir(parents=True)
