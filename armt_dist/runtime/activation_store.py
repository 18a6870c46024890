"""Where layer inputs wait between forward and backward: on the device, or in host memory with asynchronous copies.

Keys are (block, layer). The backward pass asks for them in the reverse order of `put`, so the next key is known and its
copy is started one layer ahead.
"""

import torch
from torch import Tensor


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


class HostStore:
    """Keeps each tensor in pinned host memory; copies run on a stream of their own (None: there is no GPU)."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.kept: dict[tuple[int, int], tuple[Tensor, torch.device, torch.Event | None]] = {}
        self.fetched: dict[tuple[int, int], tuple[Tensor, torch.Event | None]] = {}
        self.stream = stream

    def put(self, key: tuple[int, int], x: Tensor) -> None:
        """Start the copy of x to host memory."""
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=self.stream is not None)
        self.kept[key] = host, x.device, self.copy(host, x)

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
        host, device, stored = self.kept.pop(key)
        if self.stream is None:
            self.fetched[key] = host, None
            return
        with torch.cuda.stream(self.stream):
            x = torch.empty(host.shape, dtype=host.dtype, device=device)
        assert stored is not None, f"{key}: a copy that ran on the stream has an event"
        self.stream.wait_event(stored)
        self.fetched[key] = x, self.copy(x, host)

    def copy(self, target: Tensor, source: Tensor) -> torch.Event | None:
        """Copy source to target on the copy stream, after the work queued so far. Returns the event of its end."""
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            for tensor in (target, source):
                if tensor.is_cuda:
                    # The allocator must not hand this memory out before the copy has ended.
                    tensor.record_stream(self.stream)
        return self.stream.record_event()


STORES: dict[bool, type[DeviceStore] | type[HostStore]] = {False: DeviceStore, True: HostStore}
"""By whether activations are offloaded to host memory."""
