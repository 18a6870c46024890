"""Where metrics go beside metrics.jsonl: TensorBoard, and Weights & Biases (wandb). One row of TRACKERS each."""

import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Any, NamedTuple, Protocol

from ..config import one_line
from ..records import WANDB, read_json, write_json

# The id of the run at wandb, with which a resumed run goes on there.
WANDB_ID = "wandb.json"
# Records that may wait for wandb; more are dropped.
WAITING = 10_000
# Seconds that wandb may take to start, to send the rest at the end, and for both where they come together.
START_S, FINISH_S, CLOSE_S = 30.0, 20.0, 60.0
# Settings of wandb whose variable is not WANDB_ and the setting's name.
VARIABLES = {"run_name": "WANDB_NAME", "root_dir": "WANDB_DIR"}


class Tracked(NamedTuple):
    """The run whose metrics are tracked."""

    folder: Path  # the run folder
    done: int  # steps that are made; records of later ones are those of a stopped process
    config: dict  # the complete configuration
    say: Callable[[str], None]  # prints a line on standard error


class Tracker(Protocol):
    """Takes the metrics of rank 0."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record values after `step` steps. Raises OSError."""

    def close(self, code: int) -> None:
        """Write what is left; code: exit code of the run. Raises OSError."""


class TensorBoard:
    """Writes event files into the run folder."""

    def __init__(self, run: Tracked) -> None:
        # Slow to import, and only rank 0 needs it.
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(run.folder / "tensorboard", purge_step=run.done + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record values after `step` steps. Raises OSError."""
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def close(self, code: int) -> None:
        """Write what is left. Raises OSError."""
        self.board.close()


class Wandb:
    """Hands metrics to wandb in a thread: a slow or failing network costs metrics there, never time of the run."""

    def __init__(self, run: Tracked) -> None:
        self.run, self.code, self.dropped = run, 0, 0
        self.queue: Queue[dict | None] = Queue(WAITING)
        self.thread = Thread(target=self.work, name="wandb", daemon=True)
        self.thread.start()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Put values into the queue of the thread."""
        self.put({"step": step, **values})

    def close(self, code: int) -> None:
        """Wait until all is handed over, for CLOSE_S at most; code: exit code of the run."""
        self.code = code
        self.put(None)
        self.thread.join(CLOSE_S)
        if self.dropped or self.thread.is_alive():
            self.run.say("warning: wandb was too slow, and lacks records of metrics.jsonl")

    def put(self, record: dict | None) -> None:
        """Put a record, or None at the end, into the queue, unless it is full or the thread has ended."""
        try:
            if self.thread.is_alive():
                self.queue.put_nowait(record)
        except Full:
            self.dropped += 1

    def work(self) -> None:
        """Start a run at wandb and log what is in the queue. Whatever goes wrong is one line."""
        try:
            found = start_wandb(self.run)
            self.run.say(f"wandb: {found.dir if found.offline else found.url}")
            for record in iter(self.queue.get, None):
                found.log(record)
            found.finish(exit_code=self.code)
        except Exception as error:
            self.run.say(f"warning: wandb: {one_line(error)}; the run continues without it")


def start_wandb(run: Tracked) -> Any:
    """Return a run of wandb, or the one that this run folder had before, going on; offline where it cannot start.

    Its metrics are drawn over their own `step`, because wandb's counter cannot go back, as a rollback does. Raises
    ImportError, OSError and wandb's errors.
    """
    import wandb

    settings = wandb_settings(run)
    if "silent" in settings:
        # Or `init` asks in the terminal for a key.
        wandb.setup(wandb.Settings(silent=True))
    try:
        found = wandb.init(config=run.config, settings=wandb.Settings(**settings))
    except wandb.Error as error:
        kept = f"the metrics are kept in {run.folder / WANDB} (wandb sync)"
        run.say(f"warning: wandb: {one_line(error)}; {kept}")
        # The id stays in use otherwise.
        wandb.teardown()
        found = wandb.init(config=run.config, settings=wandb.Settings(**settings, mode="offline"))
    found.define_metric("step")
    found.define_metric("*", step_metric="step")
    return found


def wandb_settings(run: Tracked) -> dict[str, Any]:
    """Return the settings of wandb for which no variable is set. Raises OSError.

    A run is named like its folder, and its project like the folder that this one is in.
    """
    folder = run.folder.resolve()
    settings = {
        "run_id": wandb_id(run.folder),
        "project": re.sub(r"[/\\#?%:]", "-", folder.parent.name)[:128] or "armt_dist",
        "run_name": folder.name,
        "root_dir": str(run.folder),
        "resume": "allow",
        "init_timeout": START_S,
        "finish_timeout": FINISH_S,
        # A run folder has no links.
        "symlink": False,
        # What the run prints stays where it is printed.
        "console": "off",
        "silent": True,
    }
    return {
        name: value
        for name, value in settings.items()
        if VARIABLES.get(name, f"WANDB_{name.upper()}") not in os.environ
    }


def wandb_id(folder: Path) -> str:
    """Return the id of this run folder's run at wandb, which is kept there. Raises OSError."""
    kept = read_json(folder / WANDB_ID).get("id")
    known = kept if isinstance(kept, str) and re.fullmatch(r"[\w-]{1,64}", kept) else uuid.uuid4().hex
    wanted = os.environ.get("WANDB_RUN_ID", known)
    if wanted != kept:
        write_json(folder / WANDB_ID, {"id": wanted})
    return wanted


TRACKERS: dict[str, Callable[[Tracked], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb}
