"""A sliding window for ARMT: the last keys and values of a segment stay visible in the next one, as part of the state.

They pass from segment to segment of the same layer like A and z, so they are handed from rank to rank and
back-propagated in the same way. A token sees the W tokens before it across the border of its segment, memory tokens
see the whole window and one another, and sinks see none of it. The first segment meets an empty, masked window, so that
the work of a cell does not depend on where it is in the sequence.

Shapes: B batch, N positions of a row `[sink | tokens | memory]`, T tokens, W rows of the window, h key-value heads,
        c channels a head.
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .backbone import Border, Context
from .memory import AssociativeMemory, State, Update

# The value of `Border.reach` for a row that sees the whole window, padding included.
EVERYTHING = -1


class WindowState(NamedTuple):
    """`memory.State` and the window, float32."""

    A: Tensor
    z: Tensor
    keys: Tensor  # [B, h, W, c]
    values: Tensor  # [B, h, W, c]
    seen: Tensor  # [B, W] 1 a token, -1 padding, 0 nothing yet or another document


class WindowUpdate(NamedTuple):
    """The memory's update, and the window that replaces the old one."""

    memory: Update
    keys: Tensor
    values: Tensor
    seen: Tensor

    def onto(self, state: WindowState) -> WindowState:
        """Return the state after this update."""
        return WindowState(*self.memory.onto(State(state.A, state.z)), self.keys, self.values, self.seen)


class WindowedMemory(AssociativeMemory[WindowState]):
    """An associative memory whose layer also attends to the window."""

    window: int
    sink: int
    restart: bool
    detach: bool
    heads: int
    width: int

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Build it as the parent does, with the window's fields of `ARMTConfig` and the base model's key shape."""
        memory = super().from_config(config)
        base = config.base_config
        memory.window, memory.sink = config.sliding_window, config.sink
        memory.restart, memory.detach = config.window_positions == "restart", config.detach_window
        memory.heads = getattr(base, "num_key_value_heads", None) or base.num_attention_heads
        memory.width = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
        return memory

    def initial_state(self, batch: int, device: torch.device | str) -> WindowState:
        """Return the empty memory and the empty window: zeros, float32."""
        shapes = (self.heads, self.window, self.width), (self.heads, self.window, self.width), (self.window,)
        rows = (torch.zeros(batch, *shape, device=device) for shape in shapes)
        return WindowState(*self.empty(batch, device), *rows)

    def open(self, context: Context, state: WindowState) -> Context:
        """Put the window's keys and values before those of the row, and extend the mask by what is visible of them."""
        mask, border = with_window(context)
        cache = DynamicLayer() if context.cache is None else context.cache
        if not cache.is_initialized:
            cache.update(state.keys.to(mask.dtype), state.values.to(mask.dtype))
        reach, seen = border.reach[:, None], state.seen[:, None]
        within = torch.arange(self.window, device=seen.device) >= reach
        # [B, N, W]
        visible = torch.where(reach == EVERYTHING, seen != 0, (seen > 0) & within)
        if context.documents is not None:
            visible = visible & context.documents.carried[..., None]
        before = torch.zeros_like(visible, dtype=mask.dtype).masked_fill_(~visible, torch.finfo(mask.dtype).min)
        own = mask.expand(len(visible), -1, -1, -1)
        return context._replace(mask=torch.cat([before.unsqueeze(1), own], dim=-1), cache=cache)

    def write(self, m: Tensor, state: WindowState, context: Context) -> WindowUpdate:
        """Return what the memory positions add, and the window as the next segment sees it."""
        _, border = with_window(context)
        start, end = self.window + self.sink, self.window + self.sink + border.seen.shape[1]
        cache = context.cache
        assert cache is not None and cache.keys is not None and cache.values is not None, "write comes after attention"
        keys, values = (
            self.slide(r[:, :, : self.window], r[:, :, start:end]).float() for r in (cache.keys, cache.values)
        )
        if border.turn is not None:
            turned = rotate(keys, *border.turn)
            first = (state.seen == 0).all(1)[:, None, None, None]
            # In the authors' code every segment but the first starts at position W.
            keys = torch.where(first, turned, keys) if self.restart else turned
        if self.detach:
            keys, values = keys.detach(), values.detach()
        seen = self.slide(state.seen[..., None], border.seen.expand(len(m), -1)[..., None]).squeeze(-1)
        return WindowUpdate(self.update(m, state), keys, values, seen)

    def slide(self, before: Tensor, tokens: Tensor) -> Tensor:
        """Copy the last W rows of both into a new tensor. [.., W, c], [.., T, c] -> [.., W, c]."""
        return torch.cat([before[..., tokens.shape[-2] :, :], tokens[..., -self.window :, :]], dim=-2)


def with_window(context: Context) -> tuple[Tensor, Border]:
    """Return the mask and the border, which every context has where there is a window."""
    assert context.mask is not None and context.border is not None, "a sliding window needs a mask and a border"
    return context.mask, context.border


def reach(rows: tuple[int, int, int], window: int, device: torch.device) -> Tensor:
    """Compute `Border.reach` of a row from its counts of sinks, tokens and memory tokens. [N] int64."""
    sink, tokens, memory = rows
    parts = torch.full((sink,), window), torch.arange(tokens), torch.full((memory,), EVERYTHING)
    return torch.cat(parts).to(device)


def rotate(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn rotary keys [.., c] further; channels beyond those of cos and sin carry no position."""
    turning, rest = keys.split([len(cos), keys.shape[-1] - len(cos)], dim=-1)
    a, b = turning.chunk(2, dim=-1)
    return torch.cat([turning * cos + torch.cat([-b, a], dim=-1) * sin, rest], dim=-1)
