"""Graphs of cells that are kept from the forward to the backward pass, which need not be run again.

How many fit is counted in bytes of the tensors that autograd saves for a cell. Parameters are not among them: ZeRO-3
releases a layer after its forward pass, so a kept graph refers to the layer's parameters and finds their values again
when the layer is gathered for its backward pass.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..schedule.kept_cells import Keep

NOTHING = Keep()


class KeptGraphs:
    """The cells of one pass whose graphs are kept: the last segments of each unit of work, evenly over all units.

    A step is as slow as its slowest unit, so none has more to run again than another.
    """

    def __init__(self, keep: Keep, cells: int, known: dict[Any, int]):
        """cells: of the pass, those that run backward. `known`: bytes of a cell's graph by what they depend on."""
        self.keep, self.cells, self.known = keep, cells, known
        self.share = keep.share
        self.seen = self.kept = 0

    def take(self, segments: int, cell: Any, measure: Callable[[], int]) -> int:
        """Return how many of the next unit's segments are kept.

        cell: what the size of its graphs depends on; `measure` is called where that size is not known yet.
        """
        if not self.keep.share or not self.keep.bytes:
            return 0
        if math.isfinite(self.keep.bytes):
            if cell not in self.known:
                self.known[cell] = measure()
            self.share = min(self.keep.share, self.keep.bytes / (self.cells * max(self.known[cell], 1)))
        self.seen += segments
        # A share such as 1/3 must not lose a cell to rounding.
        due = math.floor(self.share * self.seen + 1e-6) - self.kept
        taken = min(max(due, 0), segments)
        self.kept += taken
        return taken

    @property
    def kept_share(self) -> float:
        """Share of the pass's cells that were kept."""
        return self.kept / max(1, self.cells)


@contextmanager
def without_parameters(layer: nn.Module) -> Iterator[None]:
    """Let graphs made in the block hold no storage of the layer's parameters, but find them again when they are used.

    Does nothing where nobody releases the parameters: they are not ZeRO-3's.
    """
    parameters = list(layer.parameters())
    if not any(hasattr(p, "ds_id") for p in parameters):
        yield
        return
    at = [(p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), p) for p in parameters]
    storages = {p.untyped_storage().data_ptr() for p in parameters}

    def pack(tensor: Tensor) -> Any:
        if tensor.untyped_storage().data_ptr() not in storages:
            return tensor
        # ZeRO-3 gathers the parameters of a layer into one storage.
        found = next((p for start, end, p in at if start <= tensor.data_ptr() < end), None)
        if found is None:
            return tensor
        offset = tensor.storage_offset() - found.storage_offset()
        return found, tensor.shape, tensor.stride(), offset

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        parameter, shape, stride, offset = packed
        return parameter.data.as_strided(shape, stride, parameter.storage_offset() + offset)

    with saved_tensors_hooks(pack, unpack):
        yield


def graph_bytes(make: Callable[[], Any], outside: Sequence[Tensor]) -> int:
    """Return the bytes that the graph made by `make` holds beside `outside`, whatever of a storage it refers to."""
    known = {t.untyped_storage().data_ptr() for t in outside}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        made = make()
    # Alive until here, so that no two storages have been at one address.
    del made
    return sum(held.values())
