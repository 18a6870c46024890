"""How big a model with memory is: parameters, state, floating-point operations and activations of one cell.

Letters: T tokens of a segment, M memory tokens, D width, F = 2 nu d_mem features.
"""

from collections.abc import Mapping
from typing import NamedTuple

from ..config import ConfigError

FP32 = 4


class Model(NamedTuple):
    """Sizes of a backbone and its memory."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    tied: bool = False
    head_width: int = 0
    """0: hidden / heads."""
    mlp_matrices: int = 3
    """3: gated (Llama); 2: GPT-2, GPT-NeoX."""
    kind: str = "armt"
    memory_tokens: int = 16
    d_mem: int = 64
    nu: int = 3
    memory_heads: int = 1
    sink: int = 0
    sliding_window: int = 0
    """Rows of keys and values that stay visible across a segment border."""

    @property
    def attention_width(self) -> int:
        return self.heads * (self.head_width or self.hidden // self.heads)

    @property
    def kv_width(self) -> int:
        return self.attention_width * self.kv_heads // self.heads

    @property
    def features(self) -> int:
        return 2 * self.nu * self.d_mem

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer with its memory (norms and biases, below 0.1 %, left out)."""
        backbone = 2 * self.hidden * (self.attention_width + self.kv_width) + self.mlp_matrices * self.hidden * self.mlp
        memory = self.hidden * (2 * self.d_mem + self.hidden + self.memory_heads)
        return backbone + (memory if self.kind == "armt" else 0)

    @property
    def outer_parameters(self) -> int:
        """Embedding, head, memory tokens and sinks."""
        return self.hidden * (self.vocab * (1 if self.tied else 2) + self.memory_tokens + self.sink)

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.outer_parameters

    @property
    def state_bytes(self) -> int:
        """One state of one sequence, fp32: A, z and the window (ARMT, per layer); M rows of hidden states (RMT)."""
        if self.kind == "rmt":
            return self.memory_tokens * self.hidden * FP32
        return self.associations * FP32 + self.window_bytes

    @property
    def associations(self) -> int:
        """Numbers in A and z of one layer and sequence."""
        return self.features * self.hidden // self.memory_heads + self.features

    @property
    def window_bytes(self) -> int:
        """Keys, values and marks of one layer's window of one sequence, in fp32."""
        return self.sliding_window * (2 * self.kv_width + 1) * FP32

    @property
    def update_bytes(self) -> int:
        """What one segment does to a state, fp32: k, beta (v - v_bar), gamma of rank M, and the window anew."""
        return self.memory_tokens * (self.features + self.hidden + self.memory_heads) * FP32 + self.window_bytes


MODELS = {
    "llama-1b": Model(16, 2048, 32, 8, 8192, 128256, tied=True),
    "llama-8b": Model(32, 4096, 32, 8, 14336, 128256),
    "gpt2": Model(12, 768, 12, 12, 3072, 50257, tied=True, mlp_matrices=2),
}


class StepWork(NamedTuple):
    """One optimizer step's data and how it is held. `micro_batch` sequences per sp group."""

    sequence_tokens: int
    segment_tokens: int = 1024
    micro_batch: int = 1
    states: str = "store"
    dtype_bytes: int = 2
    offload_optimizer: bool = False
    offload_parameters: bool = False
    offload_activations: bool = False


def row_tokens(model: Model, work: StepWork) -> int:
    """Positions of one segment as the layers see it."""
    return work.segment_tokens + model.memory_tokens * (2 if model.kind == "rmt" else 1) + model.sink


def cell_flops(model: Model, work: StepWork) -> float:
    """Forward of one cell for one sequence: matrix products, full attention over the row (it has a mask), memory."""
    tokens = row_tokens(model, work)
    attention = 4 * tokens * (tokens + model.sliding_window) * model.attention_width
    read = 2 * tokens * model.associations if model.kind == "armt" else 0
    # W_mv and W_mb see the M memory positions only.
    unused = (tokens - model.memory_tokens) * model.hidden * (model.hidden + model.memory_heads)
    write = 4 * model.memory_tokens * model.associations
    products = 2 * tokens * model.layer_parameters - (2 * unused if model.kind == "armt" else 0)
    return products + attention + (read + write if model.kind == "armt" else 0)


def cell_graph_bytes(model: Model, work: StepWork) -> float:
    """What autograd saves for one cell of the whole micro-batch; an estimate, with flash attention.

    Per position: 12 D (residuals, norms with their fp32 copies, attention output), q k v, 4 mlp, and for ARMT the
    features of q (5 F fp32) and the read (2 D fp32). Per cell: the incoming state, its gradient and the new state.
    """
    per_token = (12 * model.hidden + model.attention_width + 2 * model.kv_width + 4 * model.mlp) * work.dtype_bytes
    memory = (5 * model.features + 2 * model.hidden) * FP32 if model.kind == "armt" else 0
    return work.micro_batch * (row_tokens(model, work) * (per_token + memory) + 3 * model.state_bytes)


HF_KEYS = {
    "layers": ("num_hidden_layers", "n_layer"),
    "hidden": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "vocab": ("vocab_size",),
}
UNGATED_MLP = ("gpt2", "gpt_neox")


def from_hf(config: Mapping, memory: Mapping) -> Model:
    """Sizes from a Hugging Face ``config.json`` and the memory's fields (kind, memory_tokens, d_mem, nu, ...).

    Raises ConfigError naming a size that the config does not give.
    """
    found = {}
    for field, keys in HF_KEYS.items():
        values = [config[key] for key in keys if config.get(key) is not None]
        if not values:
            raise ConfigError(f"{keys[0]} is missing from the model's config; give a config.json of a decoder model")
        found[field] = values[0]
    ungated = config.get("model_type") in UNGATED_MLP
    return Model(
        **found,
        kv_heads=config.get("num_key_value_heads") or found["heads"],
        mlp=config.get("intermediate_size") or config.get("n_inner") or 4 * found["hidden"],
        tied=config.get("tie_word_embeddings", config.get("model_type") == "gpt2"),
        head_width=config.get("head_dim") or 0,
        mlp_matrices=2 if ungated else 3,
        **memory,
    )
