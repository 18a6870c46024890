"""What a rank really did and when, instruction by instruction: metrics of a step, and a timeline of all ranks.

Measured events are those of the simulator (`timeline.Event`), so the same functions sum them up and draw them.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from ..schedule.checker import COMPUTE
from ..schedule.program import Instruction
from ..schedule.simulator import waits_s
from ..schedule.timeline import WAITS, Event, plot_timeline

SHOWN = (*COMPUTE, *WAITS)


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


def summary(events: Sequence[Event]) -> dict[str, float]:
    """One rank's pass in numbers; seconds, and the share of its time in which it did not compute.

    `skew_s` is the first wait of either direction, the filling of the pipeline; `exposed_handoff_s` are the others.
    """
    own = [event._replace(rank=0) for event in events]
    (exposed_s,), (skew_s,), (gather_s,) = waits_s(own, 1)
    busy_s = sum(event.end_s - event.start_s for event in own if event.instruction.op in COMPUTE)
    span_s = own[-1].end_s - own[0].start_s
    return {
        "bubble": 1 - busy_s / span_s,
        "exposed_handoff_s": exposed_s,
        "skew_s": skew_s,
        "gather_wait_s": gather_s,
    }


def collect(trace: Trace) -> list[Event]:
    """The events of all ranks on one clock, on every rank; the first begins at 0. Collective."""
    # All leave a barrier at about the same moment, which makes it the common origin of hosts without a common clock.
    dist.barrier()
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, trace.events(dist.get_rank()))
    start_s = min(event.start_s for events in everyone for event in events)
    return [
        event._replace(start_s=event.start_s - start_s, end_s=event.end_s - start_s)
        for events in everyone
        for event in events
    ]


def write_profile(events: Sequence[Event], folder: str | Path, name: str = "timeline") -> tuple[Path, Path]:
    """`name`.png, and `name`.json for chrome://tracing or ui.perfetto.dev, in `folder`."""
    png, chrome = Path(folder) / f"{name}.png", Path(folder) / f"{name}.json"
    plot_timeline([event for event in events if event.instruction.op in SHOWN], png, name)
    rows = [
        {
            "name": f"{event.instruction.op} {event.instruction.layer}",
            "cat": event.instruction.op,
            "ph": "X",
            "ts": event.start_s * 1e6,
            "dur": (event.end_s - event.start_s) * 1e6,
            "pid": 0,
            "tid": event.rank,
            "args": {
                "layer": event.instruction.layer,
                "block": event.instruction.block,
                "chunk": event.instruction.chunk,
            },
        }
        for event in events
    ]
    names = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}}
        for rank in sorted({event.rank for event in events})
    ]
    chrome.write_text(json.dumps({"traceEvents": names + rows, "displayTimeUnit": "ms"}), encoding="utf-8")
    return png, chrome
