"""What a cell, a gather and a hand-off take on stated hardware, and the time of a step in closed form.

Letters: K segments of a block, L layers, R rounds, M_c chunks.
"""

import math
from typing import NamedTuple

from .grid import Grid, prefetch_window
from .model_sizes import Model, StepWork, cell_flops, row_tokens
from .simulator import Costs


class Hardware(NamedTuple):
    """One GPU of a cluster and its links. The defaults are an H100 SXM with 400 Gb/s of network per GPU.

    Data sheet: 989 TFLOP/s dense bf16, 80 GB, 8 GPUs a node with NVLink. Assumed, not measured here: the share of the
    peak that a cell's kernels reach, the host time to launch a cell, bandwidths as NCCL delivers them.
    """

    peak_flops: float = 989e12
    kernel_efficiency: float = 0.5
    cell_launch_s: float = 0.3e-3
    """Host time to launch the ~60 kernels of one cell: a cell takes no less, however small its chunk."""
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


H100 = Hardware()


def largest_block(grid: Grid) -> int:
    """Segments of the largest block."""
    return -(-grid.segments // (grid.sp * grid.rounds))


def unit_costs(model: Model, work: StepWork, grid: Grid, world: int, hardware: Hardware) -> Costs:
    """What the simulator needs, in seconds."""
    flops_s = hardware.peak_flops * hardware.kernel_efficiency
    chunk_s = work.micro_batch / grid.chunks * cell_flops(model, work) / flops_s
    if work.offload_activations:
        row_bytes = work.micro_batch / grid.chunks * row_tokens(model, work) * model.hidden * work.dtype_bytes
        chunk_s = max(chunk_s, row_bytes / hardware.host_link_bytes_per_s)
    cell_s = grid.chunks * max(chunk_s, hardware.cell_launch_s)
    collective_s = math.ceil(math.log2(world)) * hardware.collective_latency_s
    wire_s = model.layer_parameters * work.dtype_bytes * (1 - 1 / world) / hardware.gather_bytes_per_s
    return Costs(
        cell_s=cell_s,
        gather_s=collective_s + wire_s,
        reduce_s=collective_s + wire_s,
        latency_s=hardware.handoff_latency_s,
        state_bytes=work.micro_batch * model.state_bytes,
        bytes_per_s=hardware.handoff_bytes_per_s,
        prefetch_layers=handoff_window(grid, cell_s, work.micro_batch * model.state_bytes, hardware),
    )


def handoff_window(grid: Grid, cell_s: float, state_bytes: float, hardware: Hardware) -> int:
    """Prefetch window in layers, hand-off time counted."""
    handoff_s = hardware.handoff_latency_s + state_bytes / grid.chunks / hardware.handoff_bytes_per_s
    return prefetch_window(grid, handoff_s * grid.chunks / (largest_block(grid) * cell_s))


def estimate_s(grid: Grid, costs: Costs) -> float:
    """Forward and backward of one sp group in closed form, within 1 % of the simulator unless gathers dominate.

    A layer of a round takes the longest of computing, gathering and handing on; the last rank starts sp - 1 units
    late in both directions; a pipeline longer than layers * chunks stalls between rounds. The first gather and the
    last reduction are exposed.
    """
    block = largest_block(grid)
    unit_s = block * costs.cell_s / grid.chunks
    transfer_s = costs.state_bytes / grid.chunks / costs.bytes_per_s if grid.sp > 1 else 0
    handoff_s = transfer_s + costs.latency_s if grid.sp > 1 else 0
    back_s = unit_s * (costs.backward_ratio + costs.rerun_ratio)
    # The re-run of a block's last cell is done while waiting for the gradient.
    delays_s = (unit_s + handoff_s, back_s - costs.rerun_ratio * costs.cell_s / grid.chunks + handoff_s)
    total_s = costs.gather_s + costs.reduce_s
    collectives_s = (costs.gather_s, costs.gather_s + costs.reduce_s / grid.rounds)
    for work_s, delay_s, collective_s in zip((unit_s, back_s), delays_s, collectives_s, strict=True):
        round_s = grid.layers * max(grid.chunks * max(work_s, transfer_s), collective_s)
        stall_s = max(0.0, grid.sp * delay_s - round_s) if grid.sp > 1 else 0
        total_s += grid.rounds * round_s + (grid.rounds - 1) * stall_s + (grid.sp - 1) * delay_s
    return total_s
