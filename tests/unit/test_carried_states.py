"""States that pass from one sequence to the next: the scheduled executor against the plain loop."""

import itertools

import pytest
import torch
from support import golden
from support.float64 import in_float64
from support.models import small_model
from support.oracle import GRID, random_batch, random_starts, shifted
from torch.nn.functional import cross_entropy

from armt_dist.runtime.executor import ScheduledLM
from armt_dist.runtime.piece import cut_piece
from armt_dist.runtime.row_states import as_rows, from_rows

KINDS = {
    "armt": {},
    "heads": dict(n_heads=2, gating=True),
    "decay": dict(state_decay=0.9),
    "window": dict(sliding_window=6, sink=1),
    "window_restart": dict(sliding_window=8, window_positions="restart", detach_window=True),
    "rmt": dict(memory_kind="rmt"),
    "rmt_window": dict(memory_kind="rmt", sliding_window=5),
    "rmt_k2": dict(memory_kind="rmt", k2=2),
    "transformer_xl": dict(memory_kind="transformer_xl"),
}
SEGMENT = 8


def loop(model, ids, labels, states, starts=None):
    """Return the mean loss and the last states of the plain loop from `states`."""
    loss = torch.zeros(())
    borders = itertools.repeat(None) if starts is None else starts.split(SEGMENT, 1)
    k2 = model.config.k2
    for s, (part, wanted, border) in enumerate(zip(ids.split(SEGMENT, 1), labels.split(SEGMENT, 1), borders)):  # noqa: B905
        if k2 and s % k2 == 0:
            states = [type(state)(*(tensor.detach() for tensor in state)) for state in states]
        hidden, states = model.segment(part, states, None, border)
        logits = model.backbone.head(hidden).flatten(0, 1)
        loss = loss + cross_entropy(logits, wanted.flatten(), ignore_index=-100, reduction="sum")
    return loss / labels.ne(-100).sum(), states


def some_states(model, batch=4):
    """Return the states after a text; those of the last row are empty."""
    with torch.no_grad():
        _, states = loop(model, *random_batch(tokens=2 * SEGMENT, pad=0, seed=7)[:2], model.initial_states(batch))
    keep = torch.ones(batch)
    keep[-1] = 0
    return [type(s)(*(t * keep.view(-1, *[1] * (t.dim() - 1)) for t in s)) for s in states]


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("states", ["store", "rebuild", "recompute"])
@pytest.mark.parametrize("name", KINDS)
def test_a_sequence_that_starts_from_states(name, states, documents):
    """Loss, every gradient and the last states; chunks of unequal size; the states get no gradient.

    In float64: some of these models magnify a rounding, which differs between CPUs, a thousandfold.
    """
    with in_float64():
        check_a_sequence(name, states, documents)


def check_a_sequence(name, states, documents):
    model = small_model(base=dict(initializer_range=0.1), **KINDS[name])
    ids, labels, _ = random_batch(tokens=5 * SEGMENT - 3, pad=0)
    labels = shifted(labels)
    starts = random_starts(ids) if documents else None
    first = some_states(model)
    loss, last = loop(model, ids, labels, first, starts)
    loss.backward()
    expected = gradients(model)
    grid = GRID._replace(layers=model.config.num_hidden_layers, chunks=3)
    piece = cut_piece(ids, labels, None, model.config, grid, document_starts=starts)
    totals = ScheduledLM(model, states=states)(piece, first=first, keep_last=True)
    found = totals.nll / totals.scored
    found.backward()
    golden.assert_close("loss", found.detach(), loss.detach(), golden.TOLERANCES["loss"])
    golden.assert_gradients(gradients(model), expected)
    assert [type(state) for state in totals.states] == [type(state) for state in last]
    for state, wanted in zip(totals.states, last, strict=True):
        for field, tensor, reference in zip(getattr(state, "_fields", ()), state, wanted, strict=True):
            assert not tensor.requires_grad
            golden.assert_close(field, tensor, reference.detach(), golden.TOLERANCES["state"], relative=True)


def test_empty_states_change_no_bit():
    model = small_model()
    ids, labels, _ = random_batch(pad=0)
    piece = cut_piece(ids, shifted(labels), None, model.config, GRID._replace(layers=2))
    runner = ScheduledLM(model)
    with torch.no_grad():
        plain, given = runner(piece), runner(piece, first=model.initial_states(len(ids)))
    assert plain.nll.equal(given.nll) and plain.states is None


@pytest.mark.parametrize("name", KINDS)
def test_states_as_rows_and_back(name):
    model = small_model(**KINDS[name])
    states = some_states(model)
    rows = as_rows(states)
    assert rows.shape[0] == 4 and not rows[-1].any(), "an empty state is zeros"
    back = from_rows(rows, model.initial_states(4, "meta"))
    for state, again in zip(states, back, strict=True):
        assert type(state) is type(again)
        assert all(a.equal(b) and b.is_contiguous() for a, b in zip(state, again, strict=True))
