"""What generation carries from token to token: keys and values of the open segment, memory of the closed ones.

Shapes: B batch, N tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils import ModelOutput


class ARMTCacheLayer(DynamicLayer):
    """Keys and values of the open segment, and the memory of the closed ones."""

    # What was written to memory cannot be undone, so assisted generation is refused (read since transformers 5.24).
    is_croppable = False

    def __init__(self, state: tuple):
        super().__init__()
        self.state = state
        # [B, tokens of the open segment] bool, where a document begins; None: none does.
        self.starts: Tensor | None = None

    def select(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Apply `pick` along the batch to everything that this layer holds."""
        self.state = type(self.state)(*map(pick, self.state))
        if self.keys is not None and self.values is not None:
            self.keys, self.values = pick(self.keys), pick(self.values)
        if self.starts is not None:
            self.starts = pick(self.starts)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the beams `beam_idx`."""
        self.select(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch."""
        self.select(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences of the batch."""
        self.select(lambda t: t[indices, ...])

    def reset(self) -> None:
        """Empty the memory and drop the open segment."""
        self.drop_segment()
        self.state = type(self.state)(*map(torch.zeros_like, self.state))

    def drop_segment(self) -> None:
        """Drop the keys and values of the open segment."""
        self.keys = self.values = self.starts = None
        self.is_initialized = False

    def crop(self, *args: Any) -> None:
        """Raise ValueError: a cache cannot be cropped."""
        raise ValueError("an ARMT cache cannot be cropped: what was written to memory stays; generate without drafts")


class ARMTCache(Cache):
    """What generation carries; its size does not depend on the length of the text."""

    def __init__(self, states: list[tuple]):
        *layers, carried = states
        self.slots = [ARMTCacheLayer(state) for state in layers]
        # What goes from the last layer to the first; no layer's, but kept, picked and reset as theirs are.
        self.carried = ARMTCacheLayer(carried)
        super().__init__(layers=[*self.slots, self.carried])
        self.tokens = 0
        self.open_tokens = 0

    def note_starts(self, starts: Tensor) -> None:
        """Note where documents begin among the next tokens: starts [B, n] bool."""
        for slot in self.slots:
            if slot.starts is None:
                slot.starts = starts.new_zeros(len(starts), self.open_tokens)
            slot.starts = torch.cat([slot.starts, starts], dim=1)

    def count(self, tokens: int) -> None:
        """Add `tokens`, which were read into the open segment."""
        self.tokens += tokens
        self.open_tokens += tokens

    def close(self) -> None:
        """Drop the open segment, which was written to memory."""
        self.open_tokens = 0
        for slot in self.slots:
            slot.drop_segment()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens read so far."""
        return self.tokens

    def reset(self) -> None:
        """Empty the memory and start a new text."""
        super().reset()
        self.tokens = self.open_tokens = 0


# What transformers calls the cache: since 5.24, and before.
CACHE_NAMES = ("cache", "past_key_values")


def the_cache(cache: ARMTCache | None, past_key_values: ARMTCache | None) -> ARMTCache | None:
    """Return the cache, whichever name it was passed by. Raises TypeError for two, and for another model's cache."""
    given = [one for one in (cache, past_key_values) if one is not None]
    if len(given) > 1:
        raise TypeError("cache and past_key_values are two names of one argument; pass one of them")
    for one in given:
        # Not isinstance: an exported folder carries its own class.
        if not hasattr(one, "open_tokens"):
            raise TypeError(f"cache={type(one).__name__}: expected the ARMTCache that a forward with use_cache returns")
    return given[0] if given else None


@dataclass
class ARMTOutput(ModelOutput):
    """What `ARMTForCausalLM.forward` returns; the cache also goes by its name before transformers 5.24."""

    loss: Tensor | None = None
    """Mean over scored tokens, float scalar; None without labels."""
    logits: Tensor | None = None
    """[B, N, V] in the model's dtype."""
    cache: ARMTCache | None = None
    """Pass it to the next forward; None without use_cache."""

    @property
    def past_key_values(self) -> ARMTCache | None:
        """The cache under its older name."""
        return self.cache

    def __contains__(self, key: object) -> bool:
        """Look a key up under both names of the cache."""
        return super().__contains__("cache" if key in CACHE_NAMES else key)

    def __getitem__(self, key: Any) -> Any:
        """Return a value under both names of the cache."""
        return super().__getitem__("cache" if key in CACHE_NAMES else key)

    def get(self, key: Any, default: Any = None) -> Any:
        """Return a value under both names of the cache, or `default`."""
        try:
            return self[key]
        except KeyError:
            return default
