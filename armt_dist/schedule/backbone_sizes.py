"""The parameter tensors and kept activations of one decoder layer, one row per family of `model.backbone.FAMILIES`.

Numbers are exact: a test compares every row with the model that transformers builds, and its defaults with the
configuration that transformers fills in. It reads plain dictionaries: planning needs neither torch nor transformers.

Letters: D hidden_size, A width of all queries, C width of all keys, I intermediate_size.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..config import ConfigError, one_line


class Widths(NamedTuple):
    """Widths of one decoder layer, and which of its linear maps have a bias."""

    hidden: int
    queries: int
    keys: int
    head: int
    intermediate: int
    attention_bias: bool = False
    mlp_bias: bool = False


class FamilySizes(NamedTuple):
    """One family: its parameters by tensor, what its layers keep for the backward pass, and its defaults."""

    layer: Callable[[Widths], list[int]]
    """Elements of each parameter of one decoder layer."""
    kernels: int
    """Operations that one forward of a decoder layer launches, views not counted."""
    norm_vectors: int
    """Vectors of width D in one norm: 1 (RMSNorm), 2 (LayerNorm with its bias)."""
    fused_qkv: bool
    """Queries, keys and values are slices of one tensor, which stays as long as any of them."""
    defaults: Mapping[str, Any]
    biases: tuple[str, ...] = ()
    """Fields of its configuration that decide whether maps have a bias."""
    learned_positions: bool = False
    gated_mlp: bool = True
    inner_norms: bool = False
    """Norms over queries and keys."""
    parallel_residual: bool = False
    """Attention and MLP read the same row."""
    leaves_out_last: bool = True
    """Whether a cell that is run again leaves out the MLP's last map, as no norm needs what it gives."""
    names: Mapping[str, str] = {}
    """The family's own name of a field, where it differs."""


def matrix(rows: int, columns: int, bias: bool = False) -> list[int]:
    """Elements of a linear map's weight, then those of its bias where there is one."""
    return [rows * columns, columns] if bias else [rows * columns]


def llama_layer(widths: Widths, qkv_bias: bool = False, norms: tuple[int, ...] = ()) -> list[int]:
    """Four attention maps, a gated MLP, two RMSNorms and `norms` of other widths."""
    d, a, c, i, bias = widths.hidden, widths.queries, widths.keys, widths.intermediate, widths.attention_bias
    query_bias = bias or qkv_bias
    attention = [*matrix(d, a, query_bias), *matrix(d, c, query_bias), *matrix(d, c, query_bias), *matrix(a, d, bias)]
    mlp = [*matrix(d, i, widths.mlp_bias), *matrix(d, i, widths.mlp_bias), *matrix(i, d, widths.mlp_bias)]
    return [*attention, *mlp, d, d, *norms]


def qwen2_layer(widths: Widths) -> list[int]:
    """As Llama; queries, keys and values always have a bias."""
    return llama_layer(widths, qkv_bias=True)


def qwen3_layer(widths: Widths) -> list[int]:
    """As Llama, with norms over each head's queries and keys."""
    return llama_layer(widths, norms=(widths.head, widths.head))


def olmo2_layer(widths: Widths) -> list[int]:
    """As Llama, with norms over all queries and over all keys."""
    return llama_layer(widths, norms=(widths.queries, widths.keys))


def fused_layer(widths: Widths, attention_bias: bool) -> list[int]:
    """One map for queries, keys and values, a plain MLP with biases, two LayerNorms (GPT-2, GPT-NeoX)."""
    d, i = widths.hidden, widths.intermediate
    attention = [*matrix(d, 3 * d, attention_bias), *matrix(d, d, attention_bias)]
    return [*attention, *matrix(d, i, True), *matrix(i, d, True), d, d, d, d]


def gpt2_layer(widths: Widths) -> list[int]:
    """Every map has a bias."""
    return fused_layer(widths, True)


def gpt_neox_layer(widths: Widths) -> list[int]:
    """The attention maps have a bias if `attention_bias` says so."""
    return fused_layer(widths, widths.attention_bias)


GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
    "hidden_act": "activation_function",
}


def shape(
    vocabulary: int, hidden: int, layers: int, heads: int, keys: int, intermediate: int | None, positions: int
) -> dict:
    """The sizes that a family's configuration has where a run leaves them out."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "intermediate_size": intermediate,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
        "head_dim": None,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
    }


FAMILIES = {
    "gpt2": FamilySizes(
        gpt2_layer,
        kernels=17,
        norm_vectors=2,
        fused_qkv=True,
        defaults=shape(50257, 768, 12, 12, 12, None, 1024) | {"tie_word_embeddings": True, "hidden_act": "gelu_new"},
        learned_positions=True,
        gated_mlp=False,
        names=GPT2_NAMES,
    ),
    "gpt_neox": FamilySizes(
        gpt_neox_layer,
        kernels=23,
        norm_vectors=2,
        fused_qkv=True,
        defaults=shape(50432, 6144, 44, 64, 64, 24576, 2048) | {"attention_bias": True, "hidden_act": "gelu"},
        biases=("attention_bias",),
        gated_mlp=False,
        parallel_residual=True,
    ),
    "llama": FamilySizes(
        llama_layer, 34, 1, False, shape(32000, 4096, 32, 32, 32, 11008, 2048), biases=("attention_bias", "mlp_bias")
    ),
    "mistral": FamilySizes(llama_layer, 34, 1, False, shape(32000, 4096, 32, 32, 8, 14336, 131072)),
    "olmo2": FamilySizes(
        olmo2_layer,
        46,
        1,
        False,
        shape(50304, 4096, 32, 32, 32, 11008, 2048),
        biases=("attention_bias",),
        inner_norms=True,
        leaves_out_last=False,
    ),
    "qwen2": FamilySizes(qwen2_layer, 34, 1, False, shape(151936, 4096, 32, 32, 32, 22016, 32768)),
    "qwen3": FamilySizes(
        qwen3_layer,
        46,
        1,
        False,
        shape(151936, 4096, 32, 32, 32, 22016, 32768) | {"head_dim": 128},
        biases=("attention_bias",),
        inner_norms=True,
    ),
}
# A configuration of these may leave out the number of key-value heads, which is then that of the query heads.
KEYS_AS_QUERIES = ("gpt2", "gpt_neox", "llama", "olmo2")
# transformers knows these by the family's own name alone, the others by both.
WITHOUT_ALIAS = ("intermediate_size", "hidden_act")
COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
FIELDS = (*shape(0, 0, 0, 0, 0, 0, 0),)


def base_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `FIELDS` as transformers would fill in this base configuration, and its model_type.

    Raises ConfigError for a family without a row or a field that is no positive integer.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ConfigError(f"model_type={one_line(model_type)}: no such backbone; one of {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    found: dict[str, Any] = {"model_type": model_type}
    for name in FIELDS:
        own = family.names.get(name, name)
        given = config.get(own)
        if given is None and name not in WITHOUT_ALIAS:
            given = config.get(name)
        found[name] = family.defaults[name] if given is None else given
    keys = config.get("num_key_value_heads")
    if keys is None and model_type in KEYS_AS_QUERIES:
        keys = found["num_attention_heads"]
    found["num_key_value_heads"] = found["num_key_value_heads"] if keys is None else keys
    if found["intermediate_size"] is None:
        found["intermediate_size"] = 4 * found["hidden_size"]
    found |= {name: False for name in ("attention_bias", "mlp_bias") if name not in family.biases}
    check_base(found)
    if found["head_dim"] is None:
        found["head_dim"] = found["hidden_size"] // found["num_attention_heads"]
    return found


def check_base(found: Mapping[str, Any]) -> None:
    """Raise ConfigError for a count that is no positive integer, or heads that do not divide."""
    for name in (*COUNTS, "num_key_value_heads", "max_position_embeddings"):
        value = found[name]
        if type(value) is not int or value < 1:
            raise ConfigError(f"base_config.{name}={one_line(value)}: must be a positive integer")
    heads = found["num_attention_heads"]
    if found["hidden_size"] % heads:
        raise ConfigError(
            f"base_config.num_attention_heads={heads} does not divide hidden_size={found['hidden_size']}; "
            "try a divisor of it"
        )
    if heads % found["num_key_value_heads"]:
        raise ConfigError(
            f"base_config.num_key_value_heads={found['num_key_value_heads']} does not divide {heads} heads; try {heads}"
        )
