"""Mistakes that only a GPU would show, found without one: the whole pass on the meta device.

A dispatch mode sees every operation of forward and backward. None may take tensors of two devices (numbers apart), and
none may need a value of the device on the host: there the host would wait for it.
"""

import pytest
import torch
from support.models import small_model
from support.oracle import GRID, random_batch, random_starts, shifted
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from armt_dist.runtime.executor import ScheduledLM
from armt_dist.runtime.piece import cut_piece

META = torch.device("meta")
# What needs a value, or as many results as there are values of a kind.
WAITS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "unique", "equal", "argwhere")


class Watch(TorchDispatchMode):
    """Collects operations that mix devices, wait for the device, or copy from it."""

    def __init__(self):
        super().__init__()
        self.mixed, self.waits, self.seen = [], [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)]
        found = func(*args, **(kwargs or {}))
        results = [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        on_device = any(t.device == META for t in tensors)
        if on_device:
            self.seen += 1
            # Copies to the device have two, and a number on the host fits any.
            devices = {t.device for t in tensors if t.dim()}
            if len(devices) > 1 and name not in ("copy_", "_to_copy", "_foreach_copy_"):
                self.mixed.append(name)
            if name.strip("_") in WAITS or name in WAITS or any(t.device != META for t in results):
                self.waits.append(name)
        return found


def watched(work):
    """What `work` did on the device."""
    with Watch() as watch:
        work()
    return watch


KINDS = {
    "armt": {},
    "heads": dict(n_heads=2, gating=True),
    "decay": dict(state_decay=0.9),
    "learned": dict(state_decay="learned"),
    "window": dict(sliding_window=6, sink=1),
    "window_restart": dict(sliding_window=8, window_positions="restart", detach_window=True),
    "rmt": dict(memory_kind="rmt"),
    "rmt_window": dict(memory_kind="rmt", sliding_window=5),
    "transformer_xl": dict(memory_kind="transformer_xl"),
}


@pytest.mark.parametrize("states", ["store", "rebuild", "recompute"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_stays_on_the_device_and_never_waits_for_it(kind, states):
    model = small_model(**KINDS[kind]).train().to(META)
    for pad, documents, chunks, offload in ((0, False, 1, False), (11, False, 2, False), (0, True, 1, False)):
        ids, labels, mask = random_batch(pad=pad)
        starts = random_starts(ids) if documents else None
        grid = GRID._replace(chunks=chunks, layers=model.config.num_hidden_layers)
        piece = cut_piece(ids, shifted(labels), mask, model.config, grid, document_starts=starts)
        piece = piece._replace(input_ids=piece.input_ids.to(META))
        runner = ScheduledLM(model, states=states, offload=offload)

        def step(runner=runner, piece=piece):
            totals = runner(piece, count=True, keep_last=True)
            (totals.nll / totals.scored.to(META)).backward()

        found = watched(step)
        assert found.seen > 200 and not found.mixed and not found.waits, (found.mixed[:5], found.waits[:5])
        assert all(p.grad is not None and p.grad.device == META for p in model.parameters() if p.requires_grad)
        model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen3", "olmo2", "mistral"])
def test_families(family):
    model = small_model(family).eval().to(META)
    found = watched(lambda: model.segment(torch.zeros(2, 8, dtype=torch.int64, device=META), model.initial_states(2)))
    assert found.seen > 50 and not found.mixed and not found.waits, (found.mixed, found.waits)


PLANTED = {
    "a number": lambda x: x.sum().item(),
    "a truth": lambda x: bool(x.any()),
    "a copy": lambda x: x.cpu(),
    "positions": lambda x: x.nonzero(),
    "a mask as index": lambda x: x[x > 0],
    "two devices": lambda x: x + torch.ones(3),
    "an index on the host": lambda x: x[torch.tensor([0, 1])],
    "a product of two devices": lambda x: x @ torch.ones(3),
}


@pytest.mark.parametrize("what", PLANTED)
def test_what_is_planted_is_found(what):
    """By the mode, or by the meta device, which has no values to give."""
    watch, refused = Watch(), False
    with watch:
        try:
            PLANTED[what](torch.ones(3, device=META))
        except (RuntimeError, NotImplementedError):
            refused = True
    assert refused or watch.mixed or watch.waits
