"""Models of known shapes for the benchmarks, with random weights: that of Llama 3.2 1B, and a tiny one like it."""

import torch

from armt_dist.model.configuration_armt import ARMTConfig
from armt_dist.model.modeling_armt import ARMTForCausalLM
from armt_dist.runtime.loss import token_nll

LLAMA_1B = dict(
    model_type="llama",
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    vocab_size=128256,
    max_position_embeddings=4096,
    rope_theta=500000.0,
    tie_word_embeddings=True,
)
TINY = LLAMA_1B | dict(
    hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=256,
)  # fmt: skip
# Base model, memory.
SHAPES = {
    "1b": (LLAMA_1B, dict(segment_tokens=1024, num_mem_tokens=16, d_mem=64)),
    "tiny": (TINY, dict(segment_tokens=32, num_mem_tokens=4, d_mem=16)),
}


def build(shape: str, device: torch.device, dtype: torch.dtype, base: dict | None = None, **options) -> ARMTForCausalLM:
    """A model in which W_mv is not zero, so that the memory is in use. `base`, `options`: fields to replace."""
    base_config, memory = SHAPES[shape]
    torch.manual_seed(0)
    with device:
        model = ARMTForCausalLM(ARMTConfig(base_config=base_config | (base or {}), **{**memory, **options})).to(dtype)
    for layer in model.backbone.layers:
        if hasattr(layer.memory, "W_mv"):
            torch.nn.init.normal_(layer.memory.W_mv.weight, std=0.02)
    return model


def random_ids(model: ARMTForCausalLM, batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels at the predicting positions, both int64 [batch, tokens] on the host."""
    torch.manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens))
    return ids, torch.cat([ids[:, 1:], torch.full((batch, 1), -100)], dim=1)


def plain_loss(model: ARMTForCausalLM, ids: torch.Tensor, labels: torch.Tensor, *, checkpointed=False) -> torch.Tensor:
    """The mean loss of the loop that anyone would write: segment after segment in one graph. All on the model's device.

    The logits are chunked like the fast path's. checkpointed: each segment is run again in the backward pass (torch's
    checkpointing, non-reentrant), so that the graph of one segment is alive at a time.
    """
    from torch.utils.checkpoint import checkpoint

    states, nll = model.initial_states(len(ids)), torch.zeros((), device=ids.device)
    size = model.config.segment_tokens
    for part, wanted in zip(ids.split(size, 1), labels.split(size, 1), strict=True):
        if checkpointed:
            hidden, states = checkpoint(model.segment, part, states, use_reentrant=False)
        else:
            hidden, states = model.segment(part, states)
        nll = nll + token_nll(hidden.flatten(0, 1), model.backbone.head, wanted.flatten()).sum()
    return nll / (labels >= 0).sum()
