"""Copies parameters out of a checkpoint into the files of an export while it verifies the checkpoint: one read.

Every file is hashed from its first byte to its last. What it holds of the parameters is copied, from its mapping, right
behind the part that has just been hashed: the kernel still has that in memory, however large the file is. Files are
worked on side by side.
"""

import hashlib
import math
import os
from bisect import bisect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .. import files
from ..config import one_line
from .adapters import MergedParameter, Parameter
from .folder import CheckpointError, verify_checkpoint

# Bytes that are hashed at a time, and values that are copied at a time: the memory of a thread.
WINDOW, VALUES = 2**20, 2**20


class Target(NamedTuple):
    """Where values go: the place of the first one in a file that has its full length."""

    path: Path
    offset: int  # bytes
    dtype: torch.dtype


class Copy(NamedTuple):
    """Flat values and where they go."""

    values: Tensor
    target: Target


def copy_verified(
    checkpoint: Path, addresses: dict[Path, range], wanted: Iterable[tuple[Parameter, Target]], bar: tqdm
) -> None:
    """Write parameters to their targets, and compare the checkpoint's files with its manifest.

    addresses: where its files are mapped, by `open_checkpoint`. bar: counts the bytes written. Raises CheckpointError
    if the checkpoint is damaged or cannot be read; the targets are worth nothing then. Raises OSError if one cannot be
    written.
    """
    stored, computed = list[Copy](), list[tuple[Parameter, Target]]()
    for parameter, target in wanted:
        if isinstance(parameter, MergedParameter):
            computed.append((parameter, target))
        else:
            stored += copies_of(parameter, target)
    by_file = sort_by_file(stored, addresses)
    verify_checkpoint(checkpoint, hash_file=partial(hash_and_copy, by_file, addresses, bar))
    # What no file holds as it is needed: tensors that could not be mapped flat, and merged ones, from several files.
    for copies in by_file.values():
        write(copies, bar)
    for parameter, target in computed:
        write(copies_of(parameter, target), bar)


def copies_of(parameter: Parameter, target: Target) -> Iterator[Copy]:
    """Yield the pieces of a parameter, which follow one another from its target on."""
    for piece in parameter.pieces:
        yield Copy(piece, target)
        target = target._replace(offset=target.offset + len(piece) * target.dtype.itemsize)


def sort_by_file(copies: Iterable[Copy], addresses: dict[Path, range]) -> dict[Path | None, list[Copy]]:
    """Return the copies by the file that their values are mapped from, in its order; those of no file under None."""
    paths = sorted(addresses, key=lambda path: addresses[path].start)
    starts = [addresses[path].start for path in paths]
    by_file = defaultdict[Path | None, list[Copy]](list)
    for copy in sorted(copies, key=lambda copy: copy.values.data_ptr()):
        address = copy.values.data_ptr()
        at = bisect(starts, address) - 1
        by_file[paths[at] if at >= 0 and address in addresses[paths[at]] else None].append(copy)
    return by_file


def hash_and_copy(by_file: dict[Path | None, list[Copy]], addresses: dict[Path, range], bar: tqdm, path: Path) -> str:
    """Return the SHA-256 of a file, and write what it holds of the parameters on the way. Raises as `copy_verified`."""
    with closing(HashedFile(path)) as hashed:

        def hash_past(values: Tensor) -> None:
            """Hash up to the end of some values, which is as far from that of the last ones as their addresses are."""
            hashed.hash_until(hashed.size - (addresses[path].stop - values.data_ptr() - values.nbytes))

        write(by_file.pop(path, ()), bar, hash_past)
        hashed.hash_until(math.inf)
        return hashed.digest.hexdigest()


def write(copies: Iterable[Copy], bar: tqdm, before: Callable[[Tensor], None] = lambda values: None) -> None:
    """Write values to their targets, a few at a time. before: called with them. Raises OSError."""
    for path, group in groupby(copies, key=lambda copy: copy.target.path):
        with path.open("r+b") as file:
            for values, target in group:
                file.seek(target.offset)
                for part in values.split(VALUES):
                    before(part)
                    bar.update(file.write(raw(part.to(target.dtype))))


def raw(values: Tensor) -> memoryview:
    """Return the bytes of a flat tensor without a copy."""
    return values.contiguous().view(torch.uint8).numpy().data


class HashedFile:
    """Hashes a file step by step."""

    def __init__(self, path: Path):
        """Raises CheckpointError if it cannot be opened."""
        self.path, self.digest, self.position = path, hashlib.sha256(), 0
        self.buffer = memoryview(bytearray(WINDOW))
        with self.reading():
            self.file = files.open_regular(path)
            self.size = os.fstat(self.file.fileno()).st_size

    def hash_until(self, position: float) -> None:
        """Go on to a byte or a little further, at most to the end of the file. Raises CheckpointError."""
        with self.reading():
            while self.position < position and (count := self.file.readinto(self.buffer)):
                self.digest.update(self.buffer[:count])
                self.position += count

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn an OSError into the CheckpointError that it is: OSErrors are taken for the export's."""
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"checkpoint={self.path}: cannot be read ({one_line(error)}); choose another --tag"
            ) from None

    def close(self) -> None:
        """Close the file."""
        self.file.close()
