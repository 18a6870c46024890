"""Weight gradients that are put off: whose they are, when they are computed, what they hold, and how exact they are."""

import pytest
import torch
from support.float64 import in_float64
from support.models import small_model
from support.oracle import GRID, oracle, random_batch, scheduled_loss, shifted

from armt_dist.runtime.cell_graphs import CellGraphs
from armt_dist.runtime.cells import EagerCells
from armt_dist.runtime.executor import ScheduledLM
from armt_dist.runtime.linear_map import linear_map
from armt_dist.runtime.piece import cut_piece
from armt_dist.runtime.trace import Trace
from armt_dist.runtime.weight_gradients import WeightGradients, add_product
from armt_dist.schedule.kept_cells import Keep
from armt_dist.schedule.program import Op
from armt_dist.schedule.weight_groups import GROUP

# Two groups and a part of one, in segments of 8.
TOKENS = 8 * (2 * GROUP + 3)


def model_of(family="llama", **options):
    model = small_model(family, base={"max_position_embeddings": 1024}, **options).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("keep", [0, 0.5, 1])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "olmo2"])
def test_gradients_are_those_of_the_plain_forward(family, keep):
    with in_float64():
        model, batch = model_of(family).double(), random_batch(tokens=TOKENS)
        loss, gradients = oracle(model, *batch)
        for chunks in (1, 2):
            options = {"grid": GRID._replace(chunks=chunks), "keep": Keep(keep), "grouped": True}
            found, others = scheduled_loss(model, *batch, **options)
            torch.testing.assert_close(found, loss)
            for name, expected in gradients.items():
                off = (others[name] - expected).abs().max() / expected.abs().max().clamp_min(1e-8)
                assert off <= 1e-7, f"{name}, {chunks} chunks: off by {off:.1e}"


def watched(monkeypatch, grouped):
    """Run a pass over two groups and three cells; of how many cells each sum of weight gradients was; the layers."""
    model, (ids, labels, mask) = model_of(), random_batch(tokens=TOKENS)
    seen, add_to = [], WeightGradients.add_to

    def adding(later, sums):
        maps = len(later.maps)
        seen.append(len(later.put) // maps)
        assert len(later.put) % maps == 0
        add_to(later, sums)

    monkeypatch.setattr(WeightGradients, "add_to", adding)
    runner = ScheduledLM(model, grouped=grouped)
    layers = model.config.num_hidden_layers
    totals = runner(cut_piece(ids, shifted(labels), mask, model.config, GRID._replace(layers=layers)))
    totals.nll.backward()
    return seen, layers


def test_a_group_is_computed_when_it_is_full_and_the_rest_at_the_end(monkeypatch):
    seen, layers = watched(monkeypatch, grouped=True)
    assert seen == [GROUP, GROUP, 3] * layers


def test_nothing_is_put_off_unless_asked(monkeypatch):
    assert watched(monkeypatch, grouped=False)[0] == []


def test_every_linear_map_of_the_layer_is_put_off_and_what_is_frozen_is_not():
    model = model_of()
    maps = [m for m in model.layers[0].layer.modules() if isinstance(m, torch.nn.Linear)]
    assert WeightGradients(model.layers[0]).maps == maps and len(maps) == 7
    maps[2].weight.requires_grad_(False)
    assert WeightGradients(model.layers[0]).maps == [*maps[:2], *maps[3:]]
    # What is used beside its own call would be put off by half: only maps of the decoder layer are.
    assert not set(WeightGradients(model.layers[0]).maps) & set(model.layers[0].memory.modules())


def test_backward_leaves_nothing_of_them_but_what_they_are_made_of():
    """Neither zeros as large as the weights, nor their gradients."""
    model = model_of()
    layer, x = model.layers[0], torch.randn(2, 11, 32)
    cells = EagerCells(layer, trains=True, grouped=True)
    state, context = layer.memory.initial_state(2, "cpu"), model.context(x, None)
    cell = cells.rerun(x, state, context, None)
    cells.back(cell, tuple(torch.randn_like(t) for t in cell.outputs))
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    maps = {f"layer.{name}.weight" for name, m in layer.layer.named_modules() if isinstance(m, torch.nn.Linear)}
    empty = {name for name, total in zip(names, cells.sums, strict=True) if not total.any()}
    assert maps <= empty
    cells.add_weights()
    assert not {name for name, total in zip(names, cells.sums, strict=True) if not total.any()} & maps
    assert not cells.later.put


def test_maps_of_a_recorded_cell_share_the_copy_of_their_input():
    model = model_of()
    layer, x = model.layers[0], torch.randn(2, 11, 32)
    state, context = layer.memory.initial_state(2, "cpu"), model.context(x, None)
    recording = CellGraphs(grouped=True).recording(layer, x, state, context, trains=True)
    recording.rerun(x, state, context, None)
    with torch.no_grad():
        _, put = recording.back(tuple(map(torch.randn_like, (x, *state))))
    inputs = {WeightGradients(layer).maps[each.place]: each.x.data_ptr() for each in put}
    attention, mlp = layer.layer.self_attn, layer.layer.mlp
    assert inputs[attention.q_proj] == inputs[attention.k_proj] == inputs[attention.v_proj]
    assert inputs[mlp.gate_proj] == inputs[mlp.up_proj]
    assert len(set(inputs.values())) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_summed_in_float32(dtype):
    a, b = torch.randn(64, 5).to(dtype), torch.randn(64, 3).to(dtype)
    total = torch.full((5, 3), 1.0)
    add_product(total, a, b)
    torch.testing.assert_close(total, 1 + a.float().t() @ b.float())


def test_a_map_under_autocast_is_its_own():
    module, taken = torch.nn.Linear(4, 3), []
    x = torch.randn(5, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        linear_map(module, x, take=lambda *pair: taken.append(pair)).sum().backward()
    assert module.weight.grad is not None and not taken


def test_the_program_has_an_instruction_for_them(monkeypatch):
    model, (ids, labels, mask) = model_of(), random_batch(tokens=TOKENS)
    runner, done = ScheduledLM(model, grouped=True), []
    layers = model.config.num_hidden_layers
    totals = runner(cut_piece(ids, shifted(labels), mask, model.config, GRID._replace(layers=layers)))
    monkeypatch.setattr(Trace, "__call__", lambda self, instruction: done.append(instruction.op))
    totals.nll.backward()
    assert done.count(Op.WEIGHT) == done.count(Op.BACK) == layers
