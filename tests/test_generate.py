"""`generate()` across segment borders: with the cache as without it, in constant memory."""

import pytest
import torch
from golden import TOLERANCES, assert_close
from test_bptt import small_model

from armt_dist.modeling_armt import ARMTCache

SEGMENT = 8
FAMILIES = {
    "gpt2": dict(family="gpt2"),
    "gpt2_wrapped": dict(family="gpt2", wrap_pos=True),
    "gpt_neox": dict(family="gpt_neox"),
    "llama": dict(family="llama"),
    "heads_gating": dict(family="llama", n_heads=2, gating=True),
    "window": dict(family="llama", sliding_window=5),
    "window_sink": dict(family="gpt_neox", sliding_window=SEGMENT, sink=2),
    "window_restart": dict(family="llama", sliding_window=SEGMENT, sink=1, window_positions="restart"),
    "window_gpt2": dict(family="gpt2", sliding_window=3, sink=1),
    "sink": dict(family="llama", sink=1),
    "rmt": dict(family="llama", memory_kind="rmt"),
    "rmt_gpt2": dict(family="gpt2", memory_kind="rmt"),
}
WAYS = {
    "greedy": dict(do_sample=False),
    "beams": dict(do_sample=False, num_beams=3),
    "returned beams": dict(do_sample=False, num_beams=3, num_return_sequences=2),
    "returned samples": dict(do_sample=True, num_return_sequences=3),
}


def prompt(tokens, batch=2):
    torch.manual_seed(1)
    # 0 is kept as the padding
    return torch.randint(1, 50, (batch, tokens))


def generate(model, ids, **options):
    """Without an end token: every sequence is as long as asked for."""
    torch.manual_seed(2)
    model.generation_config.eos_token_id = None
    return model.generate(ids, pad_token_id=0, **options)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_cache_changes_nothing(options, way):
    """Prompts that end before, at and after a border; three borders to cross."""
    model = small_model(**options).eval()
    for tokens in (SEGMENT - 1, SEGMENT, SEGMENT + 1):
        ids = prompt(tokens)
        cached, plain = (generate(model, ids, max_new_tokens=3 * SEGMENT, use_cache=on, **way) for on in (True, False))
        assert cached.shape == (2 * way.get("num_return_sequences", 1), tokens + 3 * SEGMENT)
        assert torch.equal(cached, plain)


@torch.no_grad()
@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_prefill_in_pieces(options):
    """Any cut of the text gives the logits of the whole, within and across borders."""
    model, ids = small_model(**options).eval(), prompt(37)
    whole = model(ids).logits
    for pieces in ([37], [1] * 37, [8, 8, 8, 8, 5], [3, 10, 1, 22, 1]):
        cache = ARMTCache(model.initial_states(len(ids)))
        parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(pieces, 1)]
        assert_close("logits", torch.cat(parts, 1), whole, TOLERANCES["logits"])
        assert cache.get_seq_length() == 37


def test_generation_from_a_prefilled_cache():
    model, ids = small_model().eval(), prompt(21)
    cache = model(ids[:, :13], use_cache=True).past_key_values
    expected = generate(model, ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(generate(model, ids, max_new_tokens=12, do_sample=False, past_key_values=cache), expected)


def cache_bytes(cache):
    """Of everything that the cache holds, buffers behind views included."""
    tensors = [t for slot in cache.layers for t in (*slot.state, slot.keys, slot.values) if t is not None]
    return sum(t.untyped_storage().nbytes() for t in tensors)


@torch.no_grad()
@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_memory_is_constant(options):
    model, ids = small_model(**options).eval(), prompt(20 * SEGMENT)
    cache, seen = None, []
    for token in ids.split(1, 1):
        cache = model(token, past_key_values=cache, use_cache=True).past_key_values
        seen.append(cache_bytes(cache))
    by_segment = [seen[i : i + SEGMENT] for i in range(0, len(seen), SEGMENT)]
    assert all(sizes == by_segment[0] for sizes in by_segment)


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_a_cache_starts_afresh_after_reset(options):
    model, ids = small_model(**options).eval(), prompt(21)
    with torch.no_grad():
        first = model(ids, use_cache=True)
        cache = first.past_key_values
        cache.reset()
        assert torch.equal(model(ids, past_key_values=cache, use_cache=True).logits, first.logits)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_left_padded_prompt_is_refused(use_cache):
    model, ids = small_model().eval(), prompt(12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="attention_mask: padding on the left"):
        generate(model, ids, attention_mask=mask, max_new_tokens=3, use_cache=use_cache)


def test_a_right_padded_prompt_is_refused():
    model, ids = small_model().eval(), prompt(12)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    with pytest.raises(ValueError, match="attention_mask with padding"):
        generate(model, ids, attention_mask=mask, max_new_tokens=3)


def test_the_cache_cannot_be_cropped():
    """Assisted generation would take tokens back."""
    cache = small_model().eval()(prompt(12), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(5)
