"""How a sequence becomes segments, and a segment the row that the layers see: `[head | tokens | memory]`.

Shapes: B batch, T tokens of a segment, M memory tokens, D model width, L layers,
        H + T + M = N positions of a segment's row, H of them before the tokens: sinks (ARMT), memory (RMT).
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .backbone import Backbone, Border, Context, backbone_of, causal_mask
from .configuration_armt import ARMTConfig
from .documents import apart, documents_of, groups
from .memory_kind import ARMTLayer
from .rmt import MemoryRows, Nothing, entering
from .sliding_window import reach

# Label of a position that is not scored, as in torch and transformers.
IGNORE = -100


def segment_lengths(tokens: int, segment_tokens: int, alignment: str = "left") -> list[int]:
    """Cut `tokens` into segments and return their lengths; the short one comes last (left) or first (right)."""
    full, rest = divmod(tokens, segment_tokens)
    if alignment == "center":
        # As torch.chunk cuts: equal parts of the rounded-up mean length.
        length = math.ceil(tokens / max(1, full + bool(rest)))
        full, rest = divmod(tokens, max(1, length))
        return [length] * full + [rest] * bool(rest)
    short = [rest] * bool(rest)
    return short + [segment_tokens] * full if alignment == "right" else [segment_tokens] * full + short


class MemoryTokens(nn.Module):
    """The learned rows around a segment's tokens; a separate module, so that ZeRO-3 gathers them when they are used."""

    def __init__(self, num_mem_tokens: int, hidden_size: int, sink: int = 0):
        super().__init__()
        # ZeRO-3 has no use for an empty parameter.
        if num_mem_tokens:
            self.weight = nn.Parameter(torch.empty(num_mem_tokens, hidden_size))
        if sink:
            self.sink = nn.Parameter(torch.empty(sink, hidden_size))

    def forward(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return the sinks [B, rows, D], rows = 0 without any, and the memory rows [B, M, D]."""
        sink = self.sink if hasattr(self, "sink") else self.weight[:0]
        return sink.expand(batch, -1, -1), self.weight.expand(batch, -1, -1)


class SegmentRows(PreTrainedModel):
    """The part of `ARMTForCausalLM` that builds rows of hidden states and what the layers need beside them."""

    config: ARMTConfig
    base: PreTrainedModel
    """The wrapped causal LM; its layers are `ARMTLayer`s."""
    memory_tokens: MemoryTokens
    carries_rows: bool
    """Whether memory rows come from the segment before (RMT) instead of from `memory_tokens`."""

    @property
    def backbone(self) -> Backbone:
        """The base model seen through its family's row."""
        return backbone_of(self.base)

    @property
    def layers(self) -> Sequence[ARMTLayer]:
        """The layers with their memories, in order."""
        return cast(Sequence[ARMTLayer], self.backbone.layers)

    def position_ids(self, tokens: int, device: torch.device) -> Tensor:
        """Number the positions of a row with `tokens` tokens. [1, H + tokens + M] int64."""
        memory = self.config.memory_rows
        end = self.config.head_rows + tokens
        first = self.config.base.max_position_embeddings - memory if self.config.wrap_pos else end
        return torch.cat([torch.arange(end, device=device), torch.arange(first, first + memory, device=device)])[None]

    def embed_segments(self, input_ids: Tensor, lengths: list[int]) -> Tensor:
        """Embed consecutive segments into packed rows. [B, sum(lengths)] -> [B, sum(H + length + M), D].

        All in one pass over the tables, because ZeRO-3 gathers a module once for each call. Memory rows that are
        carried (RMT) are left zero: see `rmt.enter`.
        """
        tokens, batch = self.backbone.embed(input_ids), input_ids.shape[0]
        if self.carries_rows:
            head = tail = tokens.new_zeros(batch, self.config.memory_rows, tokens.shape[2])
        else:
            head, tail = (rows.to(tokens.dtype) for rows in self.learned_rows(batch))
        rows = [part for segment in tokens.split(lengths, dim=1) for part in (head, segment, tail)]
        positions = torch.cat([self.position_ids(n, input_ids.device) for n in lengths], dim=1)
        return self.backbone.place(torch.cat(rows, dim=1), positions)

    def context(self, x: Tensor, attention_mask: Tensor | None, starts: Tensor | None = None) -> Context:
        """Build what the layers of one segment share.

        x [B, N, D]; attention_mask [B, T], 1 at real tokens, or None; starts [B, T], true where a document begins, or
        None where none does. Raises ValueError where an attention without masks would need one.
        """
        config, memory = self.config, self.config.memory_rows
        tokens = x.shape[1] - config.other_rows
        positions = self.position_ids(tokens, x.device)
        mask = None
        if attention_mask is not None:
            attend = nn.functional.pad(attention_mask.bool(), (config.head_rows, memory), value=True)
        else:
            attend = torch.ones(1, x.shape[1], dtype=torch.bool, device=x.device)
        needed = attention_mask is not None or starts is not None
        if needed and "flash" in str(config._attn_implementation):
            raise ValueError(
                f"attn_implementation={config._attn_implementation}: takes no mask, which padding and packed documents "
                "need; use sdpa or eager"
            )
        # Eager attention without a mask would not be causal.
        if needed or config.sliding_window or config._attn_implementation == "eager":
            mask = causal_mask(x.shape[1], attend, x.dtype, config.seeing_all)
        border, documents = None, None
        if config.sliding_window:
            border = self.border(tokens, x.device)
            border = border._replace(seen=2.0 * attend[:, config.head_rows : config.head_rows + tokens] - 1)
        if starts is not None:
            assert mask is not None, "documents need a mask"
            group = groups(starts, config.head_rows, memory)
            mask, documents = apart(mask, group), documents_of(group)
            border = border and border._replace(seen=self.seen_of_last(border.seen, group))
        return Context(mask, positions, self.backbone.rotary(x, positions), border=border, documents=documents)

    def seen_of_last(self, seen: Tensor, group: Tensor) -> Tensor:
        """Return `Border.seen` [B, T] with zeros at tokens before the last document; group [B, H + T or more]."""
        own = group[:, self.config.head_rows : self.config.head_rows + seen.shape[1]] == group[:, -1:]
        return seen.masked_fill(~own, 0.0)

    def border(self, tokens: int, device: torch.device) -> Border:
        """Describe the borders of a segment with `tokens` tokens, none of them padding, under a sliding window."""
        assert self.config.sliding_window, "only a model with a sliding window has borders"
        rows = self.config.head_rows, tokens, self.config.memory_rows
        within = torch.zeros(sum(rows), dtype=torch.int64, device=device)
        if not self.config.kind.whole_window:
            within = reach(rows, self.config.sliding_window, device)
        return Border(within, torch.ones(1, tokens, device=device), self.backbone.turn(-tokens, device))

    def initial_states(self, batch: int, device: torch.device | str | None = None) -> list[tuple]:
        """Return L empty memories, then the rows that the last layer hands to the next segment (RMT), or `Nothing`.

        device: None: the model's.
        """
        device = self.device if device is None else device
        states = [layer.memory.initial_state(batch, device) for layer in self.layers]
        if not self.carries_rows:
            return [*states, Nothing()]
        return [*states, MemoryRows.empty(batch, self.config.memory_rows, self.config.hidden_size, device)]

    def learned_rows(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return the sinks [B, rows, D] and the memory rows [B, M, D]; none of either without memory tokens."""
        if self.config.memory_rows:
            return self.memory_tokens(batch)
        none = torch.zeros(batch, 0, self.config.hidden_size, dtype=self.dtype, device=self.device)
        return none, none

    def rows_around(self, carried: tuple, batch: int, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the rows before and behind a segment's tokens, [B, H, D] and [B, M, D].

        carried: the last of `initial_states`, or what took its place; starts [B, T], true where a document begins:
        there, memory rows are not carried on.
        """
        head, tail = self.learned_rows(batch)
        if self.carries_rows:
            head, tail = entering(MemoryRows(*carried).entering(tail), tail, starts)
        return head, tail
