"""`state_decay`: what is old fades. The plain forward against a loop that fades the states by hand."""

from functools import reduce

import pytest
import torch
from support.float64 import in_float64
from support.models import small_model
from support.oracle import oracle, random_batch

from armt_dist.config import ConfigError, validate
from armt_dist.model.memory import State, Update
from armt_dist.model.memory_kind import apply
from armt_dist.runtime.rerun import reapplied
from armt_dist.zero3.partitioned_model import continue_from
from armt_dist.zero3.sections import ModelConfig


def twin(decay, **options):
    """Two models with the same weights, with and without a decay."""
    plain, fading = small_model(**options), small_model(state_decay=decay, **options)
    missing, unexpected = fading.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all("decay_logit" in name for name in missing)
    return plain.eval(), fading.eval()


def by_hand(model, ids, decay):
    """Normed hidden states of the model without a decay, whose A and z are multiplied before every segment."""
    states, hidden = model.initial_states(len(ids)), []
    for part in ids.split(model.config.segment_tokens, dim=1):
        states = [s._replace(A=decay * s.A, z=decay * s.z) if hasattr(s, "A") else s for s in states]
        h, states = model.segment(part, states)
        hidden.append(h)
    return torch.cat(hidden, dim=1)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 5}, {"n_heads": 2, "gating": True}, {"use_denom": False}])
def test_equals_states_that_are_multiplied_before_every_segment(options):
    plain, fading = twin(0.7, **options)
    ids = random_batch(tokens=45)[0]
    with torch.no_grad():
        expected, found = by_hand(plain, ids, 0.7), fading.read_segments(ids, None)
        still = plain.read_segments(ids, None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found[:, :8] == still[:, :8]).all() and (found - still).abs().max() > 1e-3


def test_a_decay_of_one_changes_nothing():
    plain, fading = twin(1.0)
    ids = random_batch(tokens=45)[0]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, fading(ids).logits)


@in_float64()
def test_the_gradient_of_a_learned_decay_is_that_of_the_loss():
    model = small_model(state_decay="learned", use_denom=False).double().eval()
    batch = random_batch(tokens=45, pad=0)
    _, gradients = oracle(model, *batch)
    for i, layer in enumerate(model.layers):
        logit, step = layer.memory.decay_logit, 1e-5
        losses = []
        with torch.no_grad():
            for shift in (step, -2 * step):
                logit += shift
                losses.append(model(batch[0], labels=batch[1]).loss)
            logit += step
        found = gradients[f"base.model.layers.{i}.memory.decay_logit"].item()
        assert found != 0 and found == pytest.approx(float(losses[0] - losses[1]) / (2 * step), rel=1e-4)


def test_a_learned_decay_starts_close_to_one():
    model = small_model(state_decay="learned")
    model.reset_memory()
    for layer in model.layers:
        assert torch.sigmoid(layer.memory.decay_logit).item() == pytest.approx(0.99)


def test_ten_thousand_segments_are_rebuilt_bit_for_bit():
    """The states come from the updates again, first to last, so nothing is ever divided by the decay."""
    torch.manual_seed(0)
    first = State(torch.zeros(1, 1, 4, 3), torch.zeros(1, 1, 4))
    decay, count = torch.tensor(0.99), 10_000
    keys, values, gammas = torch.rand(count, 1, 1, 2, 4), torch.randn(count, 1, 1, 2, 3), torch.rand(count, 1, 1, 2)
    updates = [Update(*parts, decay) for parts in zip(keys, values, gammas, strict=True)]
    states = [first]
    for update in updates[:-1]:
        states.append(apply(states[-1], update))
    for expected, found in zip(reversed(states), reapplied(first, updates), strict=True):
        assert torch.equal(expected.A, found.A) and torch.equal(expected.z, found.z)
    assert reduce(apply, updates, first).A.abs().max() < 200, "what is written without end stays bounded"


def test_a_base_with_another_decay_is_refused():
    armt = small_model(state_decay=0.9).config
    with pytest.raises(ConfigError, match="model.state_decay=0.99: the base folder has 0.9; leave it out"):
        continue_from(armt, {"state_decay": 0.99})
    assert continue_from(armt, {}).state_decay == 0.9


@pytest.mark.parametrize(("value", "kept"), [(1, 1.0), (0.5, 0.5), ("learned", "learned"), (None, None)])
def test_the_section_takes_numbers_and_learned(value, kept):
    assert validate(ModelConfig, {"base": "x", "state_decay": value}).state_decay == kept
