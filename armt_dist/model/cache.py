"""What generation carries from token to token: keys and values of the open segment, memory of the closed ones.

Shapes: B batch, N tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils import ModelOutput


class ARMTCacheLayer(DynamicLayer):
    """Keys and values of the open segment, and the memory of the closed ones."""

    # What was written to memory cannot be taken back, so assisted generation is refused (read since transformers 5.24).
    is_croppable = False

    def __init__(self, state: tuple):
        super().__init__()
        self.state = state

    def select(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Apply `pick` along the batch to everything that this layer holds."""
        self.state = type(self.state)(*map(pick, self.state))
        if self.is_initialized:
            self.keys, self.values = pick(self.keys), pick(self.values)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(lambda t: t[indices, ...])

    def reset(self) -> None:
        self.drop_segment()
        self.state = type(self.state)(*map(torch.zeros_like, self.state))

    def drop_segment(self) -> None:
        """Forget the keys and values."""
        self.keys = self.values = None
        self.is_initialized = False

    def crop(self, *args) -> None:
        raise ValueError("an ARMT cache cannot be cropped: what was written to memory stays; generate without drafts")


class ARMTCache(Cache):
    """What generation carries: constant in the length of the text."""

    def __init__(self, states: list[tuple]):
        super().__init__(layers=[ARMTCacheLayer(state) for state in states])
        self.tokens = 0
        self.open_tokens = 0

    def count(self, tokens: int) -> None:
        """Note that `tokens` more were read into the open segment."""
        self.tokens += tokens
        self.open_tokens += tokens

    def close(self) -> None:
        """Forget the open segment, which was written to memory."""
        self.open_tokens = 0
        for layer in self.layers:
            layer.drop_segment()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far."""
        return self.tokens

    def reset(self) -> None:
        super().reset()
        self.tokens = self.open_tokens = 0


# What transformers calls the cache: since 5.24, and before.
CACHE_NAMES = ("cache", "past_key_values")


def the_cache(cache: ARMTCache | None, past_key_values: ARMTCache | None) -> ARMTCache | None:
    """The one that was passed, under whichever name. TypeError for two, and for one that is not an ARMT's."""
    given = [one for one in (cache, past_key_values) if one is not None]
    if len(given) > 1:
        raise TypeError("cache and past_key_values are two names of one argument; pass one of them")
    for one in given:
        # Not isinstance: an exported folder has a class of its own.
        if not hasattr(one, "open_tokens"):
            raise TypeError(f"cache={type(one).__name__}: expected the ARMTCache that a forward with use_cache returns")
    return given[0] if given else None


@dataclass
class ARMTOutput(ModelOutput):
    """What `ARMTForCausalLM.forward` returns, with the cache under the name of transformers 5.24 and the one before.

    loss: mean over scored tokens, float scalar, where labels were given. logits: [B, N, V] in the model's dtype.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: ARMTCache | None = None

    @property
    def past_key_values(self) -> ARMTCache | None:
        """The cache under its older name."""
        return self.cache

    def __contains__(self, key: object) -> bool:
        return super().__contains__("cache" if key in CACHE_NAMES else key)

    def __getitem__(self, key):
        return super().__getitem__("cache" if key in CACHE_NAMES else key)

    def get(self, key, default=None):
        """As dict.get, under both names."""
        try:
            return self[key]
        except KeyError:
            return default
