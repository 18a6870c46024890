"""What one cell and the loss head have to do: operations by kind, kernels, and bytes that elementwise kernels move.

Operations follow from the sizes. Bytes are counted: a test runs a cell of every family under a dispatch mode and adds
up what each operation that is no product reads and writes, views left out. They are linear in the
widths to 4 %, with a sliding window to 12 %.

Letters: N positions of a segment's row, D hidden_size, I intermediate_size, A width of all queries, C width of all
         keys, F = 2 nu d_mem features, W window, M memory tokens.
"""

from collections.abc import Mapping
from typing import NamedTuple

from .model_sizes import FP32_BYTES, ModelSizes, StepWork, row_tokens

BACKWARD_OF_PRODUCTS, BACKWARD_OF_ATTENTION = 2.0, 2.5
"""Operations of a backward pass over those of the forward; flash attention computes its scores again."""
BACKWARD_KERNELS = (1.9, 1.9, 0.2)
"""Kernels of a backward pass over those of the forward: of the decoder layer, the memory, the window."""
SUM_BYTES = 2 * FP32_BYTES
"""Read and written per parameter and cell in the float32 sums of its gradients, beside the gradient itself."""
HEAD_PASSES = 8
"""Operations of the head per parameter and scored position: forward, again, and twice as many backward."""
LOGIT_BYTES = 104
"""Moved per logit by the loss. 54 by what its operations read and write; the softmax of a row of 128,256 reads it more
than once: measured on an H200."""


class PerWidth(NamedTuple):
    """A number for each width of a decoder layer."""

    hidden: float
    intermediate: float
    queries: float
    keys: float


class Moved(NamedTuple):
    """Elements of the run's dtype per position that the elementwise kernels of a decoder layer move."""

    forward: PerWidth
    backward: PerWidth


LLAMA = {
    2: Moved(PerWidth(42, 5, 10.5, 11), PerWidth(107, 9, 16.5, 17)),
    4: Moved(PerWidth(20, 5, 10.5, 11), PerWidth(61, 9, 16.5, 17)),
}
QWEN3 = {
    2: Moved(PerWidth(42, 5, 29.5, 29.5), PerWidth(107, 9, 64, 64)),
    4: Moved(PerWidth(20, 5, 18, 18), PerWidth(61, 9, 40, 40)),
}
OLMO2 = {
    2: Moved(PerWidth(46, 5, 39.5, 39.5), PerWidth(119, 9, 82.5, 82.5)),
    4: QWEN3[4],
}
GPT2 = dict.fromkeys((2, 4), Moved(PerWidth(10, 18, 0, 0), PerWidth(23, 29, 0, 0)))
NEOX = dict.fromkeys((2, 4), Moved(PerWidth(21, 2, 0, 0), PerWidth(48, 4, 0, 0)))
# By family, then by bytes of the dtype: norms and rotations convert bfloat16 to float32 and back.
MOVED: Mapping[str, Mapping[int, Moved]] = {
    "gpt2": GPT2,
    "gpt_neox": NEOX,
    "llama": LLAMA,
    "mistral": LLAMA,
    "olmo2": OLMO2,
    "qwen2": LLAMA,
    "qwen3": QWEN3,
}
# What the associative memory moves per position: by D, bytes in float32 whatever the dtype, and elements of the dtype;
# by F, bytes in float32.
MEMORY_FORWARD, MEMORY_BACKWARD = (5, 3, 29), (10, 10, 133)
# Elements per row of keys, N + W of them, by A and C: the window is joined on, turned, and repeated for all heads;
# where queries, keys and values are one map, there is no head to repeat it for. Gradients stop at most of that.
WINDOW, WINDOW_OF_FUSED, WINDOW_BACKWARD = (5, 26), (5, 13), (4, 0)


class Work(NamedTuple):
    """What a cell, or the head, has to do. Kernels and `moved_once` are the same for any number of sequences."""

    products: float
    """Operations of matrix products in the run's dtype."""
    attention: float
    """Operations of the attention."""
    float32: float
    """Operations of the memory's products, which stay in float32."""
    moved: float
    """Bytes."""
    kernels: float = 0
    moved_once: float = 0


def cell_work(model: ModelSizes, work: StepWork) -> tuple[Work, Work]:
    """Forward of one cell for one sequence, and its backward, the re-run of the forward not counted."""
    positions = row_tokens(model, work)
    products, float32 = product_flops(model, positions)
    attention = attention_flops(model, work)
    forward_bytes, backward_bytes = moved_bytes(model, positions, work.dtype_bytes)
    forward = Work(products, attention, float32, forward_bytes, model.kernels)
    kernels = sum(n * of for n, of in zip(BACKWARD_KERNELS, model.kernels_by_part, strict=True))
    # One addition for each tensor to the float32 sums of its gradients: one operation, but of bfloat16 not one kernel.
    sums = model.trainable_layer_parameters * (SUM_BYTES + work.dtype_bytes)
    backward = Work(
        BACKWARD_OF_PRODUCTS * products,
        BACKWARD_OF_ATTENTION * attention,
        BACKWARD_OF_PRODUCTS * float32,
        backward_bytes,
        kernels + len(model.layer_tensors),
        sums,
    )
    return forward, backward


def rerun_work(model: ModelSizes, work: StepWork) -> Work:
    """Forward of one cell for one sequence that is run again: without the layer's last product, where it can be."""
    forward, _ = cell_work(model, work)
    last = 2 * row_tokens(model, work) * model.intermediate_size * model.hidden_size
    return forward._replace(products=forward.products - model.family.leaves_out_last * last)


def weight_work(model: ModelSizes, work: StepWork) -> Work:
    """Weight gradients of the decoder layer's linear maps, of one cell and sequence: the part of its backward that can
    be put off. The memory's are not put off."""
    products = 0 if model.freeze_base else 2 * row_tokens(model, work) * sum(model.family.layer(model.widths))
    return Work(products, 0, 0, 0)


def cell_flops(model: ModelSizes, work: StepWork) -> float:
    """Forward of one cell for one sequence: matrix products, attention, memory."""
    return sum(product_flops(model, row_tokens(model, work))) + attention_flops(model, work)


def product_flops(model: ModelSizes, positions: int) -> tuple[float, float]:
    """Operations of the matrix products of a cell: in the run's dtype, and of the memory's, in float32."""
    backbone = 2 * positions * sum(model.family.layer(model.widths))
    if not model.kind.associative:
        return backbone, 0.0
    d, strengths = model.hidden_size, model.hidden_size if model.gating else model.n_heads
    # W_mk, W_mv and W_mb see the M memory positions only.
    projections = 2 * d * (positions * model.d_mem + model.num_mem_tokens * (model.d_mem + d + strengths))
    return backbone + projections, (2 * positions + 4 * model.num_mem_tokens) * model.associations


def attention_flops(model: ModelSizes, work: StepWork) -> float:
    """Operations of a cell's attention: half of all pairs where it needs no mask but the causal one."""
    positions = row_tokens(model, work)
    masked = model.sliding_window or work.padded or work.packed
    return 4 * positions * (positions + model.sliding_window) * model.widths.queries * (1 if masked else 0.5)


def moved_bytes(model: ModelSizes, positions: int, dtype_bytes: int) -> tuple[float, float]:
    """Bytes that the elementwise kernels of a cell move, forward and backward."""
    widths = PerWidth(model.hidden_size, model.intermediate_size, model.widths.queries, model.widths.keys)
    both = []
    for per_width, memory in zip(MOVED[model.model_type][dtype_bytes], (MEMORY_FORWARD, MEMORY_BACKWARD), strict=True):
        own = positions * dtype_bytes * sum(n * width for n, width in zip(per_width, widths, strict=True))
        per_channel, per_feature = memory[0] + memory[1] * dtype_bytes, memory[2]
        read = positions * (per_channel * model.hidden_size + per_feature * model.features) * model.kind.associative
        both.append(own + read)
    rows = (positions + model.sliding_window) * (model.sliding_window > 0) * dtype_bytes
    both_ways = WINDOW_OF_FUSED if model.family.fused_qkv else WINDOW, WINDOW_BACKWARD
    window = [rows * (elements[0] * widths.queries + elements[1] * widths.keys) for elements in both_ways]
    return both[0] + window[0], both[1] + window[1]


def head_work(model: ModelSizes, scored: float) -> Work:
    """Forward and backward of the head and the loss over so many scored positions."""
    logits = scored * model.vocab_size
    return Work(HEAD_PASSES * logits * model.hidden_size, 0, 0, LOGIT_BYTES * logits)
