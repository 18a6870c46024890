"""Where layer inputs wait between forward and backward: on the device, or in host memory with asynchronous copies.

Keys are (block, layer). The backward pass asks for them in the reverse order of `put`, so the next key is known and its
copy is started one layer ahead.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

# Of pinned memory at a time: torch rounds each allocation up to a power of two, which for a layer's input of a million
# tokens would be up to twice its size (measured: 16 of 4.4 GB did not fit in 128 GB).
PIECE_BYTES = 2**26


class DeviceStore:
    """Keeps each tensor where it is."""

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self.kept: dict[tuple[int, int], Tensor] = {}

    def put(self, key: tuple[int, int], x: Tensor) -> None:
        """Keep x until `take`."""
        self.kept[key] = x

    def take(self, key: tuple[int, int]) -> Tensor:
        """Return the tensor and keep it no longer."""
        return self.kept.pop(key)


class Stored(NamedTuple):
    """A tensor in host memory."""

    pieces: list[Tensor]  # flat
    like: Tensor  # of its shape and dtype, without content
    device: torch.device
    done: torch.Event | None  # when it has arrived; None: at once


class HostStore:
    """Keeps each tensor in pinned host memory; copies run on a stream of their own (None: there is no GPU)."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.kept: dict[tuple[int, int], Stored] = {}
        self.fetched: dict[tuple[int, int], tuple[Tensor, torch.Event | None]] = {}
        self.stream = stream

    def put(self, key: tuple[int, int], x: Tensor) -> None:
        """Start the copy of x to host memory."""
        pieces = pieces_of(x)
        host = [torch.empty(len(piece), dtype=x.dtype, pin_memory=self.stream is not None) for piece in pieces]
        self.kept[key] = Stored(host, torch.empty_like(x, device="meta"), x.device, self.copy(host, pieces))

    def take(self, key: tuple[int, int]) -> Tensor:
        """Return x on its device, and start the copy of the tensor that was put before it."""
        if key not in self.fetched:
            self.fetch(key)
        x, done = self.fetched.pop(key)
        if done is not None:
            torch.cuda.current_stream().wait_event(done)
            # Allocated for the copy stream, used on this one.
            x.record_stream(torch.cuda.current_stream())
        if self.kept:
            self.fetch(next(reversed(self.kept)))
        return x

    def fetch(self, key: tuple[int, int]) -> None:
        """Start the copy back to the device."""
        stored = self.kept.pop(key)
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            x = torch.empty(stored.like.shape, dtype=stored.like.dtype, device=stored.device)
        if self.stream is not None:
            assert stored.done is not None, f"{key}: a copy that ran on the stream has an event"
            self.stream.wait_event(stored.done)
        self.fetched[key] = x, self.copy(pieces_of(x), stored.pieces)

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> torch.Event | None:
        """Copy on the copy stream, after the work queued so far. Returns the event of its end; None: at once."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
                for tensor in (target, source):
                    if tensor.is_cuda and self.stream is not None:
                        # The allocator must not hand this memory out before the copy has ended.
                        tensor.record_stream(self.stream)
        return None if self.stream is None else self.stream.record_event()


def pieces_of(x: Tensor) -> tuple[Tensor, ...]:
    """Return x in flat pieces of at most PIECE_BYTES."""
    return x.reshape(-1).split(PIECE_BYTES // x.element_size())


STORES: dict[bool, type[DeviceStore] | type[HostStore]] = {False: DeviceStore, True: HostStore}
"""By whether activations are offloaded to host memory."""
