"""What a run will take: bytes per rank, bytes on the wire, floating-point operations and time, before it starts.

Arithmetic only: sizes come from `sizes.py`, every assumption about hardware is a field of `hardware.Hardware`.

Letters: B micro-batch, K segments of a block, L layers, R rounds, M_c chunks.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from ..config import ConfigError
from .grid import ARMT_ARROWS, RMT_ARROWS, Grid, check_grid, efficiency_bound
from .hardware import H100, Hardware, estimate_s, largest_block, unit_costs
from .model_sizes import FP32, Model, StepWork, cell_flops, cell_graph_bytes, row_tokens
from .program import fit_grid
from .simulator import Costs

STATES = ("store", "rebuild", "recompute")
KINDS = {"armt": ARMT_ARROWS, "rmt": RMT_ARROWS}
MAY_BE_ZERO = ("head_width", "sink", "sliding_window")
SPARE_LAYERS = 2
"""Layers that ZeRO-3 keeps beside the prefetch window: the one in use and the one being released."""
LOGITS_TOKENS = 1024
"""Rows of logits alive at a time in the chunked cross-entropy, with their gradient."""


class Layout(NamedTuple):
    """How the ranks are used: world = dp * sp."""

    dp: int = 1
    sp: int = 1
    rounds: int = 1
    chunks: int = 1


class Plan(NamedTuple):
    """The answer, all per rank and step unless it says otherwise."""

    grid: Grid
    world: int
    window: int
    """Layers to gather ahead."""
    gpu_bytes: dict[str, float]
    host_bytes: dict[str, float]
    gather_bytes: float
    reduce_bytes: float
    handoff_unit_bytes: float
    handoff_bytes: float
    flops: float
    """With the re-run."""
    bound: float
    """Of the schedule alone, free communication."""
    compute_s: float
    step_s: float
    efficiency: float
    """compute_s / step_s."""
    mfu: float
    """Of the peak, without the re-run."""
    tokens_per_s: float
    """Of the whole world."""
    costs: Costs


def validate(model: Model, work: StepWork, layout: Layout) -> Grid:
    """The grid of a layout. Raises ConfigError naming field, value and remedy."""
    for section in (model, work, layout):
        for field, value in section._asdict().items():
            if type(value) is int and value < 1 and field not in MAY_BE_ZERO:
                raise ConfigError(f"{field}={value}: must be at least 1")
    if work.sequence_tokens % work.segment_tokens:
        wanted = work.segment_tokens
        near = min(divisors(work.sequence_tokens), key=lambda divisor: abs(divisor - wanted))
        raise ConfigError(f"segment_tokens={wanted} does not divide sequence_tokens={work.sequence_tokens}; try {near}")
    if work.micro_batch % layout.chunks:
        raise ConfigError(f"chunks={layout.chunks} does not divide micro_batch={work.micro_batch}; try chunks=1")
    if work.states not in STATES:
        raise ConfigError(f"states={work.states}: unknown; known here: {', '.join(STATES)}")
    if model.kind not in KINDS:
        raise ConfigError(f"kind={model.kind}: unknown; known here: {', '.join(KINDS)}")
    segments = work.sequence_tokens // work.segment_tokens
    grid = Grid(segments, model.layers, layout.sp, layout.rounds, layout.chunks)
    check_grid(grid)
    return fit_grid(schedule_name(model), grid, KINDS[model.kind])


def divisors(n: int) -> list[int]:
    return [d for low in range(1, math.isqrt(n) + 1) if n % low == 0 for d in (low, n // low)]


def schedule_name(model: Model) -> str:
    return "segment_major" if model.kind == "rmt" else "wavefront"


def gpu_bytes(model: Model, work: StepWork, grid: Grid, world: int, live_layers: int) -> dict[str, float]:
    """Device memory of one rank by item."""
    dtype, parameters, layer = work.dtype_bytes, model.parameters, model.layer_parameters
    segments = grid.rounds * largest_block(grid)
    inputs = work.micro_batch * row_tokens(model, work) * model.hidden * dtype
    # Two layers of inputs stay on the device: the one in use and the one being copied.
    held_layers = 2 if work.offload_activations else grid.layers
    # More than one round: whole gradients until a layer's last contribution.
    whole_gradients = grid.layers if grid.rounds > 1 else 1
    return {
        "parameters (shard)": 0 if work.offload_parameters else parameters * dtype / world,
        "gradients (shard)": 0 if work.offload_optimizer else parameters * dtype / world,
        "optimizer (shard)": 0 if work.offload_optimizer else optimizer_bytes(model) / world,
        "live layers": min(grid.layers, live_layers) * layer * dtype,
        "embedding, head, their gradients": 2 * model.outer_parameters * dtype,
        "whole layer gradients": whole_gradients * layer * dtype + layer * FP32,
        "layer inputs H": held_layers * segments * inputs,
        "states": work.micro_batch * states_bytes(model, work, grid),
        "one cell's graph": cell_graph_bytes(model, work),
        "logits chunk": 2 * LOGITS_TOKENS * model.vocab * FP32,
    }


def optimizer_bytes(model: Model) -> float:
    """AdamW in mixed precision: fp32 master weights and two moments."""
    return 3 * FP32 * model.parameters


def states_bytes(model: Model, work: StepWork, grid: Grid) -> float:
    """What the backward needs to have each segment's incoming state again, of one sequence (bptt.states)."""
    block = largest_block(grid)
    per_block = {
        "store": block * model.state_bytes,
        "rebuild": model.state_bytes + block * model.update_bytes,
        "recompute": model.state_bytes,
    }
    if model.kind == "rmt":
        return grid.rounds * model.state_bytes
    rerun = block * model.state_bytes if work.states == "recompute" else 0
    return grid.layers * grid.rounds * per_block[work.states] + rerun


def host_bytes(model: Model, work: StepWork, grid: Grid, world: int) -> dict[str, float]:
    """Pinned host memory of one rank by item, for what is offloaded."""
    segments = grid.rounds * largest_block(grid)
    inputs = work.micro_batch * row_tokens(model, work) * model.hidden * work.dtype_bytes
    return {
        "parameters (shard)": work.offload_parameters * model.parameters * work.dtype_bytes / world,
        "gradients and optimizer (shard)": work.offload_optimizer
        * (model.parameters * FP32 + optimizer_bytes(model))
        / world,
        "layer inputs H": work.offload_activations * grid.layers * segments * inputs,
    }


def plan(
    model: Model, work: StepWork, layout: Layout, hardware: Hardware = H100, pipeline_s: float | None = None
) -> Plan:
    """Everything about one layout; `pipeline_s` is the layers' time as simulated or measured, None: `estimate_s`.

    Raises ConfigError for sizes that do not fit together. Too little memory is not an error: see `fits`.
    """
    grid = validate(model, work, layout)
    world = layout.dp * layout.sp
    costs = unit_costs(model, work, grid, world, hardware)
    if pipeline_s is None:
        pipeline_s = estimate_s(grid, costs)
    others = 1 - 1 / world
    layers_bytes = model.layers * model.layer_parameters * work.dtype_bytes
    outer_bytes = model.outer_parameters * work.dtype_bytes
    # Every rank's head follows its own block, so the last rank's head is exposed; so are the embedding's collectives.
    segments = grid.segments / grid.sp
    head_flops = 6 * segments * work.micro_batch * work.segment_tokens * model.hidden * model.vocab
    head_s = head_flops / hardware.peak_flops / hardware.kernel_efficiency
    outer_s = 2 * outer_bytes * others / hardware.gather_bytes_per_s
    cells = segments * grid.layers
    compute_s = cells * costs.cell_s * (1 + costs.rerun_ratio + costs.backward_ratio) + head_s
    cell = work.micro_batch * cell_flops(model, work)
    step_s = pipeline_s + head_s + outer_s
    handoffs = 2 * grid.rounds * (model.layers if model.kind == "armt" else 1) if grid.sp > 1 else 0
    return Plan(
        grid=grid,
        world=world,
        window=costs.prefetch_layers,
        gpu_bytes=gpu_bytes(model, work, grid, world, costs.prefetch_layers + SPARE_LAYERS),
        host_bytes=host_bytes(model, work, grid, world),
        gather_bytes=others * (2 * grid.rounds * layers_bytes + 2 * outer_bytes),
        reduce_bytes=others * (layers_bytes + outer_bytes),
        handoff_unit_bytes=work.micro_batch * model.state_bytes / grid.chunks,
        handoff_bytes=handoffs * work.micro_batch * model.state_bytes,
        flops=4 * cells * cell + head_flops,
        bound=efficiency_bound(grid),
        compute_s=compute_s,
        step_s=step_s,
        efficiency=compute_s / step_s,
        mfu=(3 * cells * cell + head_flops) / step_s / hardware.peak_flops,
        tokens_per_s=layout.dp * work.micro_batch * work.sequence_tokens / step_s,
        costs=costs,
    )


def fits(result: Plan, hardware: Hardware = H100) -> bool:
    """Whether device and host memory suffice, with a tenth of each kept free for allocator and libraries."""
    device, host = sum(result.gpu_bytes.values()), sum(result.host_bytes.values())
    return device <= 0.9 * hardware.memory_bytes and host <= 0.9 * hardware.host_bytes


def candidates(model: Model, work: StepWork, world: int, max_step_tokens: float) -> Iterator[tuple[StepWork, Layout]]:
    """Every sp dividing the world, R and micro-batch a power of two, with at most `max_step_tokens` per step."""
    segments = work.sequence_tokens // work.segment_tokens
    longest = 1 if schedule_name(model) == "segment_major" else segments
    powers = [2**n for n in range(6)]
    for sp in (d for d in sorted(set(divisors(world))) if d <= longest):
        for micro_batch in powers:
            if world // sp * micro_batch * work.sequence_tokens > max_step_tokens:
                break
            for rounds in (r for r in powers if sp * r <= segments and (sp > 1 or r == 1)):
                for chunks in (c for c in powers if c <= micro_batch and (sp > 1 or c == 1)):
                    yield work._replace(micro_batch=micro_batch), Layout(world // sp, sp, rounds, chunks)


def choose(
    model: Model, work: StepWork, world: int, hardware: Hardware = H100, max_step_tokens: float = math.inf
) -> tuple[StepWork, Layout]:
    """The micro-batch, sp, R and M_c with most tokens per second that fit.

    Raises ConfigError when nothing fits within memory and `max_step_tokens`.
    """
    validate(model, work, Layout())
    tried = list(candidates(model, work, world, max_step_tokens))
    found = [(plan(model, each, layout, hardware), each, layout) for each, layout in tried]
    found = [row for row in found if fits(row[0], hardware)]
    if not found:
        why = "needs more memory" if tried else f"has more than max_step_tokens={max_step_tokens:g}"
        raise ConfigError(
            f"gpus={world}: every layout of sequence_tokens={work.sequence_tokens} {why}; use more gpus, "
            f"states=rebuild, offload_activations or a larger max_step_tokens"
        )
    fastest = max(row[0].tokens_per_s for row in found)
    # The estimate is no better than a percent: of equals the least gathering, the shortest pipeline, the smallest step.
    near = [row for row in found if row[0].tokens_per_s >= 0.99 * fastest]
    _, best, layout = min(near, key=lambda row: (row[2].rounds, row[2].sp, row[1].micro_batch, row[2].chunks))
    return best, layout
