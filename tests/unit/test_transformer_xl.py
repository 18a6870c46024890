"""Transformer-XL: a detached window without memory, against Hugging Face's own cache, and how far it sees."""

import pytest
import torch
from support.models import small_model
from support.oracle import GRID, oracle, random_batch, scheduled_loss
from support.window_oracle import assert_equals_oracle, in_band

from armt_dist.model.configuration_armt import ARMTConfig

SEGMENT = 8
KIND = "transformer_xl"


@pytest.mark.parametrize("pad", [0, 11], ids=["whole", "padded"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "qwen3"])
def test_outputs_and_gradients_are_those_of_the_oracle(family, window, pad):
    model, batch = small_model(family, memory_kind=KIND, sliding_window=window).eval(), random_batch(pad=pad)
    grid = GRID._replace(chunks=2, rounds=2)
    ways = {how: scheduled_loss(model, *batch, grid=grid, states=how) for how in ("store", "rebuild", "recompute")}
    assert_equals_oracle(model, batch, {"plain": oracle(model, *batch), **ways})


@pytest.mark.parametrize("window", [SEGMENT, 3])
@torch.no_grad()
def test_a_token_reaches_as_far_as_the_layers_carry_it(window):
    """Which logits change with which token: those that a chain of one step a layer connects, and no others."""
    model, tokens = small_model(memory_kind=KIND, sliding_window=window).eval(), 3 * SEGMENT + 5
    layers, ids = model.config.num_hidden_layers, random_batch(tokens=tokens, batch=1, pad=0)[0]
    # One row for each token that is changed.
    changed = torch.where(torch.eye(tokens, dtype=torch.bool), (ids + 7) % 50, ids)
    differs = (model(changed).logits != model(ids).logits).any(2).T
    starts = range(0, tokens, SEGMENT)
    seen = [in_band(torch.ones(1, t + SEGMENT), range(t, t + SEGMENT), window)[0, :, :tokens] for t in starts]
    step = torch.cat([torch.nn.functional.pad(rows, (0, tokens - rows.shape[1])) for rows in seen])[:tokens].float()
    assert torch.equal(differs, torch.linalg.matrix_power(step, layers) > 0)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    if window == SEGMENT:
        assert not differs[distance > layers * window].any(), "a token is seen from beyond the window"
        assert differs[(distance >= 0) & (distance <= window)].all(), "a token within the window is not seen"


def test_null_fields_are_those_of_a_whole_detached_segment():
    config = ARMTConfig(memory_kind=KIND, segment_tokens=24)
    assert (config.num_mem_tokens, config.sliding_window, config.other_rows) == (0, 24, 0)
    again = ARMTConfig.from_dict(config.to_diff_dict())
    assert (again.num_mem_tokens, again.sliding_window) == (0, 24)
    model = small_model(memory_kind=KIND)
    assert not list(model.memory_tokens.parameters()) and all(layer.memory.window.detach for layer in model.layers)
    assert ARMTConfig().num_mem_tokens == 16
