"""Record what a rank does during one pass and when, instruction by instruction."""

import time

import torch

from ..schedule.program import Instruction
from ..schedule.timeline import Event


class Trace:
    """The instructions that a rank has begun during one pass; each lasts until the next one begins.

    A mark is a reading of the clock on CPU and an event on the current stream on CUDA; recording never waits.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.instructions: list[Instruction | None] = []
        self.clock_s: list[float] = []
        self.stamps: list[torch.cuda.Event] = []
        self.at: Instruction | None = None

    def __call__(self, instruction: Instruction | None) -> None:
        """Record that `instruction` begins and the one before it ends; None for work outside the schedule."""
        self.instructions.append(instruction)
        if self.cuda:
            self.stamps.append(self.stamp())
        else:
            self.clock_s.append(time.perf_counter())
        # Work outside the schedule is named by the instruction before it.
        self.at = instruction or self.at

    @staticmethod
    def stamp() -> torch.cuda.Event:
        """Record this moment on the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ago_s(self) -> list[float]:
        """Return how long ago each mark was, as negative seconds. Waits for the device."""
        if not self.cuda:
            now_s = time.perf_counter()
            return [mark_s - now_s for mark_s in self.clock_s]
        now = self.stamp()
        now.synchronize()
        return [-stamp.elapsed_time(now) / 1e3 for stamp in self.stamps]

    def events(self, rank: int = 0) -> list[Event]:
        """Return every instruction with its start and end, in seconds before this call. Waits for the device."""
        times = self.ago_s()
        spans = zip(self.instructions, times, times[1:], strict=False)
        return [Event(rank, instruction, start_s, end_s) for instruction, start_s, end_s in spans if instruction]
