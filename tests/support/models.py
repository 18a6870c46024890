"""Tiny models: one base configuration for each Hugging Face family, and two builders."""

import torch

from armt_dist.model.configuration_armt import ARMTConfig
from armt_dist.model.modeling_armt import ARMTForCausalLM

SHAPE = dict(
    hidden_size=32,
    num_attention_heads=4,
    num_hidden_layers=2,
    intermediate_size=64,
    vocab_size=50,
    max_position_embeddings=64,
    initializer_range=0.2,
)
# Model type -> fields of the base model's configuration.
BASES = {
    "gpt2": dict(n_embd=32, n_head=4, n_layer=2, n_positions=64, vocab_size=50, initializer_range=0.2),
    "gpt_neox": dict(**SHAPE),
    "llama": dict(**SHAPE, num_key_value_heads=2),
    # As wide as a segment row: the widest window that is not active.
    "mistral": dict(**SHAPE, num_key_value_heads=2, sliding_window=19),
    "qwen2": dict(**SHAPE, num_key_value_heads=2),
    "qwen3": dict(**SHAPE, num_key_value_heads=2, head_dim=16),
}


def small_model(family="llama", seed=0, base=None, **options):
    """Build a random model whose memory matters from the start (W_mv of a fresh one is zero).

    `base` replaces fields of the base model's configuration, `options` those of ARMTConfig.
    """
    torch.manual_seed(seed)
    base = {"model_type": family, **BASES[family], **(base or {})}
    config = ARMTConfig(base_config=base, **{"segment_tokens": 8, "num_mem_tokens": 3, "d_mem": 4, **options})
    model = ARMTForCausalLM(config)
    for layer in model.backbone.layers:
        if config.memory_kind == "armt":
            torch.nn.init.normal_(layer.memory.W_mv.weight, std=0.2)
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
