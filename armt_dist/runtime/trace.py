"""What a rank did during one pass and when, instruction by instruction."""

import time

import torch

from ..schedule.program import Instruction
from ..schedule.timeline import Event


class Trace:
    """The instructions that a rank began during one pass, each until the next.

    A mark is a reading of the clock on CPU and an event on the current stream on CUDA; nothing waits for it.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[Instruction | None, float | torch.cuda.Event]] = []
        self.at: Instruction | None = None

    def __call__(self, instruction: Instruction | None) -> None:
        """`instruction` begins, and what was before it ends; None: work outside the schedule."""
        self.marks.append((instruction, self.now()))
        # What lies outside is named by what came before it.
        self.at = instruction or self.at

    def now(self) -> float | torch.cuda.Event:
        """This moment, for the host or on the stream."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def events(self, rank: int = 0) -> list[Event]:
        """Everything that took time, in seconds before this call. Waits for the device."""
        now = self.now()
        if self.cuda:
            now.synchronize()
        times = [-stamp.elapsed_time(now) / 1e3 if self.cuda else stamp - now for _, stamp in self.marks]
        spans = zip(self.marks, times, times[1:], strict=False)
        return [Event(rank, mark[0], start_s, end_s) for mark, start_s, end_s in spans if mark[0] is not None]
