"""Windows without any of our code: segments through Hugging Face's model and cache, with a mask written out in full.

Rotary positions run on from segment to segment, so that keys are kept as they are; learned ones start again.
"""

import torch
from torch.nn.functional import cross_entropy, pad
from transformers import DynamicCache

from armt_dist.model.generation import CACHE_NAME


def unwrapped(model):
    """Copy the base model, as Hugging Face makes it."""
    base = type(model.base)._from_config(model.base.config).eval()
    base.load_state_dict({name.replace(".layer.", "."): t for name, t in model.base.state_dict().items()}, strict=False)
    return base.to(model.dtype)


def visible(real, segment, window):
    """Tell what each row of a segment sees of the window and of the segment. [B, rows, window + rows] bool.

    real [B, window + tokens of the segment]: which tokens are no padding; segment: its range of tokens in `real`.
    """
    query, key = torch.arange(segment.start, segment.stop)[:, None], torch.arange(segment.stop)
    return (key <= query) & ((key >= segment.start) | (query - key <= window)) & real[:, None].bool()


def window_oracle(model, ids, labels, mask):
    """Return mean loss, logits [B, N, V] and gradients by our names, of a model with a window and no documents."""
    config, base = model.config, unwrapped(model)
    window, real = config.sliding_window, torch.ones_like(ids) if mask is None else mask
    learned, core = config.base.model_type == "gpt2", base.base_model
    logits, cache, kept = [], None, 0
    for start in range(0, ids.shape[1], config.segment_tokens):
        segment = ids[:, start : start + config.segment_tokens]
        x = base.get_input_embeddings()(segment)
        end = start + segment.shape[1]
        seen = visible(real[:, start - kept : end], range(kept, kept + segment.shape[1]), window)
        additive = torch.zeros_like(seen, dtype=x.dtype).masked_fill_(~seen, torch.finfo(x.dtype).min)[:, None]
        places = torch.arange(segment.shape[1])[None] + (0 if learned else start)
        out = core(
            inputs_embeds=x,
            attention_mask=additive,
            position_ids=places,
            use_cache=True,
            **{CACHE_NAME: DynamicCache() if cache is None else cache},
        )
        logits.append(base.get_output_embeddings()(out.last_hidden_state))
        cache, before = DynamicCache(), out[CACHE_NAME]
        kept = min(window, end)
        for i, layer in enumerate(before.layers):
            cache.update(layer.keys[:, :, -kept:].detach(), layer.values[:, :, -kept:].detach(), i)
    logits = torch.cat(logits, dim=1)
    loss = cross_entropy(logits.flatten(0, 1), pad(labels[:, 1:], (0, 1), value=-100).flatten())
    loss.backward()
    return loss.detach(), logits.detach(), {name: p.grad for name, p in base.named_parameters()}
