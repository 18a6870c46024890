"""What a run will take: bytes per rank, bytes on the wire, floating-point operations and time, before it starts.

Arithmetic only: sizes come from `model_sizes`, memory from `step_memory`, and every assumption about hardware is a
field of `hardware.Hardware`.

Letters: B micro-batch, K segments of a block, L layers, R rounds, M_c chunks.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ..config import ConfigError
from .cell_work import cell_flops
from .grid import Grid, check_grid, prefetch_window
from .hardware import H100, Hardware, estimate_s, head_s, teacher_s, unit_costs, update_s
from .model_sizes import KINDS, ModelSizes, StepWork
from .program import default_schedule, fit_grid
from .simulator import Costs
from .step_memory import Held, gpu_bytes, host_bytes
from .weight_groups import WEIGHT_GRADIENTS

STATES = ("store", "rebuild", "recompute")
MAY_BE_ZERO = (
    *("keep", "sink", "sliding_window", "scored_tokens", "gradient_bytes", "reduce_bucket_size"),
    *("stage3_param_persistence_threshold", "zero_hpz_partition_size", "teacher_window"),
)
LEAST_BUSY = 0.5
"""Share of the time that ranks are to be busy in a layout that is chosen."""
FULL = 0.9
"""Share of a memory that may be planned; the rest is for allocator and libraries."""
SPARE_LAYERS = 2
"""Layers that ZeRO-3 keeps beside the prefetch window: the one in use and the one being released."""


class Layout(NamedTuple):
    """How the ranks are used: world = dp * sp."""

    dp: int = 1
    sp: int = 1
    rounds: int = 1
    chunks: int = 1
    schedule: str | None = None
    """None: what the memory allows."""
    prefetch: int | None = None
    """Layers to gather ahead; None: as many as the wavefront wants, or as fit."""


class Plan(NamedTuple):
    """The answer, all per rank and step unless it says otherwise."""

    grid: Grid
    world: int
    window: int
    """Layers to gather ahead."""
    wanted_window: int
    """With fewer, ranks of a wavefront wait for each other."""
    phase: str
    """The part of a step that needs most device memory."""
    gpu_bytes: dict[str, float]
    """In that phase."""
    host_bytes: dict[str, float]
    gather_bytes: float
    reduce_bytes: float
    handoff_unit_bytes: float
    handoff_bytes: float
    flops: float
    """With the re-run."""
    bound: float
    """Largest efficiency of this layout: with free communication and update, the re-runs that fill waits counted."""
    compute_s: float
    step_s: float
    efficiency: float
    """compute_s / step_s."""
    mfu: float
    """Of the peak, without the re-run."""
    tokens_per_s: float
    """Of the whole world."""
    teacher_s: float
    """Of the step, for the frozen base that reads the same text as a teacher; 0: there is none."""
    costs: Costs


def validate(model: ModelSizes, work: StepWork, layout: Layout) -> Grid:
    """The grid of a layout. Raises ConfigError naming field, value and remedy."""
    if model.memory_kind not in KINDS:
        raise ConfigError(f"memory_kind={model.memory_kind}: unknown; known here: {', '.join(KINDS)}")
    may_be_zero = (*MAY_BE_ZERO, *["num_mem_tokens"] * (model.kind.memory_groups == 0))
    for section in (model, work, layout):
        for field, value in section._asdict().items():
            if type(value) is int and value < 1 and field not in may_be_zero:
                raise ConfigError(f"{field}={value}: must be at least 1")
    if work.sequence_tokens % work.segment_tokens:
        wanted = work.segment_tokens
        near = min(divisors(work.sequence_tokens), key=lambda divisor: abs(divisor - wanted))
        raise ConfigError(f"segment_tokens={wanted} does not divide sequence_tokens={work.sequence_tokens}; try {near}")
    if layout.chunks > work.micro_batch:
        raise ConfigError(f"chunks={layout.chunks} is more than micro_batch={work.micro_batch}; try chunks=1")
    for field, known in (("states", STATES), ("weight_gradients", WEIGHT_GRADIENTS)):
        if (value := getattr(work, field)) not in known:
            raise ConfigError(f"{field}={value}: unknown; known here: {', '.join(known)}")
    segments = work.sequence_tokens // work.segment_tokens
    grid = Grid(segments, model.num_hidden_layers, layout.sp, layout.rounds, layout.chunks)
    check_grid(grid)
    return fit_grid(schedule_name(model, layout), grid, model.kind.arrows)


def divisors(n: int) -> list[int]:
    """All divisors of n, in no order."""
    return [d for low in range(1, math.isqrt(n) + 1) if n % low == 0 for d in (low, n // low)]


def schedule_name(model: ModelSizes, layout: Layout | None = None) -> str:
    """The schedule that a run of this layout carries out."""
    asked = layout.schedule if layout else None
    return asked or default_schedule(model.kind.arrows)


def plan(
    model: ModelSizes, work: StepWork, layout: Layout, hardware: Hardware = H100, pipeline_s: float | None = None
) -> Plan:
    """Everything about one layout; `pipeline_s` is the layers' time as simulated or measured, None: `estimate_s`.

    Raises ConfigError for sizes that do not fit together. Too little memory is not an error: see `fits`.
    """
    grid = validate(model, work, layout)
    world = layout.dp * layout.sp
    costs = unit_costs(model, work, grid, world, hardware)
    wanted = costs.prefetch_layers or prefetch_window(grid)

    def held_with(window: int) -> Held:
        return Held(model, work, grid, world, window + SPARE_LAYERS, hardware.device, costs.keep)

    window = layout.prefetch or largest_window(held_with, wanted, hardware)
    costs = costs._replace(prefetch_layers=window)
    if pipeline_s is None:
        pipeline_s = estimate_s(grid, costs)
    held = held_with(window)
    phase, on_device = gpu_bytes(held)
    times = step_times(model, work, grid, costs, hardware, pipeline_s, world)
    cell = work.micro_batch * cell_flops(model, work)
    cells, head_flops = grid.segments / grid.sp * grid.layers, output_flops(model, work, grid)
    gathered, reduced = traffic_bytes(model, work, grid, world)
    handoffs = 2 * grid.rounds * grid.layers if grid.sp > 1 else 0
    state_bytes = work.micro_batch * model.state_bytes
    passes = work.accumulation
    return Plan(
        grid=grid,
        world=world,
        window=window,
        wanted_window=wanted,
        phase=phase,
        gpu_bytes=on_device,
        host_bytes=host_bytes(held),
        gather_bytes=gathered,
        reduce_bytes=reduced,
        handoff_unit_bytes=state_bytes / grid.chunks,
        handoff_bytes=passes * handoffs * state_bytes,
        flops=passes * ((3 + (1 - costs.keep) * costs.rerun_ratio) * cells * cell + head_flops),
        bound=times.compute_s / times.free_s,
        compute_s=times.compute_s,
        step_s=times.step_s,
        efficiency=times.compute_s / times.step_s,
        mfu=passes * (3 * cells * cell + head_flops) / times.step_s / hardware.peak_flops,
        teacher_s=passes * teacher_s(model, work, grid, hardware),
        tokens_per_s=passes * layout.dp * work.micro_batch * work.sequence_tokens / times.step_s,
        costs=costs,
    )


def largest_window(held_with: Callable[[int], Held], wanted: int, hardware: Hardware) -> int:
    """The most layers that can be gathered ahead, up to those wanted; those where even one does not fit."""

    def needed(window: int) -> float:
        return sum(gpu_bytes(held_with(window))[1].values())

    limit = FULL * hardware.memory_bytes
    if needed(wanted) <= limit:
        return wanted
    return bisect_right(range(1, wanted), limit, key=needed) or wanted


class StepTimes(NamedTuple):
    """Seconds of one optimizer step of a rank: computing alone, with free communication and update, and in all."""

    compute_s: float
    free_s: float
    step_s: float


def step_times(
    model: ModelSizes, work: StepWork, grid: Grid, costs: Costs, hardware: Hardware, pipeline_s: float, world: int
) -> StepTimes:
    """The passes of a step with its head, embedding collectives and update.

    Every rank's head follows its own block, so the last rank's head is exposed; so are the embedding's collectives.
    """
    # The teacher's work is as evenly spread as the rest.
    loss_s = head_s(model, work, grid, hardware) + teacher_s(model, work, grid, hardware)
    outer_s = 2 * model.outer_parameters * work.dtype_bytes * (1 - 1 / world) / hardware.gather_bytes_per_s
    cells = grid.segments / grid.sp * grid.layers
    compute_s = cells * costs.cell_s * (1 + (1 - costs.keep) * costs.rerun_ratio + costs.backward_ratio) + loss_s
    optimizer_s = 0.0 if work.offload_optimizer else update_s(model, world, hardware)
    step_s = work.accumulation * (pipeline_s + loss_s + outer_s) + optimizer_s
    free = costs._replace(gather_s=0.0, reduce_s=0.0, latency_s=0.0, state_bytes=0)
    # The closed form is no better than a percent of what was simulated.
    free_s = work.accumulation * (min(pipeline_s, estimate_s(grid, free)) + loss_s)
    return StepTimes(work.accumulation * compute_s, free_s, step_s)


def output_flops(model: ModelSizes, work: StepWork, grid: Grid) -> float:
    """Forward and backward of the head over a rank's scored positions of one micro-batch."""
    scored = work.scored_tokens or grid.segments / grid.sp * work.segment_tokens
    return 6 * work.micro_batch * scored * model.hidden_size * model.vocab_size


def traffic_bytes(model: ModelSizes, work: StepWork, grid: Grid, world: int) -> tuple[float, float]:
    """Bytes that ZeRO-3 gathers and reduces in a step, per rank.

    A parameter small enough to stay whole is gathered once, after the update; the others in every forward and backward.
    """
    others, threshold = (1 - 1 / world) * work.dtype_bytes, work.stage3_param_persistence_threshold
    small_layer = model.persistent(model.layer_tensors, threshold)
    small_outer = model.persistent(model.outer_tensors, threshold)
    layers, outer = grid.layers * (model.layer_parameters - small_layer), model.outer_parameters - small_outer
    small = grid.layers * small_layer + small_outer
    gathered = work.accumulation * 2 * (grid.rounds * layers + outer) + small
    return others * gathered, others * work.accumulation * model.trainable_parameters


def fits(result: Plan, hardware: Hardware = H100) -> bool:
    """Whether device and host memory suffice."""
    device, host = sum(result.gpu_bytes.values()), sum(result.host_bytes.values())
    return device <= FULL * hardware.memory_bytes and host <= FULL * hardware.host_bytes


def largest_useful_sp(model: ModelSizes, work: StepWork, layout: Layout, hardware: Hardware = H100) -> int:
    """The largest sp of the same ranks whose pipeline fills (sp <= layers x chunks) and whose memory fits; 1: none.

    A larger one idles for longer, and wants more layers ahead than fit: (sp - 1) / chunks + 1 are whole at a time.
    """
    world, filled = layout.dp * layout.sp, model.num_hidden_layers * layout.chunks
    longest = min(filled, work.sequence_tokens // work.segment_tokens // layout.rounds)
    useful = (sp for sp in sorted(divisors(world), reverse=True) if 1 < sp <= longest)
    layouts = (layout._replace(dp=world // sp, sp=sp) for sp in useful)
    for each in layouts:
        found = plan(model, work, each, hardware)
        if fits(found, hardware) and found.window == found.wanted_window:
            return each.sp
    return 1


def savings(work: StepWork) -> list[str]:
    """What would save memory, of the options that are not given yet."""
    offloads = ("offload_activations", "offload_optimizer", "offload_parameters")
    return [*["states=rebuild"] * (work.states == "store"), *(name for name in offloads if not getattr(work, name))]


def listed(choices: list[str]) -> str:
    """Join choices: a, b or c."""
    return f"{', '.join(choices[:-1])} or {choices[-1]}" if len(choices) > 1 else choices[0]


def candidates(
    model: ModelSizes, work: StepWork, world: int, max_step_tokens: float
) -> Iterator[tuple[StepWork, Layout]]:
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
    model: ModelSizes, work: StepWork, world: int, hardware: Hardware = H100, max_step_tokens: float = math.inf
) -> tuple[StepWork, Layout]:
    """The micro-batch, sp, R and M_c with most tokens per second that fit.

    Of those that fit, a layout whose pipeline is busy for less than half of the time is chosen only where there is no
    other. Raises ConfigError when nothing fits within memory and `max_step_tokens`.
    """
    validate(model, work, Layout())
    if not max_step_tokens > 0:
        raise ConfigError(f"max_step_tokens={max_step_tokens:g}: expected a number of tokens above 0")
    tried = list(candidates(model, work, world, max_step_tokens))
    found = [(plan(model, each, layout, hardware), each, layout) for each, layout in tried]
    found = [row for row in found if fits(row[0], hardware)]
    if not found:
        why, more = "needs more memory", savings(work)
        if not tried:
            why, more = f"has more than max_step_tokens={max_step_tokens:g}", []
        if max_step_tokens < math.inf:
            more = [*more, "a larger max_step_tokens"]
        use = listed(["more gpus" if tried else "fewer gpus", *more])
        raise ConfigError(f"gpus={world}: every layout of sequence_tokens={work.sequence_tokens} {why}; use {use}")
    found = [row for row in found if row[0].bound >= LEAST_BUSY] or found
    fastest = max(row[0].tokens_per_s for row in found)
    # The estimate is no better than a percent: of equals the least gathering, the shortest pipeline, the smallest step.
    near = [row for row in found if row[0].tokens_per_s >= 0.99 * fastest]
    _, best, layout = min(near, key=lambda row: (row[2].rounds, row[2].sp, row[1].micro_batch, row[2].chunks))
    return best, layout
