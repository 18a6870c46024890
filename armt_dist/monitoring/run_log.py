"""What a run tells while it goes on, and at its end. Rank 0 speaks; the other ranks' reporters are silent."""

import sys
from pathlib import Path

from ..config import one_line
from ..evaluation import run_report as report
from .bad_steps import BadRows
from .metrics import Metrics
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
        """The report of the whole run."""
        if self.metrics:
            self.metrics.close()
            self.say(f"report: {report.write_run_report(self.out)}")
