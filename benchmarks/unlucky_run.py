"""A run of four ranks under Slurm, and the user who looks after it. Used by bad_luck.py."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from faults import end, losses
from misfortunes import Place, ranks_of
from ranks import ROOT

# ranks.py has put tests/ on the path.
from support.faults import start  # isort: skip
from support.slurm_cluster import Cluster  # isort: skip

NODES, RANKS_PER_NODE, WATCHDOG_S, KEEP_LAST, LAST_STEPS = 2, 2, 12, 3, 8
# Limit for a run to recover: the longest start on busy cores, and Slurm's delays.
RECOVERY_S = 240
# And submissions until then: some, if a user tries again while the disk is still full.
RECOVERY_SUBMISSIONS = 5
# The preflight wants 1 GiB.
RUN_DISK_MB, LOG_DISK_MB = 1200, 4
SETTINGS = [
    "--ds_config",
    str(ROOT / "ds_configs/zero3_fp32.json"),
    "ds_config.train_batch_size=8",
    "model.base_config.resid_pdrop=0.1",
    "curriculum.0.steps=1000000",
    "curriculum.0.at_least=1.0",
    "curriculum.0.until=null",
    "parallel.sp=2",
    "parallel.timeout_s=40",
    "train.save_every=5",
    f"train.keep_last={KEEP_LAST}",
    "train.validate_every=17",
    "train.validation_steps=1",
    f"watchdog.step_s={WATCHDOG_S}",
    f"watchdog.checkpoint_s={WATCHDOG_S}",
    f"watchdog.validation_s={WATCHDOG_S}",
    "watchdog.setup_s=90",
    "watchdog.heartbeat_s=2",
]
# A sleep in every cell, so that a run of minutes has hundreds of steps rather than thousands.
PLANTS = ["slow:size=0.01", "wrong_time"]
LIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")


class Run:
    """A run of one seed and the user who looks after it: its job is submitted again when it ends."""

    def __init__(self, slurm: Cluster, folder: Path):
        self.slurm, self.folder = slurm, folder
        self.path, self.logs, self.clocks = folder / "runs/unlucky", folder / "logs", folder / "clocks"
        self.submissions, self.job = 0, ""

    def submit(self, *more: str) -> None:
        """Submit the job, for the first time or again."""
        self.submissions += 1
        background = f"train.save_in_background={str(self.submissions % 2 == 0).lower()}"
        options = ["--job-name=unlucky", f"--nodes={NODES}", f"--output={self.logs}/%x-%j.log"]
        environ = {"PYTHON": str(self.folder / "python"), "RANKS_PER_NODE": str(RANKS_PER_NODE), "LOST_NODE_S": "60"}
        environ |= {"WRONG_TIME": str(self.clocks), "OMP_NUM_THREADS": "1"}
        script = "slurm/train_armt_8node.sh"
        self.job = self.slurm.submit(*options, script, *SETTINGS, background, *more, cwd=self.folder, **environ)

    def place(self) -> Place:
        """Return where the present job is."""
        return Place(self.slurm, self.job, self.path, self.logs, self.clocks, WATCHDOG_S)

    def look_after(self, well: Callable[[], bool]) -> None:
        """Submit the job again whenever it has ended, until `well`. AssertionError if it does not recover."""
        deadline, before = time.monotonic() + RECOVERY_S, self.submissions
        while not well():
            if self.slurm.job(self.job).state not in LIVE:
                assert self.submissions < before + RECOVERY_SUBMISSIONS, f"does not recover:\n{self.said()}"
                self.submit()
            assert time.monotonic() < deadline, f"not recovered after {RECOVERY_S} s:\n{self.said()}"
            time.sleep(0.5)

    def said(self) -> str:
        """Return the end of the job's log."""
        path = self.logs / f"unlucky-{self.job}.log"
        return path.read_text()[-4000:] if path.exists() else ""

    def has_ranks(self) -> bool:
        """Return whether all ranks have started."""
        return len(ranks_of(self.place())) == NODES * RANKS_PER_NODE

    def made(self) -> int:
        """Return the last step that the run has recorded."""
        return max((step for kind, step in losses(self.path) if kind == "train"), default=0)

    def goes_on(self) -> Callable[[], bool]:
        """Return a function that tells whether the run has made three steps more than now, or than it resumed from."""
        least = self.made()

        def look() -> bool:
            nonlocal least
            made = self.made()
            least = min(least, made)
            return made >= least + 3

        return look

    def finish(self) -> int:
        """Cancel the job and let the run make its last steps; return the step at which it ends."""
        self.slurm.command("scancel", self.job)
        self.slurm.wait(self.job, 60)
        last = self.made() + LAST_STEPS
        self.submit(f"train.max_steps={last}")
        ended = self.slurm.wait(self.job, RECOVERY_S)
        assert ended.state == "COMPLETED", self.said()
        return last


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """Mount a disk of its own at `folder`. Needs root."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        # Lazily: a process that is about to end may still have a file open.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def make_checkout(folder: Path) -> None:
    """Make a folder to submit from: this repository, whose ranks have plants, and a Python that obeys permissions.

    The permissions of files do not hold for root unless it gives up two capabilities.
    """
    for name in ("armt_dist", "ds_configs", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "launch").mkdir()
    for name in ("node.py", "preflight.py"):
        (folder / "launch" / name).symlink_to(ROOT / "launch" / name)
    (folder / "launch/train.py").write_text(
        "import runpy, sys\n"
        "checks = any(argument.startswith('--check') for argument in sys.argv)\n"
        f"sys.argv[1:1] = [] if checks else [*{PLANTS!r}, '--']\n"
        f"name = {str(ROOT / 'launch/train.py')!r} if checks else {str(ROOT / 'tests/support/faults.py')!r}\n"
        "runpy.run_path(name, run_name='__main__')\n"
    )
    python = folder / "python"
    python.write_text(
        f'#!/bin/sh\nexec setpriv --bounding-set=-dac_override,-dac_read_search "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)


def undisturbed(out: Path, steps: int) -> None:
    """Make the run that nothing happens to."""
    ranks = start(NODES * RANKS_PER_NODE, [*SETTINGS, f"train.max_steps={steps}", "--out", out])
    try:
        codes = end(ranks, limit_s=300 + 3 * steps)
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * len(ranks), f"the undisturbed run ended with {codes}"
