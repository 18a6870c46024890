"""What a run tells while it goes on, and at its end. Rank 0 speaks; the other ranks' reporters are silent."""

import json
import math
import sys
import time
from pathlib import Path

from tqdm import tqdm

from ..config import one_line
from .bad_steps import BadRows
from .plateau import Plateau

# Metrics of a step that a person is shown.
SHOWN = ("stage", "loss", "accuracy", "tokens_per_s")


class Reporter:
    """Metrics to files, lines to people, and notices where something looks wrong."""

    def __init__(self, out: Path, rank: int, log_every: int):
        """`out`: the run folder; every `log_every` steps a line is written where there is no progress bar."""
        self.out, self.speaks, self.log_every = out, rank == 0, log_every
        self.metrics: Metrics | None = None
        self.plateau = Plateau()

    def say(self, text: str) -> None:
        """A line on standard output."""
        if self.speaks:
            print(text, flush=True)

    def complain(self, text: str) -> None:
        """A line on standard error."""
        if self.speaks:
            print(text, file=sys.stderr, flush=True)

    def start(self, done: int, total: int) -> None:
        """The run folder is there; `done` of `total` steps were made before."""
        if self.speaks:
            self.metrics = Metrics(self.out, done, total, self.out.name)

    def expect(self, total: int) -> None:
        """A stage ended early: the run will have `total` steps."""
        if self.metrics:
            self.metrics.expect(total)

    def enter_stage(self) -> None:
        """What was noticed of the stage before says nothing of the one that begins."""
        self.plateau = Plateau()

    def step(self, step: int, values: dict[str, float], slow: str | None) -> None:
        """The metrics of a step; `slow`: what there is to say of slow ranks."""
        if not self.metrics:
            return
        self.metrics.write("train", step, values)
        shown = {name: values[name] for name in SHOWN if name in values}
        self.metrics.show(step, shown, step % self.log_every == 0)
        if "key_blind" in values:
            self.plateau.add(values["pairs"], values["accuracy"], values["key_blind"])
        for note in (slow, self.plateau.notice()):
            if note:
                self.metrics.say(f"step {step}: {note}")

    def validation(self, step: int, values: dict[str, float]) -> None:
        """The metrics of a validation."""
        if self.metrics:
            self.metrics.write("validation", step, values)
            text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            self.metrics.say(f"step {step}: validation {text}")

    def skipped(self, step: int, batch: int, found: BadRows) -> None:
        """A step that no rank made, and the rows of global batch `batch` that were bad."""
        if self.metrics:
            self.metrics.write("skipped", step, {"batch": batch, **found._asdict()})
        rows = one_line(", ".join(map(str, found.rows)))
        samples = one_line(", ".join(map(str, found.sample_ids)))
        self.say(f"step {step} was skipped: loss or gradients not finite; rows {rows}; samples {samples}")

    def rollback(self, step: int, tag: str, to: int, passed_over: int) -> None:
        """From `step` back to checkpoint `tag` of step `to`; `passed_over` batches are left out since."""
        if self.metrics:
            self.metrics.write("rollback", step, {"to": to, "passed_over": passed_over})
        self.say(f"step {step}: the loss jumped; back to {tag}, without the batches since")

    def finish(self) -> None:
        """Close the files."""
        if self.metrics:
            self.metrics.close()


class Metrics:
    """The writer of rank 0."""

    def __init__(self, folder: Path, done: int, total: int, description: str):
        """`done` steps were made before; what a stopped run wrote after them is dropped and made again."""
        # Slow to import, and only rank 0 needs it.
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        kept = [line for line in self.lines() if json.loads(line)["step"] <= done]
        self.path.write_text("".join(line + "\n" for line in kept))
        self.file = self.path.open("a", buffering=1)
        self.board = SummaryWriter(folder / "tensorboard", purge_step=done + 1)
        self.done, self.total, self.description, self.start_s = done, total, description, time.monotonic()
        self.complained = False
        # A log file wants lines now and then, not a bar.
        self.plain = not sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, desc=description, dynamic_ncols=True, disable=self.plain)

    def lines(self) -> list[str]:
        """The complete lines written so far."""
        if not self.path.exists():
            return []
        return [line for line in self.path.read_text().splitlines() if line.endswith("}")]

    def write(self, kind: str, step: int, values: dict) -> None:
        """One record of `kind` ("train", "validation", "skipped" or "rollback") after `step` steps.

        A number that is not finite, which JSON does not have, is null. A full disk costs records, not the run.
        """
        values = {name: None if not finite(value) else value for name, value in values.items()}
        try:
            self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            for name, value in values.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(f"{kind}/{name}", value, step)
        except OSError as error:
            self.lost(error)

    def lost(self, error: OSError) -> None:
        """Say once that records are not written."""
        if not self.complained:
            self.say(f"warning: {self.path.parent}: metrics cannot be written ({error}); the run goes on")
        self.complained = True

    def show(self, step: int, values: dict, say: bool) -> None:
        """Move the bar; in a log file print a line if `say`."""
        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        if not self.plain:
            self.bar.n = step
            self.bar.set_postfix_str(text)
        elif say:
            left = tqdm.format_interval(self.seconds_left(step))
            print(f"{self.description} step {step}/{self.total}  {text}  {left} left", file=sys.stderr, flush=True)

    def expect(self, total: int) -> None:
        """A stage ended early: the run will have `total` steps."""
        self.total = self.bar.total = total

    def seconds_left(self, step: int) -> float:
        """At the mean speed of this process."""
        made = step - self.done
        return (time.monotonic() - self.start_s) / made * (self.total - step) if made else 0.0

    def say(self, text: str) -> None:
        """A line for a person."""
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()
        for stream in (self.board, self.file):
            try:
                stream.close()
            except OSError as error:
                self.lost(error)


def finite(value: object) -> bool:
    """Whether JSON has this number; whatever is no number, it has."""
    return not isinstance(value, float) or math.isfinite(value)
