"""Ends a rank that is stuck, and tells where it was: one line, its Python stacks, the last instruction of its schedule.

A run is always in one section: set-up, step, validation or checkpoint. Whoever waits for ever, in a gather, a hand-off
or a file system, does not leave it. Three watchers, each for what the one before it cannot see:

* a thread compares the section's age with its limit; a wait in gloo, NCCL or a file leaves it the interpreter;
* faulthandler's timer, a little later, needs no interpreter: the main thread may hold it in C;
* faulthandler's signal handlers leave the stacks of a process that is aborted, as NCCL's own watchdog does.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch.distributed as dist
from pydantic import Field

from ..config import Section, one_line
from ..schedule.program import Instruction

Seconds = Annotated[float, Field(gt=0)]
Name = Literal["setup", "step", "validation", "checkpoint"]
POLL_S = 0.5
# The timer without an interpreter comes so much later than the thread.
TIMER_LATER_S = 5.0
# In which ZeRO-3 learns the order of gathers, and kernels are built.
SLOW_STEPS = 2


class WatchdogConfig(Section):
    """How long a rank may stay in a section of the run, in seconds, before it ends with its stacks and exit code 1."""

    setup_s: Seconds = 1800
    """From the start to the first step; the first two steps may take as long."""
    step_s: Seconds = 600
    validation_s: Seconds = 3600
    checkpoint_s: Seconds = 1800
    heartbeat_s: Seconds = 10
    """Between two writes of heartbeat/rank_R.json in the run folder."""
    straggler_factor: Annotated[float, Field(gt=1)] = 1.5
    """Name a rank whose cells take so many times the median rank's."""


class Phase(NamedTuple):
    """What a rank is doing. Replaced as a whole, so that the thread never sees half of one."""

    section: Name
    step: int
    since: float  # time.monotonic()
    limit_s: float


class Watchdog:
    """The watchers of one rank. `enter` begins a section and ends the one before; `close` ends the watch.

    `out` is the run folder; nothing is written there before it exists, unless this rank is stuck.
    """

    def __init__(self, config: WatchdogConfig, out: Path, rank: int):
        self.config, self.out, self.rank = config, out, rank
        self.stacks = out / "stacks" / f"rank_{rank}.txt"
        # The instruction that the rank came to last; there is none before there is a model.
        self.at: Callable[[], Instruction | None] = lambda: None
        self.file = None
        self.steps = 0
        self.closed = threading.Event()
        self.enter("setup")
        threading.Thread(target=self.watch, name="watchdog", daemon=True).start()

    def enter(self, section: Name, step: int = 0) -> None:
        """`section` begins, after `step` steps."""
        limit_s = getattr(self.config, f"{section}_s")
        if section == "step":
            self.steps += 1
            if self.steps <= SLOW_STEPS:
                limit_s = max(limit_s, self.config.setup_s)
        self.phase = Phase(section, step, time.monotonic(), limit_s)
        if self.file is None and self.out.is_dir():
            self.open()
        faulthandler.dump_traceback_later(limit_s + TIMER_LATER_S, exit=True, file=self.file or sys.__stderr__)

    def close(self) -> None:
        """Nothing is watched any more; a file without stacks is removed."""
        self.closed.set()
        faulthandler.cancel_dump_traceback_later()
        if self.file is None:
            return
        faulthandler.enable(sys.__stderr__) if self.enabled_before else faulthandler.disable()
        self.file.close()
        self.file = None
        with suppress(OSError):
            if not self.stacks.stat().st_size:
                self.stacks.unlink()

    def open(self) -> None:
        """Open the file for stacks while that is still possible: a stuck rank may be stuck in its file system."""
        with suppress(OSError):
            self.stacks.parent.mkdir(parents=True, exist_ok=True)
            # Not truncated: it may say why the run before this one ended.
            self.file = self.stacks.open("a", encoding="utf-8")
            self.enabled_before = faulthandler.is_enabled()
            faulthandler.enable(self.file)

    def watch(self) -> None:
        """The body of the thread."""
        due = 0.0
        while not self.closed.wait(POLL_S):
            now, phase = time.monotonic(), self.phase
            if now - phase.since > phase.limit_s:
                self.end(phase)
            if now >= due:
                self.beat(phase)
                due = now + self.config.heartbeat_s

    def end(self, phase: Phase) -> None:
        """Leave, with exit code 1. Nothing is cleaned up: whatever talks to the others would wait for them again."""
        why = f"rank {self.rank} spent more than {phase.limit_s:g} s in {phase.section} (after step {phase.step})"
        line = f"error: {why}, {describe_wait(self.at())}; stacks: {self.stacks}\n"
        # Not through sys.stderr, whose lock the main thread may hold.
        os.write(2, line.encode())
        self.dump(why)
        os._exit(1)

    def dump(self, why: str) -> None:
        """Add `why`, the last instruction and the Python stacks of all threads to this rank's file."""
        if self.file is None:
            self.open()
        with suppress(OSError, ValueError):
            file = self.file or sys.__stderr__
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} pid {os.getpid()}: {why}, {describe_wait(self.at())}\n")
            file.flush()
            faulthandler.dump_traceback(file)

    def beat(self, phase: Phase) -> None:
        """Tell an operator what this rank is doing, where the run folder can be written."""
        at = self.at()
        facts = {
            "rank": self.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "section": phase.section,
            "step": phase.step,
            "seconds": round(time.monotonic() - phase.since, 1),
            "instruction": at and str(at),
            "time": time.time(),
        }
        folder = self.out / "heartbeat"
        with suppress(OSError):
            if self.out.is_dir():
                folder.mkdir(exist_ok=True)
                # Renamed, so that nobody reads half of it; not flushed to disk, as nobody needs it after a crash.
                staged = folder / f".rank_{self.rank}.tmp"
                staged.write_text(json.dumps(facts) + "\n")
                staged.replace(folder / f"rank_{self.rank}.json")


def describe_wait(at: Instruction | None) -> str:
    """Where in the schedule: the instruction, and its layer in words."""
    return f"last instruction {at} (layer {at.layer})" if at else "before any instruction"


# What gloo says of a rank that is gone or silent; NCCL raises DistBackendError.
LOST = ("gloo", "timed out", "timeout", "connection closed", "connection reset", "broken pipe")


@contextmanager
def end_when_alone(
    at: Callable[[], Instruction | None], dump: Callable[[str], None] = lambda why: None
) -> Iterator[None]:
    """End this process, exit code 1 and one line on stderr, where another rank is gone or silent.

    The line names this rank and the instruction that it had come to (`at`); `dump` is told why and where before the
    end. Nothing is cleaned up: whatever talks to the others would wait for them again.
    """
    try:
        yield
    except RuntimeError as error:
        text = one_line(error, limit=300)
        if not isinstance(error, dist.DistError) and not any(sign in text.lower() for sign in LOST):
            raise
        doing = f"in {at()} (layer {at().layer})" if at() else "outside the layers"
        why = f"rank {dist.get_rank()} lost another rank {doing}: {text}"
        print(f"error: {why}", file=sys.stderr, flush=True)
        # What unwound to here no longer shows in the stacks.
        dump(f"{why}\n{traceback.format_exc()}")
        os._exit(1)
