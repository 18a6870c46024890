"""The recurrent memory of RMT: rows of hidden states that pass from the end of a segment into the next one's input.

A segment reads `[memory | tokens | memory]`. The last layer's normed output at the trailing memory rows becomes both
groups of memory rows of the next segment (RMT, arXiv 2207.06881, section 3.2). The layers themselves hold nothing.

Shapes: B batch, N positions, M memory tokens, D model width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .backbone import Context
from .memory_kind import LAST_LAYER, Memory


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
    """The state of a layer that keeps none, and the update that changes nothing."""

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


def enter(x: Tensor, rows: Tensor) -> Tensor:
    """Add memory rows [B, M, D] at both ends of an embedded segment [B, N, D], whose memory rows are zeros."""
    tokens = x.shape[1] - 2 * rows.shape[1]
    rows = rows.to(x.dtype)
    return x + torch.cat([rows, rows.new_zeros(len(rows), tokens, rows.shape[2]), rows], dim=1)
