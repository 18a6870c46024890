"""Measured times of the schedule's instructions: metrics of a step, and a timeline of all ranks.

Measured events have the simulator's type (`timeline.Event`), so the same functions summarise and draw both.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from ..distributed.collectives import gather_json
from ..runtime.trace import Trace
from ..schedule.program import COMPUTE, Instruction, Op
from ..schedule.timeline import WAITS, Event, plot_timeline, waits_s

SHOWN = (*COMPUTE, *WAITS)


def summary(events: Sequence[Event]) -> dict[str, float]:
    """Summarise one rank's pass: waits in seconds, and `bubble`, the share of its time without computation.

    `skew_s` is the first wait in each direction, while the pipeline fills; `exposed_handoff_s` sums the others.
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
    """Return the events of all ranks, on every rank and on one clock that starts at 0. Collective."""
    # All ranks leave a barrier at about the same moment: a common origin for hosts without a common clock.
    dist.barrier()
    everyone = [[event_of(*row) for row in rows] for rows in gather_json(trace.events(dist.get_rank()))]
    start_s = min(event.start_s for events in everyone for event in events)
    return [
        event._replace(start_s=event.start_s - start_s, end_s=event.end_s - start_s)
        for events in everyone
        for event in events
    ]


def event_of(rank: int, instruction: list, start_s: float, end_s: float) -> Event:
    """Return an event after its way through JSON."""
    op, *where = instruction
    return Event(rank, Instruction(Op(op), *where), start_s, end_s)


def write_profile(events: Sequence[Event], folder: str | Path, name: str = "timeline") -> tuple[Path, Path]:
    """Write `name`.png and `name`.json (for ui.perfetto.dev) into `folder` and return both paths."""
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
