"""Hardware numbers from runs that were made: what a cell took, and what a step took beyond its cells.

One run fixes the rate at which cells compute and the share of the backward pass. Several runs with cells of different
size also separate the time to launch a cell's kernels from the time to compute them.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..config import ConfigError, read_object, read_yaml
from ..records import read_metrics
from .cell_work import cell_work
from .grid import Grid
from .hardware import Hardware, estimate_s, head_s, moving_s, operations, unit_costs, update_s
from .planned_run import PlannedRun, RunTree, planned_run
from .planner import validate

WARM_UP_STEPS = 2
"""Steps of a process whose prefetching has not seen a whole step yet."""
SAME_CELLS = 1e-4
"""Runs whose kernels and operations are proportional to this accuracy are alike."""
LEAST_BACKWARD_RATIO = 0.5
NETWORK = ("handoff_latency_s", "handoff_bytes_per_s", "collective_latency_s", "gather_bytes_per_s")
"""Fields of Hardware that a preflight measures (`distributed.preflight.network`)."""


class MeasuredRun(NamedTuple):
    """A run folder: what ran, and medians over its steps."""

    run: PlannedRun
    world: int
    grid: Grid
    cell_s: float
    step_s: float


def read_run(folder: Path) -> MeasuredRun:
    """A run folder of launch/train.py. Raises ConfigError where it has too few steps of the longest stage."""
    tree = read_yaml(folder / "config.yaml")
    ds_config = read_object(folder / "ds_config.json", "calibrate")
    world = len(list((folder / "heartbeat").glob("rank_*.json")))
    if world < 1:
        raise ConfigError(f"calibrate={folder}: no heartbeat/rank_*.json to count ranks by; give a run folder")
    run = planned_run(RunTree(with_vocabulary(tree, folder), ds_config), world)
    grid = validate(run.model, run.work, run.layout)
    steps = [record for record in read_metrics(folder) if record.get("kind") == "train"]
    alike = longest(steps)[WARM_UP_STEPS:]
    if not alike:
        raise ConfigError(
            f"calibrate={folder}: fewer than {WARM_UP_STEPS + 1} steps of the longest samples; train with at_least=1.0 "
            "for more steps"
        )
    medians = [statistics.median(record[name] for record in alike) for name in ("cell_s", "step_s")]
    return MeasuredRun(run, world, grid, *medians)


def with_vocabulary(tree: dict, folder: Path) -> dict:
    """The resolved configuration with the sizes of the model that was built."""
    built = read_object(folder / "model" / "config.json", "calibrate")
    given = {key: value for key, value in (tree.get("model") or {}).items() if value is not None}
    return tree | {"model": given | {"base": None, "base_config": built.get("base_config")}}


def longest(steps: Sequence[dict]) -> list[dict]:
    """The steps with the longest samples: those that read most tokens."""
    before = [0, *(record["tokens"] for record in steps)]
    read = [record["tokens"] - earlier for record, earlier in zip(steps, before, strict=False)]
    most = max(read, default=0)
    return [record for record, tokens in zip(steps, read, strict=True) if tokens == most]


def calibrated(base: Hardware, folders: Sequence[Path]) -> Hardware:
    """`base` with the rate of computing, the launch time and the backward's share that these runs show."""
    runs = [read_run(Path(folder)) for folder in folders]
    hardware = with_cells(base, runs)
    ratios = [backward_ratio(measured, hardware) for measured in runs]
    return hardware._replace(backward_ratio=statistics.median(ratios))


def with_network(base: Hardware, file: Path) -> Hardware:
    """`base` with the latencies and bandwidths that launch/preflight.py --network wrote. Raises ConfigError."""
    found = read_object(file, "network")
    changed = base
    for name in NETWORK:
        number = found.get(name)
        if not isinstance(number, float) or not 0 < number < math.inf:
            raise ConfigError(f"network={file}: {name}={number!r}; give a file of launch/preflight.py --network")
        changed = changed._replace(**{name: number})  # type: ignore[arg-type]
    return changed


def with_cells(base: Hardware, runs: Sequence[MeasuredRun]) -> Hardware:
    """Fit cell_s = kernels x time of one + operations / rate to the runs, by least squares.

    One run, or runs whose cells differ in nothing, keep the kernels' time of `base`.
    """
    cells = [Cell.of(run, base) for run in runs]
    kernel_s = base.kernel_s
    kk, kf, ff = (sum(products) for products in zip(*((k * k, k * f, f * f) for k, f, _ in cells), strict=True))
    kt, ft = (sum(products) for products in zip(*((k * t, f * t) for k, f, t in cells), strict=True))
    determinant = kk * ff - kf * kf
    if determinant > SAME_CELLS * kk * ff:
        kernel_s, per_flop_s = (kt * ff - ft * kf) / determinant, (ft * kk - kt * kf) / determinant
        if kernel_s >= 0 and per_flop_s > 0:
            return base._replace(kernel_s=kernel_s, kernel_efficiency=1 / per_flop_s / base.peak_flops)
        kernel_s = base.kernel_s
    # A cell that takes little more than its kernels leaves the rate undecided: half of it is computing then.
    rate = statistics.median(f / max(t - k * kernel_s, t / 2) for k, f, t in cells)
    return base._replace(kernel_efficiency=rate / base.peak_flops)


class Cell(NamedTuple):
    """One cell of a measured run, of one chunk of the micro-batch, without the time that its bytes need."""

    kernels: float
    operations: float
    seconds: float

    @classmethod
    def of(cls, measured: MeasuredRun, hardware: Hardware) -> "Cell":
        """The cells of a run."""
        run, chunks = measured.run, measured.grid.chunks
        rows, cell_s = -(-run.work.micro_batch // chunks), measured.cell_s / chunks
        forward, _ = cell_work(run.model, run.work)
        # Small tensors stay in a cache: never more than half of the time.
        moving = min(moving_s(forward, rows, hardware), cell_s / 2)
        return cls(forward.kernels, rows * operations(forward, run.work, hardware), cell_s - moving)


def backward_ratio(measured: MeasuredRun, hardware: Hardware) -> float:
    """Backward of a cell over its forward, so that the planned step takes what the measured one took."""
    run, world, grid, cell_s, step_s = measured
    costs = unit_costs(run.model, run.work, grid, world, hardware)._replace(cell_s=cell_s)
    pass_s = (step_s - update_s(run.model, world, hardware)) / run.work.accumulation
    pass_s -= head_s(run.model, run.work, grid, hardware)
    # The step's time is linear in the ratio, unless collectives dominate.
    none_s, one_s = (estimate_s(grid, costs._replace(backward_ratio=ratio)) for ratio in (0.0, 1.0))
    return max(LEAST_BACKWARD_RATIO, (pass_s - none_s) / (one_s - none_s))
