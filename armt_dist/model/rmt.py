"""The recurrent memory of RMT: rows of hidden states that pass from the end of a segment into the next one's input.

A segment reads `[memory | tokens | memory]`. The last layer's normed output at the trailing memory rows becomes both
groups of memory rows of the next segment (RMT, arXiv 2207.06881, section 3.2). The layers themselves hold nothing, or
a sliding window.

Shapes: B batch, N positions, M memory tokens, D model width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .backbone import Context
from .memory_kind import LAST_LAYER, SAME_LAYER, Memory
from .sliding_window import WindowMemory


class MemoryRows(NamedTuple):
    """What one segment hands to the next, float32; zeros before the first."""

    rows: Tensor  # [B, M, D]
    written: Tensor  # [B] 1 after a segment was read

    @classmethod
    def empty(cls, batch: int, num_mem_tokens: int, hidden_size: int, device: torch.device | str) -> "MemoryRows":
        """Return the state before the first segment."""
        return cls(torch.zeros(batch, num_mem_tokens, hidden_size, device=device), torch.zeros(batch, device=device))

    @classmethod
    def of(cls, hidden: Tensor, num_mem_tokens: int) -> "MemoryRows":
        """Take the memory rows from the normed hidden states [B, N, D] of a segment."""
        rows = hidden[:, -num_mem_tokens:].float()
        return cls(rows, torch.ones(len(rows), device=rows.device))

    def entering(self, learned: Tensor) -> Tensor:
        """Return the memory rows of the next segment: the `learned` ones [B, M, D] in the first. [B, M, D]."""
        return torch.where(self.written[:, None, None] > 0, self.rows.to(learned.dtype), learned)


class Nothing(NamedTuple):
    """The state where none is kept, and the update that changes nothing."""

    def onto(self, state: "Nothing") -> "Nothing":
        """Return `state` unchanged."""
        return state


class RecurrentMemory(Memory[Nothing]):
    """A layer's part in RMT, which is empty: the model hands the rows on."""

    arrows = (LAST_LAYER,)

    def initial_state(self, batch: int, device: torch.device | str) -> Nothing:
        """Return the state without tensors."""
        return Nothing()

    def write(self, m: Tensor, state: Nothing, context: Context) -> Nothing:
        """Return the update that changes nothing."""
        return Nothing()


class RecurrentWindow(WindowMemory):
    """A layer's part in RMT with a sliding window: the window."""

    arrows = (LAST_LAYER, SAME_LAYER)


def entering(carried: Tensor, learned: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the memory rows before and behind a segment's tokens, each [B, M, D].

    They are the `carried` ones, but the `learned` ones where a document begins: before the tokens, if the first one
    begins it. starts [B, T], or None where none does.
    """
    if starts is None:
        return carried, carried
    first, some = starts[:, 0, None, None], starts.any(1)[:, None, None]
    return torch.where(first, learned, carried), torch.where(some, learned, carried)


def enter(x: Tensor, head: Tensor, tail: Tensor) -> Tensor:
    """Add memory rows [B, M, D] at the ends of an embedded segment [B, N, D], whose memory rows are zeros."""
    tokens = x.shape[1] - 2 * head.shape[1]
    head, tail = head.to(x.dtype), tail.to(x.dtype)
    return x + torch.cat([head, head.new_zeros(len(head), tokens, head.shape[2]), tail], dim=1)
