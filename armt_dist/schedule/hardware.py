"""What a cell, a gather and a hand-off take on stated hardware, and the time of a step in closed form.

Letters: K segments of a block, L layers, R rounds, M_c chunks.
"""

import math
from typing import NamedTuple

from .cell_work import HEAD_PASSES, Work, cell_work, head_work, rerun_work, weight_work
from .grid import Grid, largest_block, prefetch_window
from .kept_cells import kept_share
from .model_sizes import FP32_BYTES, ModelSizes, StepWork, row_tokens, teacher_tokens
from .simulator import Costs
from .weight_groups import GROUPED, left_over


class Hardware(NamedTuple):
    """One GPU of a cluster and its links. The defaults are an H100 SXM with 400 Gb/s of network per GPU.

    Data sheet: 989 TFLOP/s dense bf16, 80 GB, 8 GPUs a node with NVLink. Measured on one H100 and one H200
    (benchmarks/results): how fast a cell's kernels are. Assumed, not measured: bandwidths as NCCL delivers them.
    """

    peak_flops: float = 989e12
    kernel_efficiency: float = 0.57
    """Share of the peak that products of matrices reach."""
    attention_slowness: float = 3.5
    """Time of an operation of attention over that of a product's."""
    float32_slowness: float = 18.0
    """Time of an operation in float32 over that of a product's."""
    elementwise_bytes_per_s: float = 3.0e12
    """Of kernels that are no products, read and written: what a copy reaches."""
    kernel_s: float = 2.5e-6
    """Time that any kernel takes beside its operations and bytes. A GPU gets whole cells as CUDA graphs."""
    memory_bytes: float = 80e9
    host_bytes: float = 200e9
    """Host memory per GPU."""
    gather_bytes_per_s: float = 200e9
    """All-gather and reduce-scatter across nodes, bytes of the whole result; rings use all 8 NICs of a node."""
    collective_latency_s: float = 20e-6
    """Times log2(world)."""
    handoff_bytes_per_s: float = 40e9
    handoff_latency_s: float = 30e-6
    host_link_bytes_per_s: float = 40e9
    """Pinned host memory over PCIe 5, for offloaded activations."""
    memory_bytes_per_s: float = 3.35e12
    """Of the device's memory, which the optimizer's update is bound by."""
    backward_ratio: float | None = None
    """Backward of a cell over its forward, as measured; None: from what both have to do."""
    device: str = "cuda"
    """cuda or cpu: decides what ZeRO-3 and the optimizer keep."""


H100 = Hardware()
# One core of a server, and gloo on one machine; rough, for `calibration` to start from.
CPU = Hardware(
    peak_flops=60e9,
    kernel_efficiency=0.5,
    attention_slowness=1.0,
    float32_slowness=1.0,
    elementwise_bytes_per_s=20e9,
    kernel_s=20e-6,
    memory_bytes=16e9,
    host_bytes=16e9,
    gather_bytes_per_s=0.5e9,
    collective_latency_s=0.5e-3,
    handoff_bytes_per_s=0.5e9,
    handoff_latency_s=0.5e-3,
    memory_bytes_per_s=5e9,
    device="cpu",
)
HARDWARE = {"h100": H100, "cpu": CPU}
UPDATE_BYTES = 28
"""Read and written per parameter in AdamW's update: gradient, master weight, two moments, parameter."""


def unit_costs(model: ModelSizes, work: StepWork, grid: Grid, world: int, hardware: Hardware) -> Costs:
    """What the simulator needs, in seconds."""
    chunk_rows = math.ceil(work.micro_batch / grid.chunks)
    chunk_s, backward_s = (seconds(each, chunk_rows, work, hardware) for each in cell_work(model, work))
    again = seconds(rerun_work(model, work), chunk_rows, work, hardware) / chunk_s
    weights_s = seconds(weight_work(model, work), chunk_rows, work, hardware)
    ratio = backward_s / chunk_s if hardware.backward_ratio is None else hardware.backward_ratio
    if work.offload_activations:
        row_bytes = chunk_rows * row_tokens(model, work) * model.hidden_size * work.dtype_bytes
        chunk_s = max(chunk_s, row_bytes / hardware.host_link_bytes_per_s)
    cell_s = grid.chunks * chunk_s
    collective_s = math.ceil(math.log2(world)) * hardware.collective_latency_s
    passing = model.layer_parameters - model.persistent(model.layer_tensors, work.stage3_param_persistence_threshold)
    whole_s = work.dtype_bytes * (1 - 1 / world) / hardware.gather_bytes_per_s
    # Measured ratios may leave less for them than the sizes say: half, as the other products are as many.
    weight_ratio = min(weights_s / chunk_s, ratio / 2) if work.weight_gradients == GROUPED else 0.0
    return Costs(
        cell_s=cell_s,
        rerun_ratio=rerun_ratio(work, grid, again),
        keep=kept_share(model, work, grid),
        backward_ratio=ratio,
        weight_ratio=weight_ratio,
        gather_s=collective_s + passing * whole_s if passing else 0.0,
        reduce_s=collective_s + model.layer_parameters * whole_s,
        latency_s=hardware.handoff_latency_s,
        state_bytes=work.micro_batch * model.state_bytes,
        bytes_per_s=hardware.handoff_bytes_per_s,
        prefetch_layers=handoff_window(grid, cell_s, work.micro_batch * model.state_bytes, hardware),
    )


def seconds(work: Work, rows: int, step: StepWork, hardware: Hardware) -> float:
    """Time of a cell's work for so many sequences, or of the head's."""
    computing_s = rows * operations(work, step, hardware) / hardware.peak_flops / hardware.kernel_efficiency
    return computing_s + moving_s(work, rows, hardware) + work.kernels * hardware.kernel_s


def operations(work: Work, step: StepWork, hardware: Hardware) -> float:
    """Operations for one sequence, slow ones counted as the products that take as long."""
    in_dtype = hardware.float32_slowness if step.dtype_bytes >= FP32_BYTES else 1.0
    slow = hardware.attention_slowness * work.attention + hardware.float32_slowness * work.float32
    return in_dtype * work.products + slow


def moving_s(work: Work, rows: int, hardware: Hardware) -> float:
    """Time that elementwise kernels need for their bytes."""
    return (rows * work.moved + work.moved_once) / hardware.elementwise_bytes_per_s


def head_s(model: ModelSizes, work: StepWork, grid: Grid, hardware: Hardware) -> float:
    """Head and loss of a rank's scored positions of one micro-batch, forward and backward."""
    scored = work.scored_tokens or grid.segments / grid.sp * work.segment_tokens
    return seconds(head_work(model, scored), work.micro_batch, work, hardware)


def teacher_s(model: ModelSizes, work: StepWork, grid: Grid, hardware: Hardware) -> float:
    """The forward of the frozen base over a rank's share of a teacher's windows, one micro-batch, and its logits."""
    if not work.teacher_window:
        return 0.0
    window = min(work.teacher_window, work.sequence_tokens)
    plain = model._replace(memory_kind="transformer_xl", num_mem_tokens=0, sink=0, sliding_window=0)
    read = work._replace(segment_tokens=window, padded=False, packed=False)
    layer_s = seconds(cell_work(plain, read)[0], work.micro_batch, work, hardware)
    # Twice, as chunks of the loss are checkpointed: a quarter of the passes of a trained head.
    logits_s = 2 / HEAD_PASSES * head_s(model, work, grid, hardware)
    return teacher_tokens(work) / window / grid.sp * grid.layers * layer_s + logits_s


def rerun_ratio(work: StepWork, grid: Grid, again: float) -> float:
    """Time to run a cell again over its forward: `recompute` runs all segments of a block but the last once more.

    again: of a cell by itself.
    """
    block = largest_block(grid)
    return again + (block - 1) / block if work.states == "recompute" else again


def update_s(model: ModelSizes, world: int, hardware: Hardware) -> float:
    """The optimizer's update of one rank's shard, bound by memory."""
    return UPDATE_BYTES * model.trainable_parameters / world / hardware.memory_bytes_per_s


def handoff_window(grid: Grid, cell_s: float, state_bytes: float, hardware: Hardware) -> int:
    """Prefetch window in layers, hand-off time counted."""
    handoff_s = hardware.handoff_latency_s + state_bytes / grid.chunks / hardware.handoff_bytes_per_s
    return prefetch_window(grid, handoff_s * grid.chunks / (largest_block(grid) * cell_s))


def estimate_s(grid: Grid, costs: Costs) -> float:
    """Forward and backward of one sp group in closed form, within 1 % of the simulator unless gathers dominate.

    A layer of a round takes the longest of computing, gathering and handing on; the last rank starts sp - 1 units
    late in both directions; a pipeline longer than layers * chunks stalls between rounds. The first gather and the
    last reduction are exposed. With a prefetch window of w layers, fewer than the wavefront wants, the first rank runs
    w + 1 layers and waits until the last has ended the first of them.
    """
    block = largest_block(grid)
    unit_s = block * costs.cell_s / grid.chunks
    transfer_s = costs.state_bytes / grid.chunks / costs.bytes_per_s if grid.sp > 1 else 0
    handoff_s = transfer_s + costs.latency_s if grid.sp > 1 else 0
    again_s = (1 - costs.keep) * costs.rerun_ratio * unit_s
    back_s = unit_s * costs.backward_ratio + again_s
    # The first re-run of a unit is done while waiting for the gradient, its last weight gradients after that of the
    # state has been sent.
    cell_s = costs.cell_s / grid.chunks
    ahead_s = min(again_s, costs.rerun_ratio * cell_s)
    later_s = left_over(block) * costs.weight_ratio * cell_s
    delays_s = (unit_s + handoff_s, back_s - ahead_s - later_s + handoff_s)
    ahead = prefetch_window(grid) if costs.prefetch_layers is None else costs.prefetch_layers
    total_s = costs.gather_s + costs.reduce_s
    collectives_s = (costs.gather_s, costs.gather_s + costs.reduce_s / grid.rounds)
    for work_s, delay_s, collective_s in zip((unit_s, back_s), delays_s, collectives_s, strict=True):
        layer_s = max(grid.chunks * max(work_s, transfer_s), collective_s)
        waits = (grid.layers - 1) // (ahead + 1) if grid.sp > 1 else 0
        in_turns_s = waits * ((grid.sp - 1) * delay_s + layer_s) + (grid.layers - waits * (ahead + 1)) * layer_s
        round_s = max(grid.layers * layer_s, in_turns_s)
        stall_s = max(0.0, grid.sp * delay_s - round_s) if grid.sp > 1 else 0
        total_s += grid.rounds * round_s + (grid.rounds - 1) * stall_s + (grid.sp - 1) * delay_s
    return total_s
