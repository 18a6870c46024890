"""The smallest z·q among the memory reads of a pass: the read divides by it and loses digits as it nears 0."""

import math
from typing import cast

import torch

from ..model.memory import AssociativeMemory, State, faded
from ..runtime.segment_bptt import CellView


class SmallestRead:
    """An observer of cells that keeps min |z·q| over all reads; inf if nothing was read.

    The read divides by z·q + 1e-5. Heads whose memory is still empty read exactly 0 and do not count. Each
    observed cell costs one more projection of its input, so observe only some steps.
    """

    def __init__(self, device: torch.device):
        self.value = torch.full((), math.inf, device=device)

    def take(self) -> float:
        """Return the minimum since the last call. Waits for the device."""
        found = float(self.value)
        self.value = torch.full_like(self.value, math.inf)
        return found

    def __call__(self, seen: CellView) -> None:
        """Include the reads of one cell."""
        memory = seen.layer.memory
        if not isinstance(memory, AssociativeMemory) or not memory.options.use_denom:
            return
        # The states of all associative memories have the fields of `State`.
        before = cast(State, seen.before)
        z = faded(before, memory.decay(before)).z
        # [B, h, N]
        zq = (memory.features(memory.W_mq(seen.x)) @ z.unsqueeze(-1)).squeeze(-1)
        written = z.sum(-1, keepdim=True) != 0
        self.value = torch.minimum(self.value, torch.where(written, zq.abs(), math.inf).amin())
