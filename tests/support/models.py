"""Tiny models: a base configuration for each row of FAMILIES, and two builders."""

import torch
from transformers import CONFIG_MAPPING

from armt_dist.model.backbone import FAMILIES
from armt_dist.model.configuration_armt import MEMORIES, ARMTConfig
from armt_dist.model.modeling_armt import ARMTForCausalLM

# What every family has; a family takes those fields that its configuration knows.
SHAPE = dict(
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=2,
    intermediate_size=64,
    vocab_size=50,
    max_position_embeddings=64,
    initializer_range=0.2,
)
# What a family is to have besides.
MORE = {
    # As wide as a segment row: the widest window that is not active.
    "mistral": dict(sliding_window=19),
    # Heads wider than hidden_size / num_attention_heads.
    "qwen3": dict(head_dim=16),
}

# A base with sizes that do not divide evenly, for runs of a few steps.
TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def tiny_base(family):
    """Fields of a tiny base configuration, under the family's own names."""
    kind = CONFIG_MAPPING[family]
    default = kind()
    fields = {kind.attribute_map.get(name, name): value for name, value in SHAPE.items() if hasattr(default, name)}
    if (default.pad_token_id or 0) >= SHAPE["vocab_size"]:
        fields["pad_token_id"] = None
    return fields | MORE.get(family, {})


# Model type -> fields of the base model's configuration.
BASES = {family: tiny_base(family) for family in FAMILIES}


def accepted(memory_kind="armt", **fields):
    """Return those fields of ARMTConfig that a kind of memory accepts: one without memory tokens takes no number."""
    row = MEMORIES[memory_kind]
    refused = {*row.refused_fields, *["num_mem_tokens"] * row.window_only}
    return {name: value for name, value in fields.items() if name not in refused}


def small_model(family="llama", seed=0, base=None, **options):
    """Build a random model whose memory matters from the start: what is zero in a fresh memory is random here.

    `base` replaces fields of the base model's configuration, `options` those of ARMTConfig.
    """
    torch.manual_seed(seed)
    base = {"model_type": family, **BASES[family], **(base or {})}
    sizes = accepted(options.get("memory_kind", "armt"), segment_tokens=8, num_mem_tokens=3, d_mem=4)
    config = ARMTConfig(base_config=base, **{**sizes, **options})
    model = ARMTForCausalLM(config)
    for layer in model.backbone.layers:
        for parameter in layer.memory.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def confident_model(vocab_size, segment_tokens, **options):
    """Build a tiny GPT-2 whose memory matters, with logits far from uniform: losses differ and hits are clear."""
    torch.manual_seed(0)
    base = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": vocab_size}
    config = ARMTConfig(base_config=base, segment_tokens=segment_tokens, num_mem_tokens=2, d_mem=8, **options)
    model = ARMTForCausalLM(config).eval()
    for layer in model.backbone.layers:
        torch.nn.init.normal_(layer.memory.W_mv.weight, std=0.5)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=1.0)
    return model
