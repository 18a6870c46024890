"""bptt.keep=auto: keep the graphs of as many cells as fit into the memory that steps leave free.

A step that is longer than all before keeps none, and shows what it leaves free; so lengths may grow by stages. What is
free on the fullest rank counts for all: a step is as slow as its slowest rank.
"""

import psutil
import torch

from ..distributed.collectives import gather
from ..runtime.executor import ScheduledLM
from ..schedule.kept_cells import Keep

# Of the device, for fragments and for steps that differ.
MARGIN = 0.1
# Of the host's free memory: other processes need some of it.
HOST_SHARE = 0.5
# The first step makes the optimizer's states; the second is made with them.
FIRST_STEPS = 2


class FreeMemory:
    """Sets what the model keeps, step by step. Its methods are collective."""

    def __init__(self, runner: ScheduledLM, device: torch.device, local_ranks: int):
        """local_ranks: those that share this host's memory."""
        self.runner, self.device, self.local_ranks = runner, device, local_ranks
        self.longest = self.steps = 0
        self.measures = True

    def before_step(self, tokens: int) -> None:
        """Keep nothing where it is not known what a step leaves free. tokens: of this rank's longest micro-batch."""
        (lengths,) = gather([tokens], self.device)
        longest = int(max(lengths))
        self.measures = longest > self.longest or self.steps < FIRST_STEPS
        self.longest = max(self.longest, longest)
        if self.measures:
            self.runner.keep = Keep()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)

    def after_step(self) -> None:
        """Set what the next steps may keep, if this one has shown it."""
        self.steps += 1
        if self.measures:
            (free,) = gather([self.free_bytes()], self.device)
            self.runner.keep = Keep(1.0, max(0.0, min(free)))

    def free_bytes(self) -> float:
        """Return the bytes that this step has left free on this rank at its fullest, less a margin. Not collective."""
        if self.device.type != "cuda":
            return HOST_SHARE * psutil.virtual_memory().available / self.local_ranks
        free, capacity = torch.cuda.mem_get_info(self.device)
        # Of NCCL, of other processes, of the driver.
        others = capacity - free - torch.cuda.memory_reserved(self.device)
        return (1 - MARGIN) * capacity - others - torch.cuda.max_memory_allocated(self.device)
