"""Recorded cells against those run operation by operation: losses and every gradient, bit for bit.

Without CUDA a replay calls the recorded function again, so all but the capture itself is tested here; the capture is
compared by benchmarks/gpu_parity.py.
"""

import warnings

import pytest
import torch
from support.models import small_model
from support.oracle import GRID, random_batch, random_starts, scheduled_loss

from armt_dist.runtime.cell_graphs import CellGraphs, GraphedCells, kind_of
from armt_dist.runtime.cells import EagerCells, draws
from armt_dist.runtime.recording import Recorded, Recording
from armt_dist.schedule.kept_cells import Keep

KINDS = {
    "armt": {},
    "heads": dict(n_heads=2, gating=True),
    "decay": dict(state_decay="learned"),
    "frozen": dict(freeze_mem=True),
    "window": dict(sliding_window=6, sink=1),
    "window_restart": dict(sliding_window=8, window_positions="restart", detach_window=True),
    "rmt": dict(memory_kind="rmt"),
    "rmt_window": dict(memory_kind="rmt", sliding_window=5),
    "transformer_xl": dict(memory_kind="transformer_xl"),
}


def same(a, b):
    """Whether two results of `scheduled_loss` agree to the bit."""
    none = torch.zeros(())
    pairs = [(a[1][name] if a[1][name] is not None else none, grad) for name, grad in b[1].items()]
    return torch.equal(a[0], b[0]) and all(torch.equal(x, none if y is None else y) for x, y in pairs)


@pytest.mark.parametrize(
    ("states", "keep", "grouped"),
    [("store", 0, False), ("rebuild", 0, True), ("recompute", 0, False), ("rebuild", 0.5, False), ("store", 0.5, True)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_recorded_cells_are_those_run_by_themselves(kind, states, keep, grouped):
    model = small_model(**KINDS[kind]).train()
    for pad, documents, chunks in ((0, False, 1), (11, False, 2), (0, True, 1)):
        ids, labels, mask = random_batch(pad=pad)
        starts = random_starts(ids) if documents else None
        options = {"grid": GRID._replace(chunks=chunks), "states": states, "keep": Keep(keep), "grouped": grouped}
        by_themselves = scheduled_loss(model, ids, labels, mask, starts, **options)
        assert same(by_themselves, scheduled_loss(model, ids, labels, mask, starts, graphs=True, **options))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen3"])
def test_families(family):
    model = small_model(family).train()
    # GPT-2's and GPT-NeoX's own dropouts.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = random_batch()
    assert same(scheduled_loss(model, *batch), scheduled_loss(model, *batch, graphs=True))


@pytest.mark.parametrize("kind", KINDS)
def test_all_recordings_are_made_before_the_first_layer(kind, monkeypatch):
    """A capture waits for the device, which within a pass may be waiting for another rank."""
    made, begin, events = Recorded.__init__, GraphedCells.begin, []
    monkeypatch.setattr(Recorded, "__init__", lambda self, *args: events.append("recorded") or made(self, *args))
    monkeypatch.setattr(GraphedCells, "begin", lambda self: events.append("began") or begin(self))
    model = small_model(**KINDS[kind]).train()
    for pad, documents, chunks in ((0, False, 1), (11, False, 2), (0, True, 1)):
        ids, labels, mask = random_batch(pad=pad)
        scheduled_loss(
            model, ids, labels, mask, random_starts(ids) if documents else None, graphs=True,
            grid=GRID._replace(chunks=chunks),
        )  # fmt: skip
        first = events.index("began")
        assert "recorded" in events[:first] and "recorded" not in events[first:]
        events.clear()


def test_layers_that_are_alike_share_one_recording_and_others_do_not():
    model = small_model().train()
    first, second = model.layers
    assert kind_of(first) == kind_of(second)
    second.layer.self_attn.scaling *= 2
    assert kind_of(first) != kind_of(second)
    batch = random_batch()
    assert same(scheduled_loss(model, *batch), scheduled_loss(model, *batch, graphs=True))


def test_a_layer_with_dropout_is_not_recorded():
    layer = small_model("llama", base={"attention_dropout": 0.1}).train().layers[0]
    assert draws(layer) and isinstance(CellGraphs().cells(layer, True), EagerCells)
    assert not draws(layer.eval()) and isinstance(CellGraphs().cells(layer, True), GraphedCells)


@pytest.mark.parametrize("part", ["__init__", "record_backward"])
def test_what_cannot_be_recorded_runs_by_itself_and_says_why(part, monkeypatch):
    def refuse(*args):
        raise RuntimeError("operation not permitted when stream is capturing")

    model, batch = small_model().train(), random_batch()
    by_themselves = scheduled_loss(model, *batch)
    monkeypatch.setattr(Recording, part, refuse)
    with pytest.warns(UserWarning, match="slower .operation not permitted"):
        assert same(by_themselves, scheduled_loss(model, *batch, graphs=True))


def test_a_cell_that_draws_unseen_is_refused(monkeypatch):
    model, batch = small_model().train(), random_batch()
    original = EagerCells.__init__

    def blind(self, *args):
        original(self, *args)
        self.draws = False

    monkeypatch.setattr(EagerCells, "__init__", blind)
    model.layers[0].layer.mlp.register_forward_hook(lambda module, args, y: torch.dropout(y, 0.1, True))
    with pytest.warns(UserWarning, match="draws random numbers"):
        scheduled_loss(model, *batch, graphs=True)


def test_nothing_of_a_call_outlives_its_backward_pass():
    """The float32 sums of a layer are as large as its parameters, and results keep the graph of their call."""
    model = small_model().train()
    cells = EagerCells(model.layers[0], trains=True)
    x = torch.randn(1, 11, 32)
    known, *_ = cells.to_store([x])
    cell = cells.rerun(x, model.initial_states(1)[0], model.context(x, None), known)
    cells.back(cell, tuple(torch.ones_like(t) for t in cell.outputs))
    assert cells.sums and len(cells.gradients()) == len(cells.parameters) and not cells.sums


def test_no_warning_where_all_is_recorded():
    model, batch = small_model().train(), random_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduled_loss(model, *batch, graphs=True)
