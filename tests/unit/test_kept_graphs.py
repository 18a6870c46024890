"""How many graphs are kept, where, and what they hold."""

import math
import random

import pytest
import torch
from support.models import small_model
from support.oracle import GRID, random_batch, shifted

from armt_dist.config import ConfigError
from armt_dist.runtime.cells import EagerCells
from armt_dist.runtime.executor import ScheduledLM
from armt_dist.runtime.kept_graphs import KeptGraphs, graph_bytes
from armt_dist.runtime.piece import cut_piece
from armt_dist.schedule.kept_cells import Keep, parse_keep


@pytest.mark.parametrize("share", [0.0, 1 / 3, 0.5, 0.9, 1.0])
def test_every_unit_keeps_its_part(share):
    units = random.Random(0).choices(range(1, 40), k=60)
    cells, kept = sum(units), KeptGraphs(Keep(share), sum(units), {})
    taken = [kept.take(n, "a cell", lambda: 1) for n in units]
    assert sum(taken) == math.floor(share * cells + 1e-6)
    assert all(abs(own - share * n) <= 1 for own, n in zip(taken, units, strict=True))


@pytest.mark.parametrize("budget", [0, 99, 100, 1234, 10**6])
def test_graphs_hold_no_more_than_their_bytes(budget):
    kept, measured = KeptGraphs(Keep(1.0, budget), 50, {}), []
    taken = sum(kept.take(5, "a cell", lambda: measured.append(1) or 100) for _ in range(10))
    assert taken == min(50, budget // 100) and len(measured) == (budget > 0)


def live_after_forward(keep):
    """Bytes that a forward pass leaves allocated, and the share of the cells that it kept."""
    model, (ids, labels, mask) = small_model(base=dict(num_hidden_layers=3)), random_batch(tokens=61)
    runner = ScheduledLM(model, keep=keep)
    piece = cut_piece(ids, shifted(labels), mask, model.config, GRID._replace(layers=3))
    runner(piece)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        totals = runner(piece)
    del totals
    return sum(event.self_cpu_memory_usage for event in profile.key_averages()), runner.kept.kept_share


def test_kept_graphs_hold_what_was_counted():
    """Of a whole pass, by what its operations allocate and free."""
    nothing, none = live_after_forward(Keep())
    everything, every = live_after_forward(Keep(1.0))
    assert (none, every) == (0, 1)
    whole = everything - nothing
    for part in (0.3, 0.7):
        held, share = live_after_forward(Keep(1.0, part * whole))
        # 3 layers of 8 segments.
        assert part * whole - 2 * whole / 24 < held - nothing <= 1.02 * part * whole, share


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_kept_graph_finds_parameters_that_have_moved(family):
    """As ZeRO-3 does it: released after the forward pass, then gathered elsewhere, all in one storage."""
    model = small_model(family).train(False)
    layer, x = model.layers[0], torch.randn(2, 11, 32)
    state, context = layer.memory.initial_state(2, "cpu"), model.context(x, None)
    parameters = list(layer.parameters())
    for i, p in enumerate(parameters):
        p.ds_id = i

    def gradients(moved):
        gather(parameters)
        cells = EagerCells(layer, trains=True)
        y, after, cell = cells.keep(x, state, context)
        if moved:
            gather(parameters)
        own = cells.back(cell, tuple(map(torch.ones_like, (y, *after))))
        return *own, *cells.gradients()

    for found, expected in zip(gradients(moved=True), gradients(moved=False), strict=True):
        assert torch.equal(found, expected)


def gather(parameters):
    """Move parameters into a new storage, and leave nothing of use where they were."""
    flat = torch.cat([p.data.flatten() for p in parameters])
    for p, values in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        before, p.data = p.data, values.view_as(p)
        before.fill_(math.nan)


def test_what_is_there_anyway_is_not_counted():
    a, b = torch.randn(8, requires_grad=True), torch.randn(8)
    assert graph_bytes(lambda: (a * b).exp().sum(), [a, b]) == 32
    assert graph_bytes(lambda: (a * b).exp().sum(), [a]) == 64


@pytest.mark.parametrize("value", ["half", 2, -1, True, None, "nanGB", float("nan")])
def test_what_cannot_be_read_is_refused(value):
    with pytest.raises(ConfigError, match="bptt.keep=.*: use a share of the cells from 0 to 1, bytes"):
        parse_keep(value)
