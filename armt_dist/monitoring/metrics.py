"""What a run tells: one line of metrics.jsonl and TensorBoard scalars a step, and a progress bar for a person."""

import json
import math
import sys
import time
from pathlib import Path

from tqdm import tqdm


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
