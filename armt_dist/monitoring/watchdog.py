"""Ends a rank that is stuck and reports where: one line, its Python stacks, the last instruction of its schedule.

A run is always in one section: set-up, step, validation or checkpoint. A rank that waits forever, in a gather, a
hand-off or a file system, stays in its section. Three watchers, each for cases that the previous one misses:

* a thread compares the section's age with its limit; waits in gloo, NCCL and file systems release the interpreter;
* faulthandler's timer fires a little later and needs no interpreter, which the main thread may hold in C;
* faulthandler's signal handlers write the stacks of a process that is aborted, for example by NCCL's own watchdog.
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
from typing import Literal, NamedTuple, TextIO

import torch.distributed as dist

from ..config import one_line
from ..distributed.collectives import is_lost_rank
from ..records import RUN_CONFIG
from ..schedule.program import Instruction
from .sections import WatchdogConfig

Name = Literal["setup", "step", "validation", "checkpoint"]
POLL_S = 0.5
# Delay of faulthandler's timer after the thread's limit.
TIMER_LATER_S = 5.0
# Of a heartbeat file; the content is padded with spaces.
BEAT_BYTES = 512
# First steps, in which ZeRO-3 records the order of gathers and kernels are compiled.
SLOW_STEPS = 2


class Phase(NamedTuple):
    """What a rank is doing. Replaced as a whole, so that the thread always reads a consistent one."""

    section: Name
    step: int
    since: float  # time.monotonic()
    limit_s: float


class Watchdog:
    """The watchers of one rank. `enter` begins a section and ends the previous one; `close` stops watching.

    Nothing is written to the folder `out` before it holds a run, unless this rank is stuck.
    """

    def __init__(self, config: WatchdogConfig, out: Path, rank: int):
        self.config, self.out, self.rank = config, out, rank
        self.stacks = out / "stacks" / f"rank_{rank}.txt"
        # Returns the instruction that the rank began last; replaced once the model exists.
        self.at: Callable[[], Instruction | None] = lambda: None
        self.file: TextIO | None = None
        # Descriptor of the heartbeat file; None before the first one.
        self.beats: int | None = None
        self.steps = 0
        self.closed = threading.Event()
        self.enter("setup")
        threading.Thread(target=self.watch, name="watchdog", daemon=True).start()

    def enter(self, section: Name, step: int = 0) -> None:
        """Begin `section` after `step` steps."""
        limit_s = getattr(self.config, f"{section}_s")
        if section == "step":
            self.steps += 1
            if self.steps <= SLOW_STEPS:
                limit_s = max(limit_s, self.config.setup_s)
        self.phase = Phase(section, step, time.monotonic(), limit_s)
        if self.file is None and self.has_run():
            self.open()
        faulthandler.dump_traceback_later(limit_s + TIMER_LATER_S, exit=True, file=self.file or real_stderr())

    def has_run(self) -> bool:
        """Return whether the folder holds a run: there is none during the first set-up."""
        return (self.out / RUN_CONFIG).is_file()

    def close(self) -> None:
        """Stop watching, and remove the file for stacks if it is empty."""
        self.closed.set()
        faulthandler.cancel_dump_traceback_later()
        if self.file is None:
            return
        if self.enabled_before:
            faulthandler.enable(real_stderr())
        else:
            faulthandler.disable()
        self.file.close()
        self.file = None
        with suppress(OSError):
            if not self.stacks.stat().st_size:
                self.stacks.unlink()

    def open(self) -> None:
        """Open the file for stacks early: a stuck rank may be stuck in its file system."""
        with suppress(OSError):
            self.stacks.parent.mkdir(parents=True, exist_ok=True)
            # Appended to: it may say why the previous process ended.
            self.file = self.stacks.open("a", encoding="utf-8")
            self.enabled_before = faulthandler.is_enabled()
            faulthandler.enable(self.file)

    def watch(self) -> None:
        """Check the limit and write heartbeats: the body of the thread."""
        due = 0.0
        while not self.closed.wait(POLL_S):
            now, phase = time.monotonic(), self.phase
            if now - phase.since > phase.limit_s:
                self.end(phase)
            if now >= due and (self.beats is not None or self.has_run()):
                self.beat(phase)
                due = now + self.config.heartbeat_s
        if self.beats is not None:
            os.close(self.beats)
            self.beats = None

    def end(self, phase: Phase) -> None:
        """End the process with exit code 1, without clean-up, which could wait for the other ranks again."""
        why = f"rank {self.rank} spent more than {phase.limit_s:g} s in {phase.section} (after step {phase.step})"
        line = f"error: {why}, {describe_wait(self.at())}; stacks: {self.stacks}\n"
        report(line)
        self.dump(why)
        os._exit(1)

    def dump(self, why: str) -> None:
        """Append `why`, the last instruction and the Python stacks of all threads to this rank's file."""
        if self.file is None:
            self.open()
        with suppress(OSError, ValueError):
            file = self.file or real_stderr()
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} pid {os.getpid()}: {why}, {describe_wait(self.at())}\n")
            file.flush()
            faulthandler.dump_traceback(file)

    def beat(self, phase: Phase) -> None:
        """Update the heartbeat file, which tells operators what this rank is doing."""
        at = self.at()
        facts = {
            "rank": self.rank,
            "host": socket.gethostname()[:100],
            "pid": os.getpid(),
            "section": phase.section,
            "step": phase.step,
            "seconds": round(time.monotonic() - phase.since, 1),
            "instruction": at and str(at),
            "time": time.time(),
        }
        content = (json.dumps(facts) + "\n").encode().ljust(BEAT_BYTES)
        with suppress(OSError):
            if self.beats is None:
                self.beats = self.open_beats()
            os.pwrite(self.beats, content, 0)
            # NFS shows it to other machines only then.
            os.fdatasync(self.beats)

    def open_beats(self) -> int:
        """Open the heartbeat file for good, and return its descriptor. Raises OSError.

        Thousands of ranks that each created and renamed a file every few seconds would keep a file system's metadata
        server busy. Now they overwrite a few bytes of a file of fixed size.
        """
        folder = self.out / "heartbeat"
        folder.mkdir(exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(folder / f"rank_{self.rank}.json", flags, 0o666)
        os.ftruncate(file, BEAT_BYTES)
        return file


def remove_heartbeats(out: Path, world_size: int) -> None:
    """Remove the heartbeats of ranks that this start does not have: they would look like ranks that are stuck."""
    for file in (out / "heartbeat").glob("rank_*.json"):
        number = file.stem.removeprefix("rank_")
        if number.isdecimal() and int(number) >= world_size:
            file.unlink(missing_ok=True)


def real_stderr() -> TextIO:
    """Return the process's own stderr, which faulthandler needs: a replacement may have no file descriptor."""
    assert sys.__stderr__ is not None, "this process was started without stderr"
    return sys.__stderr__


def describe_wait(at: Instruction | None) -> str:
    """Name the instruction and its layer."""
    return f"last instruction {at} (layer {at.layer})" if at else "before any instruction"


# Taken for good by the thread that reports why this process ends: the limit of a step may run out while the main thread
# reports a lost rank.
reported = threading.Lock()


def report(line: str) -> None:
    """Write `line` to stderr, unless another thread has reported why this process ends: then let that thread end it."""
    if reported.acquire(blocking=False):
        # Not through sys.stderr, whose lock the main thread may hold.
        os.write(2, line.encode())
    else:
        time.sleep(TIMER_LATER_S)


@contextmanager
def end_when_alone(
    at: Callable[[], Instruction | None], dump: Callable[[str], None] = lambda why: None, neighbours: str = ""
) -> Iterator[None]:
    """End this process with exit code 1 and one line on stderr if the block fails because another rank is lost.

    The line names this rank, its host and last instruction, which `at` returns, and the `neighbours` to which it hands
    states, as a collective does not say which rank it has lost. `dump` receives the line and the traceback.
    There is no clean-up, which could wait for the other ranks again.
    """
    try:
        yield
    except RuntimeError as error:
        text = one_line(error, limit=300)
        if not is_lost_rank(error):
            raise
        instruction = at()
        doing = f"in {instruction} (layer {instruction.layer})" if instruction else "outside the layers"
        why = f"rank {dist.get_rank()} on {socket.gethostname()} lost another rank {doing}: {text}"
        if neighbours:
            why += f"; it hands states to and from {neighbours}"
        report(f"error: {why}\n")
        # The failing frames have unwound and are missing from the stacks.
        dump(f"{why}\n{traceback.format_exc()}")
        os._exit(1)
