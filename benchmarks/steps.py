"""Run benchmarks one after the other, each within a time limit of its own; one that fails does not stop the others.

A step's output goes to LOGS/NAME.log and its last line of JSON into the report: a table at a glance, then what each
step printed. Used by gpu.py.
"""

import datetime
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ranks import ROOT, commit, table

# Lines of a step's output in the report.
SHOWN = 60


class Step(NamedTuple):
    """A script of this folder with its arguments; `headline` says its result in a few words."""

    name: str
    arguments: Sequence[str]
    limit_s: float
    headline: Callable[[dict], str]


class Outcome(NamedTuple):
    """How a step ended."""

    step: Step
    status: str
    seconds: float
    result: dict | None
    log: str


def run_step(step: Step, logs: Path) -> Outcome:
    """Run one step. At its limit all its processes are killed."""
    path, started = logs / f"{step.name}.log", time.monotonic()
    command = [sys.executable, str(ROOT / "benchmarks" / step.arguments[0]), *step.arguments[1:]]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "PYTHONUNBUFFERED": "1"}
    with path.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout=step.limit_s)
            status = "ok" if code == 0 else f"FAILED, exit code {code}"
        except subprocess.TimeoutExpired:
            status = f"FAILED, not done within {step.limit_s:g} s"
        finally:
            # What it left behind would disturb the next one.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    log = path.read_text(errors="replace")
    return Outcome(step, status, time.monotonic() - started, last_json(log), log)


def last_json(log: str) -> dict | None:
    """The last line that is a JSON object."""
    for line in reversed(log.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                continue
    return None


def headline(outcome: Outcome) -> str:
    """The step's result in a few words, or the end of what it said."""
    if outcome.result is not None:
        try:
            return outcome.step.headline(outcome.result)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            return f"its result has no {error}"
    lines = [line for line in outcome.log.splitlines() if line.strip()]
    return lines[-1][:160] if lines else "said nothing"


def run_steps(title: str, steps: Sequence[Step], folder: Path, name: str) -> int:
    """Run all steps, and write FOLDER/NAME.md and .json after each. Returns how many failed."""
    logs = folder / f"{name}_logs"
    logs.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for step in steps:
        print(f"== {step.name} (at most {step.limit_s:g} s)", flush=True)
        outcomes.append(run_step(step, logs))
        print(f"   {outcomes[-1].status}, {outcomes[-1].seconds:.0f} s: {headline(outcomes[-1])}", flush=True)
        write_report(title, outcomes, folder, name)
    print(f"report: {folder / name}.md")
    return sum(outcome.status != "ok" for outcome in outcomes)


def write_report(title: str, outcomes: Sequence[Outcome], folder: Path, name: str) -> None:
    """Write what is known so far."""
    where = f"{platform.machine()}, {os.cpu_count()} CPU cores"
    lines = [f"# {title}", f"{datetime.date.today()}, {where}, commit {commit() or 'unknown'}."]
    rows = [[o.step.name, o.status, f"{o.seconds:.0f}", headline(o)] for o in outcomes]
    lines.append(table(["step", "status", "s", "result"], rows))
    for outcome in outcomes:
        shown = [line for line in outcome.log.splitlines() if not line.startswith("{")][-SHOWN:]
        command = shlex.join(["python", f"benchmarks/{outcome.step.arguments[0]}", *outcome.step.arguments[1:]])
        lines += [f"## {outcome.step.name}", f"`{command}`", "```\n" + "\n".join(shown) + "\n```"]
    (folder / f"{name}.md").write_text("\n\n".join(lines) + "\n")
    found = {o.step.name: {"status": o.status, "seconds": round(o.seconds, 1), "result": o.result} for o in outcomes}
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
