"""A sliding window for ARMT: the last keys and values of a segment stay visible in the next one, as part of the state.

They pass from segment to segment of the same layer like A and z, so they are handed from rank to rank and
back-propagated the same way. A token sees the W tokens before it across the border; memory tokens see all that there
is, one another too; sinks see nothing of it. The first segment meets an empty window, masked: the work of a cell does
not depend on where it is in the sequence.

Shapes: B batch, N positions of a row `[sink | tokens | memory]`, T tokens, W rows of the window, h key-value heads,
        c channels a head.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .memory import AssociativeMemory, State, Update

# Where a row of a segment starts to see the window: a token at its own index, and memory sees also what is padding.
EVERYTHING = -1


class Border(NamedTuple):
    """What the layers of one segment share about the border before it and the one behind it."""

    reach: Tensor  # [N] int64 first row of the window that is visible; W: none, EVERYTHING: also padding
    real: Tensor  # [B or 1, T] bool, False at padding
    turn: tuple[Tensor, Tensor] | None  # cos, sin [c or less] of a turn by -T positions; None: no rotary positions


class WindowState(NamedTuple):
    """`memory.State` and the window, float32."""

    A: Tensor
    z: Tensor
    keys: Tensor  # [B, h, W, c]
    values: Tensor  # [B, h, W, c]
    seen: Tensor  # [B, W] 1 a token, -1 padding, 0 nothing yet


class WindowUpdate(NamedTuple):
    """The memory's update and the window that takes the old one's place."""

    memory: Update
    keys: Tensor
    values: Tensor
    seen: Tensor

    def onto(self, state: WindowState) -> WindowState:
        """The state after this update."""
        return WindowState(*self.memory.onto(State(state.A, state.z)), self.keys, self.values, self.seen)


class WindowedMemory(AssociativeMemory):
    """An associative memory whose layer also attends to the window."""

    @classmethod
    def from_config(cls, config) -> "WindowedMemory":
        """As the parent, with the window's fields of `ARMTConfig` and the shape of the base model's keys."""
        memory = super().from_config(config)
        base = config.base_config
        memory.window, memory.sink = config.sliding_window, config.sink
        memory.restart, memory.detach = config.window_positions == "restart", config.detach_window
        memory.heads = getattr(base, "num_key_value_heads", None) or base.num_attention_heads
        memory.width = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
        return memory

    def initial_state(self, batch: int, device: torch.device | str) -> WindowState:
        """The empty memory and the empty window: zeros, float32."""
        shapes = (self.heads, self.window, self.width), (self.heads, self.window, self.width), (self.window,)
        rows = (torch.zeros(batch, *shape, device=device) for shape in shapes)
        return WindowState(*super().initial_state(batch, device), *rows)

    def open(self, context, state: WindowState):
        """Put the window's keys and values before those of the row, and what may be seen of them into the mask."""
        cache = DynamicLayer() if context.cache is None else context.cache
        dtype = context.mask.dtype
        if not cache.is_initialized:
            cache.update(state.keys.to(dtype), state.values.to(dtype))
        reach, seen = context.border.reach[:, None], state.seen[:, None]
        within = torch.arange(self.window, device=seen.device) >= reach
        # [B, N, W]
        visible = torch.where(reach == EVERYTHING, seen != 0, (seen > 0) & within)
        mask = torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(1)
        own = context.mask.expand(len(mask), -1, -1, -1)
        return context._replace(mask=torch.cat([mask, own], dim=-1), cache=cache)

    def write(self, m: Tensor, state: WindowState, context) -> WindowUpdate:
        """What the memory positions add, and the window as the next segment is to see it."""
        start, end = self.window + self.sink, self.window + self.sink + context.border.real.shape[1]
        rows = context.cache.keys, context.cache.values
        keys, values = (self.slide(r[:, :, : self.window], r[:, :, start:end]).float() for r in rows)
        if context.border.turn is not None:
            turned = rotate(keys, *context.border.turn)
            first = (state.seen == 0).all(1)[:, None, None, None]
            # In the authors' code every segment but the first starts at position W.
            keys = torch.where(first, turned, keys) if self.restart else turned
        if self.detach:
            keys, values = keys.detach(), values.detach()
        flags = (2.0 * context.border.real - 1).expand(len(m), -1)
        seen = self.slide(state.seen[..., None], flags[..., None]).squeeze(-1)
        return WindowUpdate(super().write(m, state), keys, values, seen)

    def slide(self, before: Tensor, tokens: Tensor) -> Tensor:
        """The last W rows of both, in a tensor of their own. [.., W, c], [.., T, c] -> [.., W, c]."""
        return torch.cat([before[..., tokens.shape[-2] :, :], tokens[..., -self.window :, :]], dim=-2)


def reach(rows: tuple[int, int, int], window: int, device: torch.device) -> Tensor:
    """`Border.reach` of a row of so many sinks, tokens and memory tokens. [N] int64."""
    sink, tokens, memory = rows
    parts = torch.full((sink,), window), torch.arange(tokens), torch.full((memory,), EVERYTHING)
    return torch.cat(parts).to(device)


def rotate(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn rotary keys [.., c] further; channels beyond those of cos and sin have no position."""
    turning, rest = keys.split([len(cos), keys.shape[-1] - len(cos)], dim=-1)
    a, b = turning.chunk(2, dim=-1)
    return torch.cat([turning * cos + torch.cat([-b, a], dim=-1) * sin, rest], dim=-1)
