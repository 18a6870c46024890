"""Writes checkpoints, either at once or in the background.

DeepSpeed collects the contents of a checkpoint, and `Writer` takes them over, so that files are written, flushed and
hashed in one place: by the caller, or from a copy in host memory by a thread. Publishing (manifest, rename, `latest`)
is collective and left to the main threads; the background thread only writes files.
"""

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from safetensors.torch import save
from torch.utils._pytree import tree_map

from ..config import ConfigError, one_line
from ..distributed.collectives import device, gather_json, together
from .deepspeed_files import leave_out_recovery_script, writing_through
from .folder import CheckpointError, hash_files, make_anew, point_to, publish, rank_file, staging
from .rng_state import generators


class Writer(TorchCheckpointEngine):
    """Collects the contents of a rank's files, and writes them later. Its base was seen in DeepSpeed 0.19.8."""

    def __init__(self, copy: bool):
        """copy: whether to copy the contents to host memory, so that the run may change them."""
        super().__init__()
        self.copy = copy
        self.files: list[tuple[Any, Path]] = []

    def save(self, state_dict: dict, path: str) -> None:
        """Collect one file; called by the engine."""
        # Python 3.11.2 pickles a member of an enum as a call of getattr, which restricted unpicklers refuse.
        content = tree_map(lambda leaf: leaf.value if isinstance(leaf, Enum) else leaf, state_dict, is_leaf=is_shape)
        if self.copy:
            content = tree_map(host_copy, content, is_leaf=is_shape)
        self.files.append((content, Path(path)))

    def write(self, tensors: dict, folder: Path, rank: int) -> dict[str, dict]:
        """Write and flush this rank's files, and return their sizes and hashes. Raises OSError. Not collective."""
        own = rank_file(folder, rank)
        try:
            # Not save_file, whose files nobody else may read, whatever the umask.
            own.write_bytes(save(tensors))
            for content, path in self.files:
                torch.save(content, path)
            return hash_files(folder, [own, *(path for _, path in self.files)])
        # For a full disk, torch raises an uninformative RuntimeError, and safetensors a SafetensorError.
        except Exception as error:
            left = shutil.disk_usage(folder).free / 2**20
            raise OSError(f"{one_line(error, 200)}; {left:.0f} MB left on the disk") from error


def is_shape(value: object) -> bool:
    """Return whether `tree_map` must leave a value alone: it would turn a shape into a plain tuple."""
    return isinstance(value, torch.Size)


def host_copy(value: object) -> object:
    """Copy a tensor to host memory; return anything else unchanged."""
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


class Pending(NamedTuple):
    """A checkpoint whose files are being written."""

    tag: str
    state: dict
    best: bool  # whether `best` will point to it
    written: Future[dict[str, dict]]


class Saver:
    """The checkpoints of one run. All methods are collective and have the same result on every rank."""

    def __init__(self, engine: Any, root: Path, background: bool, say: Callable[[str], None]):
        """background: write files in a thread, from a copy of the rank's state in host memory."""
        self.engine, self.root, self.background, self.say = engine, root, background, say
        self.pool = ThreadPoolExecutor(max_workers=1) if background else None
        self.pending: Pending | None = None
        # The newest complete checkpoint.
        self.saved: str | None = None
        leave_out_recovery_script(engine)

    def save(
        self, tag: str, state: dict, best: bool = False, tensors: Mapping[str, torch.Tensor] = MappingProxyType({})
    ) -> None:
        """Write checkpoint `tag` with the JSON-serialisable `state`, unless it exists; best: point `best` to it.

        tensors: more of this rank's, in host memory, not to be changed while they are written. Waits for a checkpoint
        that is still being written. Raises CheckpointError on all ranks if a file cannot be written, and leaves earlier
        checkpoints as they are. A failure in the background is raised by the next call of any method.
        """
        self.wait()
        if tag == self.saved:
            if best:
                together(lambda: point_to(self.root, "best", tag), only=0)
            return
        staged = staging(self.root / tag)
        try:
            together(lambda: make_anew(staged), only=0)
            written = together(lambda: self.start_writing(staged, tensors))
        except ConfigError as error:
            raise self.give_up(tag, error) from None
        self.pending = Pending(tag, state, best, written)
        if not self.background:
            self.wait()

    def start_writing(self, staged: Path, tensors: Mapping[str, torch.Tensor]) -> Future[dict[str, dict]]:
        """Write this rank's files, or let the thread write them from a copy."""
        writer = Writer(copy=self.background)
        with writing_through(self.engine, writer):
            self.engine.save_checkpoint(str(self.root), tag=staged.name, client_state={}, save_latest=False)
        arguments = ({**generators(), **tensors}, staged, dist.get_rank())
        if self.pool is not None:
            return self.pool.submit(writer.write, *arguments)
        written: Future[dict[str, dict]] = Future()
        written.set_result(writer.write(*arguments))
        return written

    def poll(self) -> None:
        """Publish the checkpoint in the background if all ranks have written their files; do not wait for them.

        Raises CheckpointError on all ranks if a file could not be written.
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
            parts = gather_json(together(pending.written.result))
            together(lambda: publish(self.root, pending.tag, parts, pending.state), only=0)
            if pending.best:
                together(lambda: point_to(self.root, "best", pending.tag), only=0)
        except ConfigError as error:
            raise self.give_up(pending.tag, error) from None
        self.saved = pending.tag

    def give_up(self, tag: str, error: ConfigError) -> CheckpointError:
        """Remove the incomplete checkpoint and return the error to raise."""
        if dist.get_rank() == 0:
            shutil.rmtree(staging(self.root / tag), ignore_errors=True)
        return CheckpointError(f"checkpoint={self.root / tag}: not written ({one_line(error, 400)})")
