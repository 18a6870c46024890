"""Rank 0's output: metrics to files, progress and messages to the terminal. The logs of other ranks are silent."""

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from ..config import one_line
from ..records import METRICS, cut_metrics
from .bad_steps import BadRows
from .plateau import Plateau
from .trackers import TRACKERS, Tracked

# The metrics of a step shown beside the progress bar.
SHOWN = ("stage", "loss", "accuracy", "tokens_per_s")
# Seconds between two lines of `RunLog.say_sometimes`.
SOMETIMES_S = 15.0
# Some thousand records.
BUFFER_BYTES = 2**20


class RunLog:
    """Writes metrics, prints progress and messages, and warns when training looks wrong."""

    def __init__(self, out: Path, rank: int, log_every: int):
        """out: run folder; log_every: steps between two lines where stderr is no terminal."""
        self.out, self.speaks, self.log_every = out, rank == 0, log_every
        self.metrics: MetricsWriter | None = None
        self.plateau = Plateau()
        # When `say_sometimes` spoke last.
        self.said = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line on standard output."""
        if self.speaks:
            show(text, sys.stdout)

    def say_sometimes(self, text: str) -> None:
        """Print a line of many that tell of progress, at most one every SOMETIMES_S."""
        if time.monotonic() - self.said > SOMETIMES_S:
            self.said = time.monotonic()
            self.say(text)

    def complain(self, text: str) -> None:
        """Print a line on standard error."""
        if self.speaks:
            show(text, sys.stderr)

    def start(self, done: int, total: int, trackers: Sequence[str], config: dict) -> None:
        """Open the files in the run folder; `done` of `total` steps were made by earlier processes.

        trackers: names in TRACKERS; config: the complete configuration, for those that show it.
        """
        if self.speaks:
            self.metrics = MetricsWriter(self.out, done, total, trackers, config)

    def expect(self, total: int) -> None:
        """Correct the total number of steps after a stage ended early."""
        if self.metrics:
            self.metrics.bar.expect(total)

    def enter_stage(self) -> None:
        """Forget the accuracies of the previous stage."""
        self.plateau = Plateau()

    def step(self, step: int, values: dict[str, float], warning: str | None) -> None:
        """Log the metrics of a training step and print `warning`, if any."""
        if not self.metrics:
            return
        self.metrics.write("train", step, values)
        shown = {name: values[name] for name in SHOWN if name in values}
        self.metrics.bar.show(step, shown, step % self.log_every == 0)
        if "key_blind" in values:
            self.plateau.add(int(values["pairs"]), values["accuracy"], values["key_blind"])
        for note in (warning, self.plateau.notice()):
            if note:
                self.metrics.bar.say(f"step {step}: {note}")

    def validation(self, step: int, values: dict[str, float]) -> None:
        """Log the metrics of a validation."""
        if self.metrics:
            self.metrics.write("validation", step, values)
            text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            self.metrics.bar.say(f"step {step}: validation {text}")

    def skipped(self, step: int, batch: int, found: BadRows) -> None:
        """Log a step that all ranks skipped, and the bad rows of global batch `batch`."""
        if self.metrics:
            self.metrics.write("skipped", step, {"batch": batch, **found._asdict()})
        rows = one_line(", ".join(map(str, found.rows)))
        samples = one_line(", ".join(map(str, found.sample_ids)))
        self.say(f"step {step} was skipped (non-finite loss or gradients): rows {rows}; samples {samples}")

    def rollback(self, step: int, tag: str, to: int, passed_over: int) -> None:
        """Log a return from `step` to checkpoint `tag` of step `to`, which leaves out `passed_over` batches."""
        if self.metrics:
            self.metrics.write("rollback", step, {"to": to, "passed_over": passed_over})
        self.say(f"step {step}: the loss spiked; rolled back to {tag}, skipping the batches since then")

    def finish(self, code: int = 0) -> None:
        """Close the files; code: exit code of the run."""
        if self.metrics:
            self.metrics.close(code)


def show(text: str, stream: TextIO) -> None:
    """Print a line. A reader that has gone, or a full disk, is no reason to end a run."""
    with suppress(OSError):
        print(text, file=stream, flush=True)


class ProgressBar:
    """A bar in a terminal; in a log file, a line now and then."""

    def __init__(self, done: int, total: int, name: str):
        self.done, self.total, self.name, self.start_s = done, total, name, time.monotonic()
        self.plain = not sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, desc=name, dynamic_ncols=True, disable=self.plain)

    def show(self, step: int, values: dict[str, float], print_line: bool) -> None:
        """Move the bar, or print a line in a log file if `print_line`."""
        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        if not self.plain:
            with suppress(OSError):
                self.bar.n = step
                self.bar.set_postfix_str(text)
        elif print_line:
            left = tqdm.format_interval(self.seconds_left(step))
            show(f"{self.name} step {step}/{self.total}  {text}  {left} left", sys.stderr)

    def seconds_left(self, step: int) -> float:
        """Estimate the remaining time from the mean speed of this process."""
        made = step - self.done
        return (time.monotonic() - self.start_s) / made * (self.total - step) if made else 0.0

    def expect(self, total: int) -> None:
        """Change the total number of steps."""
        self.total = self.bar.total = total

    def say(self, text: str) -> None:
        """Print a line on standard error without breaking the bar."""
        with suppress(OSError):
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()


class MetricsWriter:
    """Appends to metrics.jsonl in the run folder, and to trackers. A full disk may cost records, never the run."""

    def __init__(
        self,
        folder: Path,
        done: int,
        total: int,
        trackers: Sequence[str] = ("tensorboard",),
        config: dict | None = None,
    ):
        """Keep the records of the first `done` steps; a stopped run repeats the later ones."""
        self.path = folder / METRICS
        cut_metrics(folder, done)
        # What a full disk does not take waits here until it does, or the run ends.
        self.file = self.path.open("ab", buffering=BUFFER_BYTES)
        self.bar = ProgressBar(done, total, folder.name)
        tracked = Tracked(folder, done, config or {}, self.bar.say)
        self.trackers = [TRACKERS[name](tracked) for name in dict.fromkeys(trackers)]
        self.failed = False

    def write(self, kind: str, step: int, values: dict) -> None:
        """Append a record of `kind` ("train", "validation", "skipped" or "rollback") after `step` steps.

        A non-finite number becomes null.
        """
        values = {name: value if is_json_number(value) else None for name, value in values.items()}
        scalars = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        try:
            self.file.write(json.dumps({"kind": kind, "step": step, **values}).encode() + b"\n")
            self.file.flush()
            for tracker in self.trackers:
                tracker.log(step, scalars)
        except OSError as error:
            self.warn(error)

    def warn(self, error: OSError) -> None:
        """Warn once that metrics are being lost."""
        if not self.failed:
            self.bar.say(f"warning: {self.path.parent}: metrics cannot be written ({error}); the run continues")
        self.failed = True

    def close(self, code: int = 0) -> None:
        """Close the bar and the files; code: exit code of the run."""
        self.bar.close()
        closes: list[Callable[[], None]] = [partial(tracker.close, code) for tracker in self.trackers]
        for close in (*closes, self.file.close):
            try:
                close()
            except OSError as error:
                self.warn(error)


def is_json_number(value: object) -> bool:
    """False only for inf and nan, which JSON cannot represent."""
    return not isinstance(value, float) or math.isfinite(value)
