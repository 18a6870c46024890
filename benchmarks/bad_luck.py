"""A long run under bad luck: four ranks on a private Slurm, and every few seconds a misfortune that a seed draws.

    python benchmarks/bad_luck.py [--seed 0 ...] [--minutes 4] [--most N] [--only KIND ...]

The run has a disk of its own, and so have the job's logs. Misfortunes (misfortunes.py) come in random order, every
kind once before any comes again, at random moments, a quarter of them before the run has recovered from the one before.
Jobs are those of slurm/train_armt_8node.sh, on two nodes. After preemption and the loss of a node they requeue by
themselves. Where they end instead (a rank that was killed, is stuck or lost its peers: 1 or 137; a disk that is full
as the run starts: 2), this script does what a user does: it submits the same command again. Saves are at once or in the
background, submission by submission.

At the end of the time the run makes its last steps undisturbed. Then losses and gradient norms of all steps must be
those of a run that nothing happened to, bit for bit (made once for all seeds), all checkpoints whole, and no files may
be there that this one does not have, but logs and stacks. Needs root, slurm-wlm and munge.
Prints a line for each event, a table by kind, and one JSON line last; exit code 1 if anything differs.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from faults import losses
from misfortunes import MISFORTUNES
from unlucky_run import LOG_DISK_MB, RUN_DISK_MB, Run, make_checkout, small_disk, undisturbed

# ranks.py has put tests/ on the path.
from support.slurm_cluster import cluster  # isort: skip

from armt_dist.checkpoint import folder as checkpoint
from armt_dist.records import markdown_table

# The last one where the next misfortune came before the run had recovered, and the job had not been submitted again.
OUTCOMES = BY_ITSELF, AGAIN, WITH_NEXT = "by itself", "after resubmission", "with the next one"


class Event(NamedTuple):
    """A misfortune, the step that it came after, and how the run recovered: one of OUTCOMES."""

    kind: str
    step: int
    outcome: str


def suffer(run: Run, draw: random.Random, seconds: float, most: int, kinds: Sequence[str]) -> list[Event]:
    """Let misfortunes happen to a run for so long or so often, each kind once before any comes again."""
    events: list[Event] = []
    left: list[str] = []
    begun = time.monotonic()
    run.submit()
    # The newest may be damaged: there must be another one.
    run.look_after(lambda: len(checkpoint.tags(run.path / "checkpoints")) > 1)
    while time.monotonic() < begun + seconds and len(events) < most:
        left = left or draw.sample(kinds, len(kinds))
        kind, early, pause_s = left.pop(), draw.random() < 0.25, draw.uniform(0, 5)
        run.look_after(run.has_ranks)
        time.sleep(pause_s)
        # It may have ended late because of the one before.
        run.look_after(run.has_ranks)
        step, before, struck = run.made(), run.submissions, time.monotonic()
        MISFORTUNES[kind](run.place(), draw)
        run.look_after(run.has_ranks if early else run.goes_on())
        outcome = AGAIN if run.submissions > before else WITH_NEXT if early else BY_ITSELF
        events.append(Event(kind, step, outcome))
        now = time.monotonic()
        print(f"{now - begun:4.0f} s, step {step}: {kind}; {now - struck:.0f} s, recovers {outcome}", flush=True)
    run.look_after(run.goes_on())
    return events


def different(run: Path, whole: Path, last: int) -> list[tuple[str, int]]:
    """Return kind and step of every record up to `last` that is not that of the undisturbed run, or is missing."""
    expected = {key: value for key, value in losses(whole).items() if key[1] <= last}
    found = losses(run)
    return [key for key in expected.keys() | found.keys() if found.get(key) != expected.get(key)]


def strange_files(run: Path, whole: Path) -> list[str]:
    """Return what is left in a run's folder and not in the undisturbed run's, numbers in names aside."""
    known = {shape(path, whole) for path in whole.rglob("*")} | {"logs", "stacks", "stacks/rank_#.txt"}
    found = [path for path in run.rglob("*") if shape(path, run) not in known]
    return [str(path.relative_to(run)) for path in found if path.relative_to(run).parts[0] != "logs"]


def shape(path: Path, root: Path) -> str:
    """Return a path below `root` with # for every number."""
    return re.sub(r"\d+", "#", path.relative_to(root).as_posix())


def whole_checkpoints(run: Path) -> int:
    """Return the number of checkpoints, all of them verified; `latest` must name the newest."""
    root = run / "checkpoints"
    tags = checkpoint.tags(root)
    for tag in tags:
        checkpoint.verify_checkpoint(root / tag)
    assert (root / "latest").read_text() == tags[-1], f"latest is not {tags[-1]}"
    return len(tags)


def by_kind(events: Sequence[tuple[Event, bool]]) -> list[dict]:
    """Return a row for each kind; the events with whether the records until the next one were equal."""
    rows = []
    for kind in dict.fromkeys(event.kind for event, _ in events):
        of_kind = [(event.outcome, equal) for event, equal in events if event.kind == kind]
        outcomes = [outcome for outcome, _ in of_kind]
        row = {"misfortune": kind, "times": len(of_kind), **{name: outcomes.count(name) for name in OUTCOMES}}
        rows.append(row | {"bits equal": sum(equal for _, equal in of_kind)})
    return rows


def judge(events: Sequence[Event], wrong: Sequence[tuple[str, int]]) -> list[tuple[Event, bool]]:
    """Say for each event whether all records until the next event were equal."""
    bounds = [*(event.step for event in events[1:]), sys.maxsize]
    judged = zip(events, bounds, strict=True)
    return [(event, not any(event.step < step <= bound for _, step in wrong)) for event, bound in judged]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--minutes", type=float, default=4.0, help="for each seed (default %(default)s)")
    parser.add_argument("--most", type=int, default=1000, help="misfortunes of each seed")
    parser.add_argument("--only", nargs="+", choices=MISFORTUNES, default=list(MISFORTUNES), metavar="KIND")
    args = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ended: dict[int, tuple[list[Event], int]] = {}
        slurm = stack.enter_context(cluster())
        for seed in args.seed:
            print(f"seed {seed}", flush=True)
            run = Run(slurm, folder / str(seed))
            stack.enter_context(small_disk(run.path.parent, RUN_DISK_MB))
            stack.enter_context(small_disk(run.logs, LOG_DISK_MB))
            run.clocks.mkdir()
            make_checkout(run.folder)
            try:
                events = suffer(run, random.Random(seed), args.minutes * 60, args.most, args.only)
                ended[seed] = events, run.finish()
            except AssertionError as error:
                print(f"seed {seed} failed: {error}", flush=True)
                slurm.command("scancel", "--name=unlucky")
        judged, results = [], []
        if ended:
            undisturbed(folder / "whole", max(last for _, last in ended.values()))
        for seed, (events, last) in ended.items():
            path = Run(slurm, folder / str(seed)).path
            wrong = different(path, folder / "whole", last)
            judged += judge(events, wrong)
            result = {"seed": seed, "misfortunes": len(events), "steps": last, "different": sorted(wrong)[:5]}
            result |= {"strange_files": strange_files(path, folder / "whole"), "checkpoints": whole_checkpoints(path)}
            results.append(result)
            print(json.dumps(result), flush=True)
    print(markdown_table(by_kind(judged)))
    well = [result for result in results if not result["different"] and not result["strange_files"]]
    summary = {"seeds": len(args.seed), "bit_equal": len(well), "kinds": by_kind(judged)}
    print(json.dumps({"benchmark": "bad_luck", **summary}))
    return 0 if len(well) == len(args.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
