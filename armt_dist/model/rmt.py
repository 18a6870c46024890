"""The recurrent memory of RMT: rows of hidden states that pass from the end of a segment into the next one's input.

A segment reads `[memory | tokens | memory]`; what the last layer, normed, makes of the trailing memory rows are both
memory rows of the next segment (RMT, arXiv 2207.06881, section 3.2). The layers hold nothing of their own.

Shapes: B batch, N positions, M memory tokens, D model width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

# (s, 0) needs (s-1, L-1): only segment-major order is valid.
LAST_LAYER = "last_layer"


class MemoryRows(NamedTuple):
    """What one segment hands to the next, float32; zeros before the first."""

    rows: Tensor  # [B, M, D]
    written: Tensor  # [B] 1 after a segment was read

    @classmethod
    def empty(cls, batch: int, num_mem_tokens: int, hidden_size: int, device: torch.device | str) -> "MemoryRows":
        """Nothing read yet."""
        return cls(torch.zeros(batch, num_mem_tokens, hidden_size, device=device), torch.zeros(batch, device=device))

    @classmethod
    def of(cls, hidden: Tensor, num_mem_tokens: int) -> "MemoryRows":
        """From the normed hidden states [B, N, D] of a segment."""
        rows = hidden[:, -num_mem_tokens:].float()
        return cls(rows, torch.ones(len(rows), device=rows.device))

    def entering(self, learned: Tensor) -> Tensor:
        """The memory rows of the next segment; the `learned` ones [B, M, D] in the first. [B, M, D]."""
        return torch.where(self.written[:, None, None] > 0, self.rows.to(learned.dtype), learned)


class Nothing(NamedTuple):
    """The state of a layer that holds none, and the update that changes none."""

    def onto(self, state: tuple) -> tuple:
        """`state`."""
        return state


class RecurrentMemory(nn.Module):
    """A layer's part in RMT: none. The model hands the rows on."""

    arrows = (LAST_LAYER,)

    @classmethod
    def from_config(cls, config) -> "RecurrentMemory":
        """No field of the configuration concerns a layer."""
        return cls()

    def reset_parameters(self) -> None:
        """There are none."""

    def initial_state(self, batch: int, device: torch.device | str) -> Nothing:
        """Nothing."""
        return Nothing()

    def open(self, context, state: tuple):
        """`context`."""
        return context

    def read(self, x: Tensor, state: tuple) -> Tensor:
        """`x`."""
        return x

    def write(self, m: Tensor, state: tuple, context) -> Nothing:
        """Nothing."""
        return Nothing()


def enter(x: Tensor, rows: Tensor) -> Tensor:
    """Put memory rows [B, M, D] at both ends of an embedded segment [B, N, D] whose own are zeros."""
    tokens = x.shape[1] - 2 * rows.shape[1]
    rows = rows.to(x.dtype)
    return x + torch.cat([rows, rows.new_zeros(len(rows), tokens, rows.shape[2]), rows], dim=1)
