"""Bytes of device and host memory that one rank holds during a training step, item by item, phase by phase.

The items are what segment BPTT and DeepSpeed ZeRO-3 0.19 keep alive; `benchmarks/planner.py` compares their sum with
the live tensors of real steps. A step has four phases, and the largest decides: the loss head, the backward pass
through the layers, the last reduction of gradients, and the optimizer's update.

Letters: B micro-batch, K segments of a block, L layers, N positions of a segment's row, D hidden_size, n scored
         positions of a rank.
"""

import math
from typing import NamedTuple

from .grid import Grid, largest_block, reduction_layers
from .model_sizes import FP32_BYTES, ModelSizes, StepWork, row_tokens, teacher_tokens
from .weight_groups import GROUP, GROUPED

LOGITS_TOKENS = 1024
"""Rows of logits alive at a time in the chunked cross-entropy."""
LOGITS_COPIES = 3
"""Logits, their log-softmax and their gradient."""
CUDA_BUCKET_ELEMENTS = 50_000_000
"""The smallest reduction bucket that zero3/engine.py derives on GPUs."""
UPDATE = "optimizer step"
# What every rank holds a share of, by item.
STATES = ("parameters (shard)", "gradients (shard)", "optimizer (shard)")
# Tensors of width intermediate_size that the MLP keeps with this activation; others are composed in Python.
KEPT_BY_ACTIVATION = {"gelu": 2, "gelu_python": 5, "relu": 2, "silu": 2, "gelu_pytorch_tanh": 2}
COMPOSED_ACTIVATION = 5


class Held(NamedTuple):
    """A run as far as its memory is concerned."""

    model: ModelSizes
    work: StepWork
    grid: Grid
    world: int
    live_layers: int
    """Layers that ZeRO-3 holds whole at a time."""
    device: str = "cuda"

    kept_share: float = 0.0
    """Of the cells that keep their graphs."""

    @property
    def block(self) -> int:
        """Segments of the largest block."""
        return largest_block(self.grid)

    @property
    def chunk_rows(self) -> int:
        """Sequences of the largest chunk."""
        return -(-self.work.micro_batch // self.grid.chunks)

    @property
    def layer_input_bytes(self) -> int:
        """H of one layer: the hidden states of all segments of a rank."""
        rows = self.work.micro_batch * self.grid.rounds * self.block * row_tokens(self.model, self.work)
        return rows * self.model.hidden_size * self.work.dtype_bytes

    @property
    def bucket_elements(self) -> int:
        """Elements of ZeRO-3's reduction bucket, as zero3/engine.py derives it."""
        if self.work.reduce_bucket_size:
            return self.work.reduce_bucket_size
        if self.device == "cpu":
            return self.model.parameters + 1
        return max(reduction_layers(self.grid) * self.model.layer_parameters, CUDA_BUCKET_ELEMENTS)


def gpu_bytes(held: Held) -> tuple[str, dict[str, float]]:
    """The phase that holds most, and its memory by item."""
    phases = phase_bytes(held)
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    return phase, phases[phase]


def phase_bytes(held: Held) -> dict[str, dict[str, float]]:
    """Device memory by item, of every phase of a step."""
    always = resident_bytes(held)
    phases = {
        "loss head": head_bytes(held),
        "backward, last layer": backward_bytes(held, done=0),
        "backward, first layer": backward_bytes(held, done=held.grid.layers - 1),
        "reduction": reduction_bytes(held),
        UPDATE: update_bytes(held),
    }
    return {name: always | items for name, items in phases.items()}


def resident_bytes(held: Held) -> dict[str, float]:
    """What stays from step to step. Without other ranks the shards are the parameters; nothing is gathered."""
    model, work, world = held.model, held.work, held.world
    trainable = model.trainable_parameters / world
    on_device = not work.offload_optimizer
    threshold = work.stage3_param_persistence_threshold
    layers = model.num_hidden_layers * model.persistent(model.layer_tensors, threshold)
    persistent = layers + model.persistent(model.outer_tensors, threshold)
    return {
        "parameters (shard)": 0 if work.offload_parameters else model.parameters * work.dtype_bytes / world,
        "second copy of parameters (shard)": secondary_bytes(held),
        "small parameters (whole)": persistent * work.dtype_bytes if world > 1 else 0,
        "gradients (shard)": on_device * trainable * (work.gradient_bytes or work.dtype_bytes),
        "optimizer (shard)": on_device * optimizer_bytes(model) / world,
        "reduction bucket": held.bucket_elements * work.dtype_bytes,
        # Parameters of one layer at the addresses of its CUDA graphs; their sums are those of a cell.
        "recorded cells": model.layer_parameters * work.dtype_bytes if held.device == "cuda" else 0,
        "states on the wire": wire_bytes(held),
        "states of the step before": work.carried * step_states_bytes(held),
    }


def secondary_bytes(held: Held) -> float:
    """Of a second copy of the parameters, which the ranks of a node share for the backward pass (ZeRO++ hpZ)."""
    ranks = held.work.zero_hpz_partition_size
    return held.model.parameters * held.work.dtype_bytes / min(ranks, held.world) if ranks > 1 else 0


def optimizer_bytes(model: ModelSizes) -> float:
    """AdamW: fp32 master weights, which DeepSpeed copies in fp32 runs too, and two moments."""
    return 3 * FP32_BYTES * model.trainable_parameters


def step_states_bytes(held: Held) -> float:
    """What passes from step to step: as the step before left it, as it enters this one, and as it leaves it."""
    model, work = held.model, held.work
    return 3 * work.accumulation * work.micro_batch * (held.grid.layers * model.state_bytes + model.carried_bytes)


def wire_bytes(held: Held) -> float:
    """Send buffers: gloo frees them only when the next pass drains the wire, NCCL when they have left."""
    if held.grid.sp == 1:
        return 0
    sends = held.grid.rounds * held.grid.layers if held.device == "cpu" else 2 / held.grid.chunks
    return sends * held.work.micro_batch * held.model.state_bytes


def gathered_bytes(held: Held, tensors: list[int], copies: float) -> float:
    """Whole parameters that come and go: `copies` times those `tensors` that are too large to persist."""
    if held.world == 1:
        return 0
    passing = sum(tensors) - held.model.persistent(tensors, held.work.stage3_param_persistence_threshold)
    return copies * passing * held.work.dtype_bytes


def head_bytes(held: Held) -> dict[str, float]:
    """The loss head, after the last layer's forward: every layer's input and the last output are alive."""
    model, work = held.model, held.work
    scored = work.micro_batch * (work.scored_tokens or held.grid.rounds * held.block * work.segment_tokens)
    # Picked rows, normed rows, and what the norm keeps. Where float32 is not the dtype, a copy in it as well, and two
    # more in the norm's backward pass (measured on GPUs, from 32 k to 1 M tokens).
    width = (3 if model.family.norm_vectors == 1 else 2) * work.dtype_bytes
    width += 3 * FP32_BYTES if work.dtype_bytes < FP32_BYTES else 0
    logits = min(scored, LOGITS_TOKENS) * model.vocab_size * FP32_BYTES
    return {
        "live layers": gathered_bytes(held, model.layer_tensors, min(held.grid.layers, held.live_layers - 1)),
        "embedding, head": gathered_bytes(held, model.outer_tensors, 1),
        "layer inputs H": stashed_layers(held) * held.layer_input_bytes,
        "last hidden states": held.layer_input_bytes,
        "masks": mask_bytes(held),
        "states": work.micro_batch * states_bytes(held, rerun=False),
        "outputs at memory positions": output_bytes(held),
        "kept graphs": kept_bytes(held),
        "loss head": scored * model.hidden_size * width + LOGITS_COPIES * logits,
        "whole gradients": 0 if model.freeze_base else model.vocab_size * model.hidden_size * work.dtype_bytes,
        "teacher": teacher_bytes(held, scored),
    }


def teacher_bytes(held: Held, scored: int) -> float:
    """Hidden states of a teacher's windows after the last layer, those that are kept, and those that are scored."""
    work = held.work
    if not work.teacher_window:
        return 0
    read = math.ceil(teacher_tokens(work) / held.grid.sp) * work.micro_batch
    kept = held.grid.rounds * held.block * work.segment_tokens * work.micro_batch
    return (read + kept + 2 * scored) * held.model.hidden_size * work.dtype_bytes


def stashed_layers(held: Held) -> int:
    """Layer inputs on the device: all, or the one in use and the one being copied."""
    return 2 if held.work.offload_activations else held.grid.layers


def backward_bytes(held: Held, done: int) -> dict[str, float]:
    """In the backward pass of a layer while `done` others are behind it: their inputs and states are free again.

    Beside a layer's input stand the gradients of its output and input. With several rounds a layer's gradients are kept
    whole until its last block has added to them.
    """
    model, work, layers = held.model, held.work, held.grid.layers
    left = (layers - done) / layers
    inputs = 2 if work.offload_activations else layers - done
    whole = layers * model.trainable_layer_parameters * work.dtype_bytes if held.grid.rounds > 1 else 0
    rerun = states_bytes(held, rerun=True) - states_bytes(held, rerun=False)
    return {
        "live layers": gathered_bytes(held, model.layer_tensors, min(layers, held.live_layers)),
        "embedding, head": gathered_bytes(held, model.outer_tensors, 1),
        "layer inputs H": inputs * held.layer_input_bytes,
        "gradients of H": 2 * held.layer_input_bytes,
        "masks": mask_bytes(held),
        "states": work.micro_batch * (left * states_bytes(held, rerun=False) + rerun),
        "outputs at memory positions": left * output_bytes(held),
        "kept graphs": left * kept_bytes(held),
        "one cell's graph and gradients": cell_bytes(held),
        "weight gradients put off": put_off_bytes(held),
        "whole gradients": whole,
    }


def mask_bytes(held: Held) -> float:
    """Attention masks [N, N] of a row, which layers share and segments that are padded alike; see `executor.contexts`.

    A segment in which a document begins has its own. Without padding or documents none is needed, but one for all rows
    under a sliding window.
    """
    model, work = held.model, held.work
    segments = held.grid.rounds * held.block
    if work.packed:
        masks = work.micro_batch * segments
    elif work.padded:
        masks = work.micro_batch * min(segments, 2 * held.chunk_rows + 1)
    else:
        masks = int(model.sliding_window > 0)
    return masks * row_tokens(model, work) ** 2 * work.dtype_bytes


def states_bytes(held: Held, rerun: bool) -> float:
    """What the backward needs to have each segment's incoming state again, of one sequence (bptt.states).

    `rerun`: with the states that the layer in progress makes anew from its updates or its first state.
    """
    model, block, rounds = held.model, held.block, held.grid.rounds
    kept = {
        "store": block * model.state_bytes,
        "rebuild": model.state_bytes + block * model.update_bytes,
        "recompute": model.state_bytes,
    }
    anew = {"store": 0, "rebuild": 2 * math.isqrt(block), "recompute": block}
    layers = held.grid.layers * rounds * kept[held.work.states] + rerun * anew[held.work.states] * model.state_bytes
    return layers + rounds * model.carried_bytes


def output_bytes(held: Held) -> float:
    """What the cells that are run again need of their outputs: the memory positions."""
    model, work = held.model, held.work
    cells = held.grid.layers * held.grid.rounds * held.block * (1 - held.kept_share)
    positions = model.family.leaves_out_last * model.num_mem_tokens * work.micro_batch
    return cells * positions * model.hidden_size * work.dtype_bytes


def reduction_bytes(held: Held) -> dict[str, float]:
    """ZeRO-3's last reduction: a bucket's gradients once more in the order of the shards."""
    return {
        "gradients by shard": min(held.bucket_elements, held.model.trainable_parameters) * held.work.dtype_bytes,
        "gradients of H": held.layer_input_bytes,
    }


def update_bytes(held: Held) -> dict[str, float]:
    """The optimizer's update: one flat fp32 gradient; torch's AdamW, which runs on CPU, adds two temporaries."""
    shard = 0 if held.work.offload_optimizer else held.model.trainable_parameters / held.world * FP32_BYTES
    return {
        # Released before the update and gathered after it.
        "small parameters (whole)": 0,
        "gradients (fp32)": shard,
        "AdamW's temporaries": 2 * shard if held.device == "cpu" else 0,
    }


def cell_bytes(held: Held) -> float:
    """Most that is alive while one cell is run again and back-propagated: graph, gradients, parameter gradients.

    The MLP's backward comes first, beside most of the graph; at the end little of the graph is left, but the
    gradients of all parameters are there. The gradients of one cell stand beside the sums of those before.
    The previous cell's output stays until the next one takes its place.
    """
    model, work = held.model, held.work
    positions = held.chunk_rows * row_tokens(model, work)
    read, rest = read_graph_bytes(model, work), backbone_graph_bytes(model, work)
    mlp_gradients = (2 * model.intermediate_size + 2 * model.hidden_size) * work.dtype_bytes
    output = model.hidden_size * work.dtype_bytes
    # Two new states, two gradients.
    states = 4 * held.chunk_rows * model.state_bytes
    layer = model.trainable_layer_parameters
    sums = layer * FP32_BYTES if held.block > 1 else 0
    down = 0 if model.freeze_base else model.intermediate_size * model.hidden_size
    down += 0 if model.freeze_mem else sum(model.memory_tensors[1:])
    first = positions * (read + rest + mlp_gradients + output) + down * work.dtype_bytes
    last = positions * (read + read_gradient_bytes(model) + 2 * output) + layer * work.dtype_bytes
    return max(first, last) + sums + states + held.chunk_rows * write_graph_bytes(model)


def put_off_bytes(held: Held) -> float:
    """What goes into the linear maps of a group's cells and the gradients of what comes out, joined for one map."""
    model, work = held.model, held.work
    if work.weight_gradients != GROUPED or model.freeze_base:
        return 0
    d, intermediate, widths = model.hidden_size, model.intermediate_size, model.widths
    # Queries, keys and values have one input, and so have a gate and what it is multiplied by.
    inputs = 2 * d + widths.queries + intermediate
    gradients = 2 * d + widths.queries + 2 * widths.keys + (1 + model.family.gated_mlp) * intermediate
    rows = min(GROUP, held.block) * held.chunk_rows * row_tokens(model, work)
    joined = d + intermediate
    return rows * (inputs + gradients + joined) * work.dtype_bytes


def kept_bytes(held: Held) -> float:
    """Graphs of a rank's cells that are kept, all of them."""
    cells = held.grid.layers * held.grid.rounds * held.block * held.grid.chunks
    return held.kept_share * cells * kept_graph_bytes(held.model, held.work, held.chunk_rows)


def kept_graph_bytes(model: ModelSizes, work: StepWork, chunk_rows: int) -> float:
    """The graph of one cell, of the sequences of one chunk, beside its input."""
    per_position = read_graph_bytes(model, work) + backbone_graph_bytes(model, work)
    per_sequence = row_tokens(model, work) * per_position + write_graph_bytes(model)
    return chunk_rows * (per_sequence + (work.states != "store") * model.state_bytes)


def read_graph_bytes(model: ModelSizes, work: StepWork) -> float:
    """What autograd keeps of the memory's read, per position: features and what they repeat, the sum."""
    if not model.kind.associative:
        return 0
    return FP32_BYTES * (model.features + repeated_features(model)) + model.hidden_size * work.dtype_bytes


def repeated_features(model: ModelSizes) -> int:
    """Numbers that the features of one position are products of, as often as they are repeated."""
    return 2 * model.d_mem * (model.nu + 1)


def read_gradient_bytes(model: ModelSizes) -> float:
    """What the backward pass of the memory's read makes, per position: gradients of values, features, their terms."""
    if not model.kind.associative:
        return 0
    copies = 1 + math.ceil(model.nu * model.n_heads / model.d_mem)
    return FP32_BYTES * (model.hidden_size + (2 + 2 * copies) * model.features)


def backbone_graph_bytes(model: ModelSizes, work: StepWork) -> float:
    """What autograd keeps of the decoder layer, per position, with an attention that keeps no probabilities."""
    widths, family, dtype = model.widths, model.family, work.dtype_bytes
    copy = FP32_BYTES if dtype < FP32_BYTES else 0
    # RMSNorm keeps its input as fp32, the normed row and the scaled one; LayerNorm the scaled one.
    norm = 2 * dtype + copy if family.norm_vectors == 1 else dtype
    turned = 0 if family.learned_positions or not family.fused_qkv else widths.queries + widths.keys
    attention = 2 * widths.queries + 2 * widths.keys + turned
    if family.inner_norms:
        attention += 2 * (widths.queries + widths.keys)
    mlp = 4 if family.gated_mlp else KEPT_BY_ACTIVATION.get(model.hidden_act, COMPOSED_ACTIVATION)
    residuals = (1 if family.parallel_residual else 2) * model.hidden_size
    row = attention + mlp * model.intermediate_size + residuals
    return 2 * norm * model.hidden_size + row * dtype + model.num_attention_heads * FP32_BYTES


def write_graph_bytes(model: ModelSizes) -> float:
    """What autograd keeps of the memory's write, of one sequence's M positions."""
    if not model.kind.associative:
        return 0
    width = model.features + repeated_features(model) + 4 * model.hidden_size
    return model.num_mem_tokens * width * FP32_BYTES


def host_bytes(held: Held) -> dict[str, float]:
    """Pinned host memory of one rank by item, for what is offloaded."""
    model, work, world = held.model, held.work, held.world
    optimizer = (model.trainable_parameters * FP32_BYTES + optimizer_bytes(model)) / world
    return {
        "parameters (shard)": work.offload_parameters * model.parameters * work.dtype_bytes / world,
        "gradients and optimizer (shard)": work.offload_optimizer * optimizer,
        "layer inputs H": work.offload_activations * held.grid.layers * held.layer_input_bytes,
    }
