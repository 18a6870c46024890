"""What generation carries from token to token: keys and values of the open segment, memory of the closed ones."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class ARMTCacheLayer(DynamicLayer):
    """Keys and values of the open segment, and the memory of the closed ones."""

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
        """`tokens` more were read into the open segment."""
        self.tokens += tokens
        self.open_tokens += tokens

    def close(self) -> None:
        """The open segment was written to memory."""
        self.open_tokens = 0
        for layer in self.layers:
            layer.drop_segment()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far."""
        return self.tokens

    def reset(self) -> None:
        super().reset()
        self.tokens = self.open_tokens = 0
