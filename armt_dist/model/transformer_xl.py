"""Transformer-XL (arXiv 1901.02860) beside the memories: each layer attends to its window of the segment before.

There are no memory tokens, and no gradient flows through the window. What is kept are keys and values, where the paper
keeps the hidden states that they are made of: the projections learn from the segment's own tokens alone.
"""

from typing import Any, Self

from .sliding_window import WindowMemory


class TransformerXL(WindowMemory):
    """A layer that keeps a detached window and nothing else."""

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Build it as the parent does, always detached."""
        memory = super().from_config(config)
        memory.window = memory.window._replace(detach=True)
        return memory
