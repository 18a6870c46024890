"""What is left of a pass once its backward is over, while its loss is still held, as a training step holds it."""

import gc

import pytest
import torch
from support.models import small_model
from support.oracle import GRID, random_batch, shifted

from armt_dist.runtime.cells import EagerCells
from armt_dist.runtime.executor import ScheduledLM
from armt_dist.runtime.piece import cut_piece
from armt_dist.schedule.kept_cells import Keep


def live_bytes() -> int:
    """Of the storages of all tensors that Python knows of."""
    gc.collect()
    with torch.no_grad():
        tensors = [
            each for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and each.device.type == "cpu"
        ]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def growth(states: str, offload: bool, keep: float = 0, grouped: bool = False) -> list[int]:
    """Bytes that each of four micro-batches of a step adds."""
    model = small_model().train()
    runner = ScheduledLM(model, states=states, keep=Keep(keep), grouped=grouped, offload=offload)
    ids, labels, mask = random_batch()
    held, before, added = [], live_bytes(), []
    for _ in range(4):
        piece = cut_piece(
            ids, shifted(labels), mask, model.config, GRID._replace(layers=model.config.num_hidden_layers)
        )
        totals = runner(piece)
        (totals.nll / totals.scored).backward()
        held.append(totals)
        del piece
        now = live_bytes()
        added.append(now - before)
        before = now
    return added


@pytest.mark.parametrize("offload", [False, True], ids=["on the device", "offloaded"])
@pytest.mark.parametrize(
    ("states", "keep", "grouped"),
    [("store", 0, False), ("rebuild", 0, True), ("recompute", 0, False), ("store", 0.5, False), ("store", 1, True)],
)
def test_micro_batches_add_nothing_but_their_results(states, keep, grouped, offload):
    _, *later = growth(states, offload, keep, grouped)
    layer = sum(p.nbytes for p in small_model().layers[0].parameters())
    # Token ids, labels and masks of a micro-batch stay, by its results' graph.
    assert max(later) < layer / 4


def test_the_measure_finds_sums_that_stay(monkeypatch):
    """They were kept once, float32 and whole: as much as all layers for each micro-batch."""
    ended = EagerCells.gradients
    monkeypatch.setattr(EagerCells, "gradients", lambda cells: ended(cells) if cells.stay() else ())
    monkeypatch.setattr(EagerCells, "stay", lambda cells: setattr(cells, "kept", cells.sums) is None, raising=False)
    _, *later = growth("store", False)
    model = small_model()
    assert min(later) > sum(p.nbytes for layer in model.layers for p in layer.parameters()) / 2
