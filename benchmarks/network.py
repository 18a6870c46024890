"""A network that misbehaves: nodes as network namespaces on this machine (tests/support/network.py). Needs root.

    python benchmarks/network.py [--only PIECE ...] [--nodes 2]

bandwidth  The exposed hand-off of a step at 1000, 100 and 10 Mbit/s a link, beside what the simulator says with the
           latency and bandwidth that launch/preflight.py measures on the same links, and cells from a run on full ones.
faults     Links cut for 2 s, for good, and in one direction; the first node cut while the others start; a node whose
           clock is an hour off. What the user sees, seconds until all ranks have ended, bits after a resume.
Real ranks, one for each node, under torchrun. Prints a line for each row, both tables, and ends with one JSON line.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from faults import losses
from ranks import ROOT

# ranks.py has put tests/ on the path.
from support.network import Network, ended_s, network  # isort: skip

from armt_dist.records import read_metrics
from armt_dist.schedule.calibration import calibrated, read_run, with_network
from armt_dist.schedule.hardware import CPU, unit_costs
from armt_dist.schedule.simulator import simulate_step

RATES_MBIT = (1000, 100, 10)
TIMEOUT_S, STEP_S, SETUP_S = 8, 20, 60
# Of a run that is not disturbed, on busy cores.
LIMIT_S = 240
STEPS, CUT_AFTER = 24, 6
SETTINGS = [
    "--ds_config",
    str(ROOT / "ds_configs/zero3_fp32.json"),
    "parallel.sp=2",
    f"parallel.timeout_s={TIMEOUT_S}",
    "curriculum.0.steps=1000",
    "curriculum.0.at_least=1.0",
    "curriculum.0.until=null",
    "train.validate_every=1000",
    f"watchdog.step_s={STEP_S}",
    f"watchdog.setup_s={SETUP_S}",
    "train.log_every=1",
]
FAULT_SETTINGS = ["ds_config.train_batch_size=8", "model.base_config.resid_pdrop=0.1", f"train.max_steps={STEPS}"]
FAULT_SETTINGS += ["train.save_every=3"]
WIDE = ["ds_config.train_batch_size=8", "train.max_steps=8", "train.save_every=1000", "model.d_mem=128"]


class Trial:
    """Runs of one training on a network, one log for each start of a node."""

    def __init__(self, nodes: Network, folder: Path):
        self.nodes, self.folder = nodes, folder
        folder.mkdir()
        self.run, self.starts = folder / "run", 0

    def start(self, settings: list[str], script: list[str] | None = None, **environ: str) -> list:
        """Start the training on every node."""
        self.starts += 1
        script = script or [str(ROOT / "launch/train.py")]
        ranks = []
        for number in range(1, self.nodes.count + 1):
            command = [*script, *SETTINGS, *settings, "--out", str(self.run)]
            ranks.append(self.nodes.torchrun(number, command, self.log(number), **environ))
        return ranks

    def log(self, number: int) -> Path:
        """Return the log of a node in the last start."""
        return self.folder / f"start{self.starts}_node{number}.log"

    def complete(self, settings: list[str], script: list[str] | None = None, **environ: str) -> None:
        """Run the training to its end."""
        ranks = self.start(settings, script, **environ)
        ended_s(ranks, LIMIT_S)
        assert not any(rank.returncode for rank in ranks), self.log(1).read_text()[-4000:]

    def wait_for_step(self, step: int) -> None:
        """Wait until the run has made a step."""
        deadline = time.monotonic() + LIMIT_S
        while len(losses(self.run)) < step:
            assert time.monotonic() < deadline, self.log(1).read_text()[-4000:]
            time.sleep(0.05)

    def said(self) -> list[str]:
        """Return the error lines of all nodes in the last start."""
        logs = [self.log(number).read_text().splitlines() for number in range(1, self.nodes.count + 1)]
        return [line for log in logs for line in log if line.startswith("error")]


# --- bandwidth


def measured_network(nodes: Network, folder: Path) -> Path:
    """Let the preflight measure the links, and return its file."""
    file = folder / f"network_{nodes.mbit:g}.json"
    command = [ROOT / "launch/preflight.py", "--network", file, "--folder", folder, "--need-gib", "0"]
    logs = [folder / f"preflight_{nodes.mbit:g}_{number}.log" for number in range(1, nodes.count + 1)]
    ranks = [nodes.torchrun(number, command, log) for number, log in enumerate(logs, 1)]
    ended_s(ranks, LIMIT_S)
    assert file.exists(), logs[0].read_text()[-3000:]
    return file


def waits(run: Path) -> dict[str, float]:
    """Return medians over the steps, without those in which prefetching has not seen a whole step yet."""
    records = [record for record in read_metrics(run) if record.get("kind") == "train"][2:]
    names = ("exposed_handoff_s", "skew_s", "gather_wait_s", "cell_s", "step_s")
    return {name: median(record[name] for record in records) for name in names}


def bandwidth(nodes: Network, folder: Path) -> list[dict]:
    """Return a row for each rate: measured and simulated waits, and what the preflight found."""
    nodes.slow_down(None)
    fast = Trial(nodes, folder / "full")
    fast.complete(WIDE)
    rows = []
    for rate in RATES_MBIT:
        nodes.slow_down(rate)
        file = measured_network(nodes, folder)
        trial = Trial(nodes, folder / f"{rate}")
        trial.complete(WIDE)
        found = waits(trial.run)
        measured = read_run(fast.run)
        hardware = with_network(calibrated(CPU, [fast.run]), file)
        costs = unit_costs(measured.run.model, measured.run.work, measured.grid, measured.world, hardware)
        costs = costs._replace(cell_s=found["cell_s"])
        said = simulate_step("wavefront", measured.grid, costs)
        passes = measured.run.work.accumulation
        row = {"mbit": rate, "latency_ms": 1e3 * hardware.handoff_latency_s}
        row |= {"preflight_mbit": 8e-6 * hardware.handoff_bytes_per_s, "state_kb": costs.state_bytes / 1e3}
        row |= {f"{name[:-2]}_ms": 1e3 * found[name] for name in ("exposed_handoff_s", "skew_s", "gather_wait_s")}
        simulated = {"exposed": said.exposed_s, "skew": said.skew_s, "gather": said.gather_wait_s}
        row |= {f"simulated_{name}_ms": 1e3 * passes * sum(each) / len(each) for name, each in simulated.items()}
        row |= {"step_ms": 1e3 * found["step_s"], "simulated_step_ms": 1e3 * passes * said.makespan_s}
        print(" ".join(f"{name}={value:.4g}" for name, value in row.items()), flush=True)
        rows.append(row)
    nodes.slow_down(None)
    return rows


# --- faults


def short_cut(nodes: Network) -> None:
    """The second node's link is cut for 2 s."""
    nodes.cut(2)
    time.sleep(2)
    nodes.mend(2)


def long_cut(nodes: Network) -> None:
    """The second node's link is cut for good."""
    nodes.cut(2)


def cut_out(nodes: Network) -> None:
    """What the second node sends is lost, what it is sent arrives."""
    nodes.cut(2, "out")


def cut_in(nodes: Network) -> None:
    """What the second node is sent is lost, what it sends arrives."""
    nodes.cut(2, "in")


FAULTS: dict[str, Callable[[Network], None]] = {each.__name__: each for each in (short_cut, long_cut, cut_out, cut_in)}


def fault(nodes: Network, folder: Path, name: str, expected: dict) -> dict:
    """Run with a fault after some steps, mend what is still broken, and resume; return a row of the table."""
    trial = Trial(nodes, folder / name)
    ranks = trial.start(FAULT_SETTINGS, SLOWLY)
    trial.wait_for_step(CUT_AFTER)
    begin = time.monotonic()
    FAULTS[name](nodes)
    seconds = max(ended_s(ranks, LIMIT_S)) if name == "short_cut" else time.monotonic() - begin
    if name != "short_cut":
        seconds += max(ended_s(ranks, LIMIT_S))
    codes, said = [rank.returncode for rank in ranks], trial.said()
    nodes.mend(2)
    if any(codes):
        trial.complete(FAULT_SETTINGS)
    return row_of(FAULTS[name].__doc__, codes, said, seconds, losses(trial.run) == expected)


# A sleep in every cell, so that a cut comes in the middle of a run.
SLOWLY = [str(ROOT / "tests/support/faults.py"), "slow:size=0.01", "--"]


def row_of(what: str | None, codes: list[int], said: list[str], seconds: float, equal: bool) -> dict:
    """Return a row of the table, and print it."""
    row = {"fault": (what or "").strip(), "codes": codes, "said": said, "seconds": round(seconds, 1), "equal": equal}
    print(json.dumps(row), flush=True)
    return row


def cut_at_start(nodes: Network, folder: Path, expected: dict) -> dict:
    """The first node, on which all meet, is cut while the others start."""
    trial = Trial(nodes, folder / "cut_at_start")
    nodes.cut(1)
    begin = time.monotonic()
    ranks = trial.start(FAULT_SETTINGS)
    # torchrun's agents wait for each other before any rank starts, for as long as they are told.
    time.sleep(10)
    nodes.mend(1)
    ended_s(ranks, LIMIT_S)
    seconds = time.monotonic() - begin
    codes, said = [rank.returncode for rank in ranks], trial.said()
    return row_of(cut_at_start.__doc__, codes, said, seconds, losses(trial.run) == expected)


def cut_at_meeting(nodes: Network, folder: Path, expected: dict) -> dict:
    """The second node is cut for good once all ranks have started, before they have met."""
    trial = Trial(nodes, folder / "cut_at_meeting")

    def begun() -> bool:
        return all(started(nodes, number) for number in range(1, nodes.count + 1))

    return cut_when(begun, nodes, trial, cut_at_meeting.__doc__, expected)


def cut_in_setup(nodes: Network, folder: Path, expected: dict) -> dict:
    """The second node is cut for good when ranks have met, while they make models and edges."""
    trial = Trial(nodes, folder / "cut_in_setup")
    return cut_when(trial.run.exists, nodes, trial, cut_in_setup.__doc__, expected)


def cut_when(begun: Callable[[], bool], nodes: Network, trial: Trial, what: str | None, expected: dict) -> dict:
    """Cut a node as soon as a start has come so far; mend it when all have ended, and start again."""
    ranks = trial.start(FAULT_SETTINGS)
    deadline = time.monotonic() + LIMIT_S
    while not begun():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    nodes.cut(2)
    begin = time.monotonic()
    ended_s(ranks, LIMIT_S)
    seconds = time.monotonic() - begin
    codes, said = [rank.returncode for rank in ranks], trial.said()
    nodes.mend(2)
    trial.complete(FAULT_SETTINGS)
    return row_of(what, codes, said, seconds, losses(trial.run) == expected)


def started(nodes: Network, number: int) -> bool:
    """Return whether a node's rank is a process."""
    for pid in nodes.processes(number):
        try:
            if b"TORCHELASTIC_RUN_ID" in Path(f"/proc/{pid}/environ").read_bytes():
                return True
        except OSError:
            continue
    return False


def wrong_clock(nodes: Network, folder: Path, expected: dict) -> dict:
    """The second node's clock is an hour fast, as far as Python reads it."""
    trial = Trial(nodes, folder / "wrong_clock")
    (trial.folder / "clocks").mkdir()
    (trial.folder / "clocks/1").write_text("3600")
    script = [str(ROOT / "tests/support/faults.py"), "wrong_time", "--"]
    begin = time.monotonic()
    ranks = trial.start(FAULT_SETTINGS, script, WRONG_TIME=str(trial.folder / "clocks"))
    ended_s(ranks, LIMIT_S)
    seconds = time.monotonic() - begin
    codes = [rank.returncode for rank in ranks]
    return row_of(wrong_clock.__doc__, codes, trial.said(), seconds, losses(trial.run) == expected)


def faults(nodes: Network, folder: Path, only: list[str]) -> list[dict]:
    """Return a row for each fault."""
    undisturbed = Trial(nodes, folder / "undisturbed")
    undisturbed.complete(FAULT_SETTINGS)
    expected = losses(undisturbed.run)
    rows = [fault(nodes, folder, name, expected) for name in FAULTS if name in only or not only]
    for other in (cut_at_start, cut_at_meeting, cut_in_setup, wrong_clock):
        if other.__name__ in only or not only:
            rows.append(other(nodes, folder, expected))
    return rows


def table(rows: list[dict]) -> str:
    """Return rows as a Markdown table."""
    if not rows:
        return ""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    for row in rows:
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="bandwidth, or names of faults; all by default")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="keep logs and runs in this folder")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="armt_network_"))
    try:
        with network(args.nodes, folder) as nodes:
            rates = bandwidth(nodes, folder) if not args.only or "bandwidth" in args.only else []
            others = [name for name in args.only if name != "bandwidth"]
            rows = faults(nodes, folder, others) if not args.only or others else []
        print(f"{table(rates)}\n\n{table(rows)}\n")
    finally:
        if args.keep:
            shutil.copytree(folder, args.keep, dirs_exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"bandwidth": rates, "faults": rows, "all_equal": all(row["equal"] for row in rows)}))


if __name__ == "__main__":
    sys.exit(main())
