"""A sliding window: the last keys and values of a segment stay visible in the next one, as part of a layer's state.

They pass from segment to segment of the same layer, so they are handed from rank to rank and back-propagated like any
other state. A token sees the W tokens before it across the border of its segment, memory tokens see the whole window
and one another, and sinks see none of it; as the authors have it, in RMT all rows see the whole window. The first
segment meets an empty, masked window, so that the work of a cell does not depend on where it is in the sequence.

Shapes: B batch, N positions of a row `[head | tokens | memory]`, T tokens, W rows of the window, h key-value heads,
        c channels a head.
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .backbone import Border, Context
from .memory_kind import Memory

# The value of `Border.reach` for a row that sees the whole window, padding included.
EVERYTHING = -1


class Window(NamedTuple):
    """What a layer keeps of the segments before, float32; also the update that replaces the window before it."""

    keys: Tensor  # [B, h, W, c]
    values: Tensor  # [B, h, W, c]
    seen: Tensor  # [B, W] 1 a token, -1 padding, 0 nothing yet or another document

    def onto(self, state: "Window") -> "Window":
        """Return the window after this update: this one."""
        return self


class SlidingWindow(NamedTuple):
    """One layer's window: its shape and options."""

    tokens: int
    """W."""
    head_rows: int
    """Rows of a segment before its tokens."""
    restart: bool
    detach: bool
    heads: int
    width: int

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Take the window's fields of an `ARMTConfig` and the base model's key shape."""
        base = config.base_config
        return cls(
            config.sliding_window,
            config.head_rows,
            config.window_positions == "restart",
            config.detach_window,
            getattr(base, "num_key_value_heads", None) or base.num_attention_heads,
            getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads,
        )

    def empty(self, batch: int, device: torch.device | str) -> Window:
        """Return the window before the first segment: zeros, float32."""
        shapes = (self.heads, self.tokens, self.width), (self.heads, self.tokens, self.width), (self.tokens,)
        return Window(*(torch.zeros(batch, *shape, device=device) for shape in shapes))

    def open(self, context: Context, window: Window) -> Context:
        """Put the window's keys and values before those of the row, and extend the mask by what is visible of them."""
        mask, border = with_window(context)
        cache = DynamicLayer() if context.cache is None else context.cache
        if not cache.is_initialized:
            cache.update(window.keys.to(mask.dtype), window.values.to(mask.dtype))
        reach, seen = border.reach[:, None], window.seen[:, None]
        within = torch.arange(self.tokens, device=seen.device) >= reach
        # [B, N, W]
        visible = torch.where(reach == EVERYTHING, seen != 0, (seen > 0) & within)
        if context.documents is not None:
            visible = visible & context.documents.carried[..., None]
        before = torch.zeros_like(visible, dtype=mask.dtype).masked_fill_(~visible, torch.finfo(mask.dtype).min)
        own = mask.expand(len(visible), -1, -1, -1)
        return context._replace(mask=torch.cat([before.unsqueeze(1), own], dim=-1), cache=cache)

    def following(self, window: Window, context: Context) -> Window:
        """Return the window as the next segment sees it, from the keys and values that attention has left."""
        _, border = with_window(context)
        start = self.tokens + self.head_rows
        end = start + border.seen.shape[1]
        cache = context.cache
        assert cache is not None and cache.keys is not None and cache.values is not None, "a window follows attention"
        keys, values = (
            self.slide(r[:, :, : self.tokens], r[:, :, start:end]).float() for r in (cache.keys, cache.values)
        )
        if border.turn is not None:
            turned = rotate(keys, *border.turn)
            first = (window.seen == 0).all(1)[:, None, None, None]
            # In the authors' code every segment but the first starts at position W.
            keys = torch.where(first, turned, keys) if self.restart else turned
        if self.detach:
            keys, values = keys.detach(), values.detach()
        seen = self.slide(window.seen[..., None], border.seen.expand(len(keys), -1)[..., None]).squeeze(-1)
        return Window(keys, values, seen)

    def slide(self, before: Tensor, tokens: Tensor) -> Tensor:
        """Copy the last W rows of both into a new tensor. [.., W, c], [.., T, c] -> [.., W, c]."""
        return torch.cat([before[..., tokens.shape[-2] :, :], tokens[..., -self.tokens :, :]], dim=-2)


class WindowMemory(Memory[Window]):
    """A layer whose state is its window alone."""

    window: SlidingWindow

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Build one layer's memory from an `ARMTConfig`."""
        memory = cls()
        memory.window = SlidingWindow.from_config(config)
        return memory

    def initial_state(self, batch: int, device: torch.device | str) -> Window:
        """Return the empty window: zeros, float32."""
        return self.window.empty(batch, device)

    def open(self, context: Context, state: Window) -> Context:
        """Let the layer attend to the window."""
        return self.window.open(context, state)

    def write(self, m: Tensor, state: Window, context: Context) -> Window:
        """Return the window as the next segment sees it; memory positions m [B, M, D] leave nothing here."""
        return self.window.following(state, context)


def with_window(context: Context) -> tuple[Tensor, Border]:
    """Return the mask and the border, which every context has where there is a window."""
    assert context.mask is not None and context.border is not None, "a sliding window needs a mask and a border"
    return context.mask, context.border


def reach(rows: tuple[int, int, int], window: int, device: torch.device) -> Tensor:
    """Compute `Border.reach` of a row from its counts of sinks, tokens and memory tokens. [N] int64."""
    sink, tokens, memory = rows
    before, behind = torch.full((sink,), window, device=device), torch.full((memory,), EVERYTHING, device=device)
    return torch.cat([before, torch.arange(tokens, device=device), behind])


def rotate(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn rotary keys [.., c] further; channels beyond those of cos and sin carry no position."""
    turning, rest = keys.split([len(cos), keys.shape[-1] - len(cos)], dim=-1)
    a, b = turning.chunk(2, dim=-1)
    return torch.cat([turning * cos + torch.cat([-b, a], dim=-1) * sin, rest], dim=-1)
