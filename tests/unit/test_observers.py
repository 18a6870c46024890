"""What observers see of every cell: the digests of the memory states, and the smallest read of the memory."""

import math

import pytest
import torch
from support.golden import load_case, load_model

from armt_dist.monitoring import state_digests as digest
from armt_dist.monitoring.smallest_read import SmallestRead
from armt_dist.monitoring.state_digests import Key, first_difference
from armt_dist.runtime.executor import ScheduledLM
from armt_dist.runtime.piece import cut_piece
from armt_dist.schedule.grid import Grid

CPU = torch.device("cpu")


def test_the_first_difference_is_where_it_began():
    a = {Key(step, segment, layer, 0): "same" for step in (1, 2) for segment in range(3) for layer in range(3)}
    b = {key: "same" if key.step == 1 or key.segment < 1 or key.layer < 2 else "other" for key in a}
    assert first_difference(a, b) == Key(2, 1, 2, 0)
    b.pop(Key(2, 1, 2, 0))
    assert first_difference(a, b) == Key(2, 2, 2, 0), "states of one run only are not compared"


def gradients(grid, observe=None, name="armt_v2_llama_heads2", **options):
    """Those of a golden case; `observe(piece)` makes the observer."""
    case, model = load_case(name), load_model(name).eval()
    ids = case.io["input_ids"]
    piece = cut_piece(ids, ids, None, model.config, grid._replace(layers=model.config.num_hidden_layers))
    totals = ScheduledLM(model, **options)(piece, observe=observe and observe(piece))
    totals.nll.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("states", ["store", "rebuild", "recompute"])
def test_an_observer_sees_every_cell_once_and_changes_nothing(states):
    seen = []
    grid = Grid(1, 1, rounds=2, chunks=2)
    found = gradients(grid, lambda piece: seen.append, states=states)
    for name, grad in gradients(grid, states=states).items():
        assert torch.equal(found[name], grad), name
    cells = {(s.instruction.layer, s.instruction.block, s.segment, s.row): s for s in seen}
    layers, blocks, segments, rows = (sorted({key[i] for key in cells}) for i in range(4))
    assert blocks == [0, 1] and rows == [0, 1]
    assert len(seen) == len(cells) == len(layers) * 2 * len(segments) * 2
    for (layer, block, segment, row), cell in cells.items():
        following = cells.get((layer, block, segment + 1, row)) or cells.get((layer, block + 1, 0, row))
        if following:
            assert all(torch.equal(a, b) for a, b in zip(cell.after, following.before, strict=True))


def test_digests_name_segments_of_the_sequence_whatever_the_blocks(tmp_path):
    for name, rounds in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        writer = digest.Digests(tmp_path / name, rank=0)
        gradients(Grid(1, 1, rounds=rounds, chunks=2), lambda piece, writer=writer: writer.of(7, 10, piece.grid))
        writer.flush()
    one, two = digest.read_digests(tmp_path / "one"), digest.read_digests(tmp_path / "two")
    assert one == two and {(key.step, key.row) for key in one} == {(7, 10), (7, 11)}
    assert sorted({key.segment for key in one}) == list(range(1 + max(key.segment for key in one)))


@torch.no_grad()
def every_read(cells):
    """z·q of every position, head and cell whose head was written to, one after the other."""
    for cell in cells:
        memory = cell.layer.memory
        for q_row, z_row in zip(memory.features(memory.W_mq(cell.x)), cell.before.z, strict=True):
            for q, z in zip(q_row, z_row, strict=True):
                yield from (float(position @ z) for position in q if z.any())


@pytest.mark.parametrize("name", ["armt_v2_llama_heads2", "armt_v2_llama_base", "armt_paper_llama_base"])
def test_the_smallest_read_is_that_of_all_cells(name):
    seen, smallest = [], SmallestRead(CPU)
    gradients(Grid(1, 1), lambda piece: lambda cell: (seen.append(cell), smallest(cell)), name)
    found, expected = smallest.take(), min(every_read(seen))
    print(name, found)
    assert found == pytest.approx(expected, rel=1e-5)
    assert smallest.take() == math.inf, "the next step starts anew"


def test_without_a_denominator_there_is_no_smallest_read():
    smallest = SmallestRead(CPU)
    gradients(Grid(1, 1), lambda piece: smallest, "armt_v2_llama_nodenom")
    assert smallest.take() == math.inf
