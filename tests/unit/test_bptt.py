"""The layer-major fast path against the two-loop oracle: loss and every gradient."""

import pytest
import torch
from support.golden import CASES, TOLERANCES, assert_close, assert_gradients, golden_gradients, load_case, load_model
from support.models import small_model
from support.oracle import GRID, oracle, random_batch, scheduled_loss, shifted

from armt_dist.config import ConfigError
from armt_dist.model.memory_kind import apply
from armt_dist.runtime import executor, rerun
from armt_dist.runtime.executor import ScheduledLM
from armt_dist.runtime.piece import cut_piece
from armt_dist.runtime.segment_bptt import LayerCall
from armt_dist.schedule.kept_cells import Keep
from armt_dist.zero3.trained_parameters import freeze_parameters

# How the backward has the state that entered a cell, and the share of the cells that are not run again.
WAYS = [(states, keep) for states in ("store", "rebuild", "recompute") for keep in (0, 0.6)] + [("store", 1)]


@pytest.mark.parametrize(("states", "keep"), WAYS)
@pytest.mark.parametrize("name", CASES)
def test_golden_cases(name, states, keep):
    case, model = load_case(name), load_model(name).eval()
    batch = case.io["input_ids"], case.labels, case.io["attention_mask"]
    loss, gradients = scheduled_loss(model, *batch, states=states, keep=Keep(keep), offload=states == "store")
    assert_close("loss", loss, case.io["loss"][0], TOLERANCES["loss"])
    assert_gradients(gradients, golden_gradients(case))


FAMILIES = ("gpt2", "gpt_neox", "llama")
OPTIONS = {
    "default": {},
    # Two channels a head leave so few features that z·q comes close to 0: float32 gradients of W_mk are then 1e5 times
    # off, in either path, and whether the two agree depends on the CPU's order of additions.
    "heads": dict(n_heads=2, d_mem=16),
    "gating": dict(gating=True, n_heads=2),
    "no_denominator": dict(use_denom=False),
    "no_correction": dict(correction=False),
    "paper": dict(maths="paper"),
    "right": dict(segment_alignment="right"),
    "center": dict(segment_alignment="center"),
    "nu_wider_than_key": dict(d_mem=2, nu=5),
    "decay": dict(state_decay=0.9),
    "decay_learned_window": dict(state_decay="learned", sliding_window=5, use_denom=False),
    "sink": dict(sink=2),
    "window": dict(sliding_window=5),
    "window_center": dict(sliding_window=8, segment_alignment="center", use_denom=False),
    "window_sink_detached": dict(sliding_window=8, sink=1, detach_window=True),
    "window_restart": dict(sliding_window=8, sink=1, window_positions="restart"),
    "rmt": dict(memory_kind="rmt"),
    "rmt_right": dict(memory_kind="rmt", segment_alignment="right"),
    "rmt_k2": dict(memory_kind="rmt", k2=2),
    "rmt_window": dict(memory_kind="rmt", sliding_window=5),
    "rmt_window_k2": dict(memory_kind="rmt", sliding_window=8, detach_window=True, k2=2, segment_alignment="right"),
    "transformer_xl": dict(memory_kind="transformer_xl"),
    "transformer_xl_center": dict(memory_kind="transformer_xl", sliding_window=5, segment_alignment="center"),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_oracle(family, options):
    model = small_model(family, **options).eval()
    # Only segments that are filled from the left are the same in a padded batch.
    batch = random_batch() if model.config.segment_alignment == "left" else random_batch(pad=0)
    loss, gradients = oracle(model, *batch)
    for states, keep in WAYS:
        way = dict(grid=GRID._replace(chunks=2), states=states, keep=Keep(keep))
        fast_loss, fast_gradients = scheduled_loss(model, *batch, **way)
        assert_close("loss", fast_loss, loss, TOLERANCES["loss"])
        assert_gradients(fast_gradients, gradients)


# From the top: all but the memory; the memory; the two lowest layers with all below them; only what is below the
# layers; everything but the head.
FREEZES = {
    "base": (["base"], {}),
    "memory": (["*.memory.*", "memory_tokens.*"], {}),
    "below": (["*embed_tokens*", "memory_tokens.*", "*.layers.0.*", "*.layers.1.*"], {}),
    "embeddings": (["*embed_tokens*", "memory_tokens.*"], {}),
    "all_layers": (["*embed_tokens*", "memory_tokens.*", "*.layers.*"], {}),
    "rmt_base": (["base"], dict(memory_kind="rmt")),
    "rmt_below": (["*embed_tokens*", "*.layers.0.*", "*.layers.1.*"], dict(memory_kind="rmt")),
    "decay": (["base"], dict(state_decay="learned", sliding_window=5, use_denom=False)),
}


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("name", FREEZES)
def test_frozen_parameters_have_no_gradient_and_change_no_other(name, graphs, monkeypatch):
    patterns, options = FREEZES[name]
    model, batch = small_model(base=dict(num_hidden_layers=3), **options).eval(), random_batch()
    freeze_parameters(model, patterns)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    loss, gradients = oracle(model, *batch)
    assert frozen and set(gradients) == {n for n, p in model.named_parameters()} - frozen
    backwards, original = [], LayerCall.backward
    monkeypatch.setattr(LayerCall, "backward", lambda call, *args: backwards.append(call.key) or original(call, *args))
    for states, keep in WAYS:
        backwards.clear()
        grid = GRID._replace(chunks=2, rounds=1 if "rmt" in name else 2)
        way = dict(grid=grid, states=states, keep=Keep(keep), graphs=graphs)
        fast_loss, fast_gradients = scheduled_loss(model, *batch, **way)
        assert_close("loss", fast_loss, loss, TOLERANCES["loss"])
        assert {n for n, gradient in fast_gradients.items() if gradient is None} == frozen
        assert_gradients({n: g for n, g in fast_gradients.items() if g is not None}, gradients)
        lowest = {"below": 2, "all_layers": 3}.get(name, 0)
        assert {layer for _, layer in backwards} == set(range(lowest, 3)), "layers that run backward"


class Forgetful(dict):
    """Contexts that no segment shares."""

    def __contains__(self, key):
        return False


@pytest.mark.parametrize("options", [{}, {"sliding_window": 6}, {"memory_kind": "rmt"}], ids=str)
def test_segments_that_are_padded_alike_share_a_mask_to_the_bit(options, monkeypatch):
    model = small_model(**options).train()
    ids, labels, _ = random_batch(tokens=8 * 9 + 3, pad=0)
    mask = (torch.arange(ids.shape[1]) < torch.tensor([[75], [40], [21], [4]])).long()
    labels, grid = labels.masked_fill(mask == 0, -100), GRID._replace(chunks=2)
    made = []

    def counted(*args, build=model.context):
        made.append(1)
        return build(*args)

    def result():
        made.clear()
        return scheduled_loss(model, ids, labels, mask, grid=grid), len(made)

    monkeypatch.setattr(model, "context", counted)
    shared, few = result()
    each = ScheduledLM.contexts
    monkeypatch.setattr(ScheduledLM, "contexts", lambda self, *args: each(self, *args[:-1], Forgetful()))
    alone, all_of_them = result()
    # 10 segments in each of 2 chunks, whose two rows are full, end within a segment or are over.
    assert all_of_them == 20 and few == 7
    assert torch.equal(shared[0], alone[0])
    assert all(torch.equal(gradient, alone[1][name]) for name, gradient in shared[1].items())


@pytest.mark.parametrize("alignment", ["right", "center"])
def test_padding_is_refused_where_it_would_move_the_segments(alignment):
    model = small_model(segment_alignment=alignment)
    with pytest.raises(ConfigError, match=f"segment_alignment={alignment}: cuts a padded row"):
        scheduled_loss(model, *random_batch())


@pytest.mark.parametrize("kind", ["armt", "rmt"])
def test_wrapped_positions(kind):
    model = small_model("gpt2", wrap_pos=True, memory_kind=kind).eval()
    assert model.position_ids(8, "cpu")[0, -3:].tolist() == [61, 62, 63]
    loss, gradients = oracle(model, *random_batch())
    fast_loss, fast_gradients = scheduled_loss(model, *random_batch())
    assert_close("loss", fast_loss, loss, TOLERANCES["loss"])
    assert_gradients(fast_gradients, gradients)


@pytest.mark.parametrize(("states", "keep"), WAYS)
def test_rounds_hand_the_state_and_its_gradient_on(states, keep):
    model, batch = small_model().eval(), random_batch(tokens=44)
    loss, gradients = oracle(model, *batch)
    grid = GRID._replace(rounds=3, chunks=2)
    fast_loss, fast_gradients = scheduled_loss(model, *batch, grid=grid, states=states, keep=Keep(keep))
    assert_close("loss", fast_loss, loss, TOLERANCES["loss"])
    assert_gradients(fast_gradients, gradients)


def without_recomputation(layer, x, work):
    """The same cells in the same order, in one ordinary graph."""
    outputs, state = [], layer.memory.initial_state(len(x), x.device)
    for x_s, context in zip(x.split(work.lengths, 1), work.contexts[0], strict=True):
        y, update = layer.cell(x_s, state, context)
        outputs.append(y)
        state = apply(state, update)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize(("states", "keep"), WAYS)
def test_dropout_is_replayed(states, keep, monkeypatch):
    """The re-run draws the masks of the forward run."""
    dropout = dict(resid_pdrop=0.2, attn_pdrop=0.2, embd_pdrop=0.1)
    model, batch = small_model("gpt2", base=dropout).train(), random_batch()
    torch.manual_seed(5)
    fast_loss, fast_gradients = scheduled_loss(model, *batch, states=states, keep=Keep(keep))
    monkeypatch.setattr(executor, "segment_bptt", without_recomputation)
    torch.manual_seed(5)
    loss, gradients = scheduled_loss(model, *batch)
    assert fast_loss == loss
    assert_gradients(fast_gradients, gradients)
    torch.manual_seed(6)
    other, _ = scheduled_loss(model, *batch)
    assert other != loss, "dropout has no effect here, so nothing was tested"


def test_the_rerun_leaves_the_generators_alone():
    model, batch = small_model("gpt2", base=dict(resid_pdrop=0.2)).train(), random_batch()
    draws = []
    for states, keep in WAYS:
        torch.manual_seed(3)
        # The size of a graph is measured, which draws as well.
        scheduled_loss(model, *batch, states=states, keep=Keep(keep, 1e9))
        draws.append(torch.rand(4))
    assert all(torch.equal(draws[0], other) for other in draws), "the backward changed what is drawn after it"


@pytest.mark.parametrize(("rate", "trains"), [(0.0, True), (0.2, False), (0.2, True)])
def test_generators_are_kept_only_where_a_cell_can_draw(rate, trains, monkeypatch):
    """5 kB for each cell."""
    kept, real = [], rerun.Generators.of
    monkeypatch.setattr(rerun.Generators, "of", lambda x: kept.append(x) or real(x))
    model = small_model("gpt2", base=dict(resid_pdrop=rate, attn_pdrop=0.0, embd_pdrop=0.0)).train(trains)
    scheduled_loss(model, *random_batch())
    # 4 segments of 2 layers.
    assert len(kept) == (8 if rate and trains else 0)


def test_every_way_has_the_same_gradients():
    """Bit for bit, over 200 segments: any drift would grow where z·q is close to 0."""
    model, batch = small_model().eval(), random_batch(tokens=1600, batch=1, pad=0)
    _, stored = scheduled_loss(model, *batch, states="store")
    for states, keep in WAYS:
        _, again = scheduled_loss(model, *batch, states=states, keep=Keep(keep))
        for name in stored:
            assert torch.equal(again[name], stored[name]), f"d {name} differs between store and {states}, keep {keep}"


def test_without_gradients_nothing_is_kept():
    model, batch = small_model().eval(), random_batch()
    runner = ScheduledLM(model, states="store")
    piece = cut_piece(batch[0], shifted(batch[1]), batch[2], model.config, GRID._replace(layers=2))
    with torch.no_grad():
        totals = runner(piece, count=True)
    assert not totals.nll.requires_grad
    logits = model(batch[0], attention_mask=batch[2]).logits
    labels = shifted(batch[1])
    wrong = ((logits.argmax(-1) != labels) & (labels >= 0)).sum(1)
    assert totals.wrong.tolist() == wrong.tolist()
    assert totals.scored.item() == (labels >= 0).sum().item()
