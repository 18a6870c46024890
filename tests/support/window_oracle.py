"""Windows without any of our code: segments through Hugging Face's model and cache, with a mask written out in full.

Rotary positions run on from segment to segment, so that keys are kept as they are; learned ones start again.
"""

import torch
from torch.nn.functional import cross_entropy, pad
from transformers import DynamicCache

from armt_dist.model.generation import CACHE_NAME
from support.golden import TOLERANCES, assert_close, assert_gradients


def unwrapped(model):
    """Copy the base model, as Hugging Face makes it."""
    base = type(model.base)._from_config(model.base.config).eval()
    base.load_state_dict({name.replace(".layer.", "."): t for name, t in model.base.state_dict().items()}, strict=False)
    return base.to(model.dtype)


def in_band(real, segment, window):
    """What a token sees of its segment and of the `window` tokens before it. [B, tokens, window + tokens] bool.

    real [B, window + tokens of the segment]: which tokens are no padding; segment: its range of tokens in `real`.
    """
    query, key = torch.arange(segment.start, segment.stop)[:, None], torch.arange(segment.stop)
    return (key <= query) & ((key >= segment.start) | (query - key <= window)) & real[:, None].bool()


def in_whole_window(real, segment, memory):
    """What the rows `[memory | tokens | memory]` see: the rows before them and the whole window. Else as `in_band`."""
    before, tokens = real.bool().split([segment.start, len(segment)], dim=1)
    rows = len(segment) + 2 * memory
    own = torch.ones(rows, rows).tril().bool() & pad(tokens, (memory, memory), value=True)[:, None]
    return torch.cat([before[:, None].expand(-1, rows, -1), own], dim=2)


def window_oracle(model, ids, labels, mask):
    """Mean loss, logits [B, N, V] and gradients by Hugging Face's names of a model without documents, k2 or A and z."""
    config, base = model.config, unwrapped(model)
    rmt, detach = config.memory_kind == "rmt", config.detach_window or config.memory_kind == "transformer_xl"
    window, real = config.sliding_window, torch.ones_like(ids) if mask is None else mask
    learned = model.memory_tokens.weight.detach().clone().requires_grad_() if rmt else None
    memory = base.get_input_embeddings().weight.new_zeros(0, config.hidden_size) if learned is None else learned
    rows, memory = len(memory), memory.expand(len(ids), -1, -1)
    logits, cache, kept = [], DynamicCache(), 0
    for start in range(0, ids.shape[1], config.segment_tokens):
        segment = ids[:, start : start + config.segment_tokens]
        tokens, end = segment.shape[1], start + segment.shape[1]
        x = torch.cat([memory, base.get_input_embeddings()(segment), memory], dim=1)
        around = real[:, start - kept : end], range(kept, kept + tokens)
        seen = in_whole_window(*around, rows) if rmt else in_band(*around, window)
        out = base.base_model(
            inputs_embeds=x,
            attention_mask=torch.zeros_like(seen, dtype=x.dtype).masked_fill_(~seen, torch.finfo(x.dtype).min)[:, None],
            position_ids=torch.arange(x.shape[1])[None] + (0 if config.base.model_type == "gpt2" else start),
            use_cache=True,
            **{CACHE_NAME: cache},
        )
        hidden = out.last_hidden_state
        logits.append(base.get_output_embeddings()(hidden[:, rows : rows + tokens]))
        memory = hidden[:, rows + tokens :]
        places = torch.tensor([*range(kept), *range(kept + rows, kept + rows + tokens)])[-window:]
        cache, before, kept = DynamicCache(), out[CACHE_NAME], len(places)
        for i, layer in enumerate(before.layers):
            keys, values = (t[:, :, places].detach() if detach else t[:, :, places] for t in (layer.keys, layer.values))
            cache.update(keys, values, i)
    logits = torch.cat(logits, dim=1)
    loss = cross_entropy(logits.flatten(0, 1), pad(labels[:, 1:], (0, 1), value=-100).flatten())
    loss.backward()
    gradients = {name: p.grad for name, p in base.named_parameters()}
    return loss.detach(), logits.detach(), gradients | ({"memory_tokens.weight": learned.grad} if rmt else {})


def assert_equals_oracle(model, batch, ways):
    """Compare logits, and loss and every gradient of each of `ways`, with those of the oracle.

    ways: what computed them -> (loss, gradients by our names).
    """
    loss, logits, gradients = window_oracle(model, *batch)
    real = torch.ones_like(batch[0]) if batch[2] is None else batch[2]
    found = model(batch[0], attention_mask=batch[2]).logits.detach()
    assert_close("logits", found[real == 1], logits[real == 1], TOLERANCES["logits"])
    for how, (own_loss, own) in ways.items():
        assert_close(f"{how}: loss", own_loss, loss, TOLERANCES["loss"])
        named = {name.removeprefix("base.").replace(".layer.", "."): gradient for name, gradient in own.items()}
        assert named.keys() == gradients.keys()
        assert_gradients(named, gradients, how)
