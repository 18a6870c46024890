"""What a kind of memory is, and the decoder layer that owns one.

A memory is a pure function of its state: nothing in it knows segments, ranks or the order of layers.

Shapes: B batch, N positions of a segment's row, M memory tokens, D model width.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from .backbone import Context, Family
from .documents import Reset, emptied

# Cell (s, l) of segment s and layer l needs the state of (s-1, l): layer-major and wavefront orders are valid.
SAME_LAYER = "same_layer"
# Cell (s, 0) needs the output of the last layer of segment s-1: only segment-major order is valid.
LAST_LAYER = "last_layer"

# A kind's state: a NamedTuple of float32 tensors [B, ...].
StateT = TypeVar("StateT")


def is_memory(name: str) -> bool:
    """Tell whether a parameter is what ARMT adds to its base: memory rows, sinks, and each layer's memory."""
    return name.startswith("memory_tokens.") or ".memory." in name


class MemoryUpdate(Protocol[StateT]):
    """What one segment changes in a state; a NamedTuple of tensors, so that it can be kept instead of the state."""

    def onto(self, state: StateT) -> StateT:
        """Return the state after this update."""


def apply(state: StateT, update: MemoryUpdate[StateT]) -> StateT:
    """Return the state after `update`, for every kind of memory."""
    return update.onto(state)


class Memory(nn.Module, Generic[StateT]):
    """One layer's memory. The defaults are those of a kind without parameters that reads nothing."""

    arrows: ClassVar[tuple[str, ...]] = (SAME_LAYER,)
    """Earlier cells that a cell needs; they decide which schedules are valid."""

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Build one layer's memory from an `ARMTConfig`."""
        return cls()

    def reset_parameters(self) -> None:
        """Initialise the parameters so that reading an empty memory changes nothing."""

    def initial_state(self, batch: int, device: torch.device | str) -> StateT:
        """Return the empty state: zeros only, as resetting a cache and starting a backward pass write zeros."""
        raise NotImplementedError

    def open(self, context: Context, state: StateT) -> Context:
        """Return what the layer's attention sees besides its row; by default, nothing more."""
        return context

    def read(self, x: Tensor, state: StateT) -> Tensor:
        """Return the row as the layer takes it; by default, as it is. [B, N, D] -> [B, N, D]."""
        return x

    def write(self, m: Tensor, state: StateT, context: Context) -> MemoryUpdate[StateT]:
        """Return the update from the memory positions m [B, M, D] of the layer's output."""
        raise NotImplementedError


class ARMTLayer(nn.Module):
    """A decoder layer between a memory read and a memory write."""

    layer: nn.Module
    memory: Memory

    def __init__(self, layer: nn.Module, memory: Memory, num_mem_tokens: int, family: Family):
        super().__init__()
        self.layer, self.memory, self.num_mem_tokens = layer, memory, num_mem_tokens
        self.call, self.last_product = family.call, family.last_product

    def cell(self, x: Tensor, state: Any, context: Context) -> tuple[Tensor, MemoryUpdate]:
        """Run one cell: one segment through this layer. [B, N, D] -> [B, N, D] and the update of the memory."""
        y, context = self.attend(x, state, context)
        return y, self.write(self.memory_positions(y), state, context)

    def memory_positions(self, y: Tensor) -> Tensor:
        """Return the part of a cell's output that the memory's write reads. [B, N, D] -> [B, M, D]."""
        return y[:, y.shape[1] - self.num_mem_tokens :]

    def attend(self, x: Tensor, state: Any, context: Context) -> tuple[Tensor, Context]:
        """Read the memory and run the layer. [B, N, D] -> [B, N, D] and the context that the layer saw."""
        context = self.memory.open(context, state)
        read = self.memory.read(x, state)
        if context.documents is not None:
            read = torch.where(context.documents.carried[..., None], read, x)
        return self.call(self.layer, read, context), context

    def write(self, m: Tensor, state: Any, context: Context) -> MemoryUpdate:
        """Return the update from the memory positions m [B, M, D], of an empty state where a document begins."""
        if context.documents is None:
            return self.memory.write(m, state, context)
        reset = context.documents.reset
        return Reset(self.memory.write(m, emptied(state, reset), context), reset)

    def forward(self, x: Tensor, *, run: Callable) -> Any:
        """Return `run(self, x)`.

        ZeRO-3 gathers the layer's parameters around this call, so whatever covers many segments with one gather
        (segment BPTT, the wavefront) is passed in as `run`.
        """
        return run(self, x)


class MemoryKind(NamedTuple):
    """A row of `configuration_armt.MEMORIES`."""

    memory: type[Memory]
    own_fields: tuple[str, ...] = ()
    """Fields of ARMTConfig that must keep their defaults under every kind that does not list them."""
    refused_fields: tuple[str, ...] = ()
    """Fields of ARMTConfig that other kinds accept and that must keep their defaults under this one."""
    windowed: type[Memory] | None = None
    """What takes the place of `memory` where config.sliding_window is set; needs "sliding_window" in own_fields."""
    whole_window: bool = False
    """Whether every row of a segment sees the whole window and, as without one, the rows before it; else see
    `sliding_window`."""
    window_only: bool = False
    """Whether the window is all that is carried: there are no memory tokens, and by default it is a whole segment."""

    @property
    def arrows(self) -> tuple[str, ...]:
        """Earlier cells that a cell needs."""
        return self.memory.arrows
