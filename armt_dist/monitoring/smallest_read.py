"""The smallest z·q among the memory reads of a pass, where the division of the read loses digits."""

import math

import torch

from ..model.memory import AssociativeMemory
from ..runtime.segment_bptt import CellView


class SmallestRead:
    """min z·q over all reads of a pass, to be told of each cell: an observer. inf where nothing was read.

    The read divides by z·q + 1e-5 and loses digits where z·q comes close to 0. Heads whose memory is still empty do
    not count: they read exactly 0. Another projection of the cell's input, so for a step now and then.
    """

    def __init__(self, device: torch.device):
        self.value = torch.full((), math.inf, device=device)

    def take(self) -> float:
        """The minimum since the last call. Waits for the device."""
        found = float(self.value)
        self.value = torch.full_like(self.value, math.inf)
        return found

    def __call__(self, seen: CellView) -> None:
        memory = seen.layer.memory
        if not isinstance(memory, AssociativeMemory) or not memory.use_denom:
            return
        z = seen.before.z
        # [B, h, N]
        zq = (memory.features(memory.W_mq(seen.x)) @ z.unsqueeze(-1)).squeeze(-1)
        written = z.sum(-1, keepdim=True) != 0
        self.value = torch.minimum(self.value, torch.where(written, zq.abs(), math.inf).amin())
