"""How large a model with memory is: its parameters, its state, and the kernels of one cell.

Fields are named as in ARMTConfig and its base_config.

Letters: B micro-batch, T tokens of a segment, M memory tokens, N positions of a segment's row, D hidden_size,
         F = 2 nu d_mem features.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..config import ConfigError
from .backbone_sizes import FAMILIES, FamilySizes, Widths, base_sizes
from .grid import ARMT_ARROWS, RMT_ARROWS, Arrow
from .weight_groups import PER_CELL

FP32_BYTES = 4
MEMORY_KERNELS = 28
"""Operations that one read and one write of the associative memory launch, views not counted."""
DECAY_KERNELS = 6
"""Operations that a decay of the state adds to a read and a write."""
WINDOW_KERNELS, TURN_KERNELS = 20, 10
"""Operations that a window adds to a cell, and that turning its keys adds where positions are rotary."""


class KindSizes(NamedTuple):
    """What a kind of memory adds to its base model."""

    arrows: tuple[Arrow, ...]
    memory_groups: int
    """How often the M memory rows stand in a segment's row: behind its tokens, and for RMT before them too."""
    associative: bool = False
    """Whether every layer has W_mq, W_mk, W_mv, W_mb and a state of A and z."""


# By `memory_kind`.
KINDS = {
    "armt": KindSizes(ARMT_ARROWS, 1, associative=True),
    "rmt": KindSizes(RMT_ARROWS, 2),
    "transformer_xl": KindSizes(ARMT_ARROWS, 0),
}
MEMORY_TOKENS = 16
"""num_mem_tokens where it is not given, of a kind that has memory tokens."""


class ModelSizes(NamedTuple):
    """Sizes of a base model and its memory."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    head_dim: int
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    memory_kind: str = "armt"
    num_mem_tokens: int = MEMORY_TOKENS
    d_mem: int = 64
    nu: int = 3
    n_heads: int = 1
    gating: bool = False
    state_decay: float | str | None = None
    freeze_mem: bool = False
    freeze_base: bool = False
    """Whether all but the memory is frozen."""
    sink: int = 0
    sliding_window: int = 0
    """Rows of keys and values that stay visible across a segment border; 0: none."""

    @property
    def kind(self) -> KindSizes:
        """The row of its kind of memory."""
        return KINDS[self.memory_kind]

    @property
    def family(self) -> FamilySizes:
        """The row of its family."""
        return FAMILIES[self.model_type]

    @property
    def widths(self) -> Widths:
        """Widths of one decoder layer."""
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return Widths(
            self.hidden_size,
            queries,
            keys,
            self.head_dim,
            self.intermediate_size,
            self.attention_bias,
            self.mlp_bias,
        )

    @property
    def kernels_by_part(self) -> tuple[int, int, int]:
        """Operations that one forward of a cell launches: of the decoder layer, the memory, the window."""
        window = WINDOW_KERNELS + (0 if self.family.learned_positions else TURN_KERNELS)
        memory = (MEMORY_KERNELS + DECAY_KERNELS * (self.state_decay is not None)) * self.kind.associative
        return self.family.kernels, memory, window * (self.sliding_window > 0)

    @property
    def kernels(self) -> int:
        """Operations that one forward of a cell launches."""
        return sum(self.kernels_by_part)

    @property
    def features(self) -> int:
        """Features of all memory heads together."""
        return 2 * self.nu * self.d_mem

    @property
    def memory_tensors(self) -> list[int]:
        """Elements of W_mq, W_mk, W_mv, W_mb, its bias, and the decay, if it has them."""
        if not self.kind.associative:
            return []
        d, strengths = self.hidden_size, self.hidden_size if self.gating else self.n_heads
        decay = [1] if self.state_decay == "learned" else []
        return [d * self.d_mem, d * self.d_mem, d * d, d * strengths, strengths, *decay]

    @property
    def layer_tensors(self) -> list[int]:
        """Elements of each parameter of one layer with its memory."""
        return self.family.layer(self.widths) + self.memory_tensors

    @property
    def outer_tensors(self) -> list[int]:
        """Elements of each parameter outside the layers: embedding, positions, last norm, head, memory rows, sinks."""
        d = self.hidden_size
        positions = [self.max_position_embeddings * d] if self.family.learned_positions else []
        head = [] if self.tie_word_embeddings else [self.vocab_size * d]
        rows = [count * d for count in (self.num_mem_tokens, self.sink) if count]
        return [self.vocab_size * d, *positions, *[d] * self.family.norm_vectors, *head, *rows]

    @property
    def layer_parameters(self) -> int:
        """Of one layer with its memory."""
        return sum(self.layer_tensors)

    @property
    def outer_parameters(self) -> int:
        """Outside the layers."""
        return sum(self.outer_tensors)

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.num_hidden_layers * self.layer_parameters + self.outer_parameters

    @property
    def trainable_layer_parameters(self) -> int:
        """Of one layer, those that get a gradient."""
        base = 0 if self.freeze_base else sum(self.family.layer(self.widths))
        return base + (0 if self.freeze_mem else sum(self.memory_tensors))

    @property
    def trainable_parameters(self) -> int:
        """Of the whole model, those that get a gradient and an optimizer state."""
        rows = (self.num_mem_tokens + self.sink) * self.hidden_size
        outer = rows if self.freeze_base else self.outer_parameters
        return self.num_hidden_layers * self.trainable_layer_parameters + outer

    def persistent(self, tensors: list[int], threshold: int) -> int:
        """Elements of those `tensors` that ZeRO-3 keeps whole on every rank: at most `threshold` elements each."""
        return sum(elements for elements in tensors if elements <= threshold)

    @property
    def state_bytes(self) -> int:
        """One layer's state of one sequence, fp32: A and z, if it has them, and the window."""
        return self.associations * FP32_BYTES * self.kind.associative + self.window_bytes

    @property
    def carried_bytes(self) -> int:
        """Memory rows that pass from the last layer of a segment to the first of the next (RMT), of one sequence."""
        carried = Arrow.LAST_LAYER in self.kind.arrows
        return self.num_mem_tokens * self.hidden_size * FP32_BYTES * carried

    @property
    def associations(self) -> int:
        """Numbers in A and z of one layer and sequence."""
        return self.features * self.hidden_size // self.n_heads + self.features

    @property
    def window_bytes(self) -> int:
        """Keys, values and marks of one layer's window of one sequence, in fp32."""
        return self.sliding_window * (2 * self.widths.keys + 1) * FP32_BYTES

    @property
    def update_bytes(self) -> int:
        """What one segment does to a state, fp32: k, beta (v - v_bar), gamma of rank M, and the window anew."""
        rank_m = self.num_mem_tokens * (self.features + self.hidden_size + self.n_heads) * FP32_BYTES
        return rank_m * self.kind.associative + self.window_bytes


def llama_sizes(hidden: int, layers: int, keys: int, intermediate: int, tied: bool) -> ModelSizes:
    """A Llama 3 of 32 heads."""
    return ModelSizes("llama", hidden, layers, 32, keys, intermediate, 128256, hidden // 32, 131072, tied)


MODELS = {
    "llama-1b": llama_sizes(2048, 16, 8, 8192, tied=True),
    "llama-8b": llama_sizes(4096, 32, 8, 14336, tied=False),
    "gpt2": ModelSizes(**base_sizes({"model_type": "gpt2"})),
}


class StepWork(NamedTuple):
    """The data of one optimizer step and how it is held. `micro_batch` sequences per sp group."""

    sequence_tokens: int
    segment_tokens: int = 1024
    micro_batch: int = 1
    states: str = "store"
    keep: float | str = 0
    """Cells that keep their graphs, as in the configuration (bptt.keep)."""
    weight_gradients: str = PER_CELL
    """As in the configuration (bptt.weight_gradients)."""
    dtype_bytes: int = 2
    offload_optimizer: bool = False
    offload_parameters: bool = False
    offload_activations: bool = False
    accumulation: int = 1
    """Micro-batches of a step."""
    scored_tokens: int = 0
    """Scored positions of one sequence; 0: all."""
    gradient_bytes: int = 0
    """Of one accumulated gradient (ds_config data_types.grad_accum_dtype); 0: dtype_bytes."""
    reduce_bucket_size: int = 0
    """Elements, as in the ds_config; 0: derived from the layer."""
    stage3_param_persistence_threshold: int = 100_000
    """Elements, as in the ds_config; its default is DeepSpeed's."""
    zero_hpz_partition_size: int = 1
    """Ranks that share a second copy of the parameters, as in the ds_config; 1: there is none."""
    carried: bool = False
    """Whether the memory of every row passes to the next step (train.carry_state, data.carry_memory)."""
    padded: bool = False
    """Whether rows may be shorter than their batch."""
    packed: bool = False
    """Whether documents that do not see each other share segments (data.text.pack)."""
    teacher_window: int = 0
    """Tokens that the frozen base reads at once as a teacher (loss.distill); 0: there is none."""


def teacher_tokens(work: StepWork) -> int:
    """Tokens that a teacher reads for one sequence: its windows overlap by half."""
    overlap, tokens = work.teacher_window // 2, work.sequence_tokens
    starts = range(0, max(1, tokens - overlap), work.teacher_window - overlap)
    return sum(min(work.teacher_window, tokens - start) for start in starts)


def row_tokens(model: ModelSizes, work: StepWork) -> int:
    """Positions of one segment as the layers see it."""
    return work.segment_tokens + model.num_mem_tokens * model.kind.memory_groups + model.sink


def model_sizes(config: Mapping[str, Any], memory: Mapping[str, Any]) -> ModelSizes:
    """Sizes from a Hugging Face ``config.json`` and the memory's fields (memory_kind, num_mem_tokens, d_mem, ...).

    Raises ConfigError naming a field that does not fit.
    """
    sizes = ModelSizes(**base_sizes(config), **memory)
    for field in ("d_mem", "nu", "n_heads", *["num_mem_tokens"] * (sizes.kind.memory_groups > 0)):
        if getattr(sizes, field) < 1:
            raise ConfigError(f"{field}={getattr(sizes, field)}: must be at least 1")
    for field in ("d_mem", "hidden_size"):
        if getattr(sizes, field) % sizes.n_heads:
            raise ConfigError(f"n_heads={sizes.n_heads} does not divide {field}={getattr(sizes, field)}; try n_heads=1")
    return sizes


def memory_fields(given: Mapping[str, Any], segment_tokens: int) -> dict[str, Any]:
    """Put what a kind of memory has by default in the place of None, as ARMTConfig does.

    given: memory_kind, num_mem_tokens, sliding_window and others. Raises ConfigError for an unknown kind, and for
    memory tokens of a kind that has none.
    """
    kind, tokens = given["memory_kind"], given["num_mem_tokens"]
    if kind not in KINDS:
        raise ConfigError(f"memory_kind={kind}: unknown; known here: {', '.join(KINDS)}")
    if KINDS[kind].memory_groups:
        return {**given, "num_mem_tokens": MEMORY_TOKENS if tokens is None else tokens}
    if tokens:
        raise ConfigError(f"num_mem_tokens={tokens}: memory_kind={kind} has no memory tokens; leave it out")
    return {**given, "num_mem_tokens": 0, "sliding_window": given["sliding_window"] or segment_tokens}
