"""Rows on their way from step to step on four ranks, against indexing into all of them."""

from itertools import product

import numpy as np
import torch
from safetensors.torch import save_file
from support.ranks import spawn

from armt_dist.checkpoint.folder import rank_file
from armt_dist.distributed.mesh import make_mesh
from armt_dist.training.carried_states import EMPTY, Carrying, same_rows, shuffled_rows
from armt_dist.training.global_batch import RowLayout
from armt_dist.training.run_config import TrainConfig

WORLD, WIDTH = 4, 3
# sp, rows of a micro-batch, accumulation steps
LAYOUTS = [(1, 1, 2), (1, 2, 1), (2, 2, 2), (2, 1, 4), (4, 2, 4), (4, 8, 1)]
SOURCES = [shuffled_rows(0, 8), shuffled_rows(1, 8), same_rows(8)]


def shapes(rows):
    """Two layers whose states have WIDTH numbers together."""
    return [(torch.empty(rows, 1, device="meta"),), (torch.empty(rows, WIDTH - 1, device="meta"),)]


def carrying(ranks, layout, sources):
    sp, micro, accumulation = layout
    mesh = make_mesh(ranks, sp)
    rows = RowLayout(mesh.dp, sp, micro, accumulation)
    return Carrying(TrainConfig(), sources, rows, mesh, shapes, torch.device("cpu"))


def all_rows(layout):
    """Every row of a global batch, by its number."""
    count = WORLD // layout[0] * layout[1] * layout[2]
    return torch.arange(count * WIDTH, dtype=torch.float32).reshape(count, WIDTH) + 1


def pass_on(ranks, folder):
    """Exchange rows under every layout; save them under every one and restore them under every other."""
    for layout, sources in product(LAYOUTS, SOURCES):
        own, everything = carrying(ranks, layout, sources), all_rows(layout)
        mine = own.layout.rows(own.mesh.dp_rank)
        held = everything[mine] if own.holds else own.none_held()
        for batch, probability in ((3, 0.5), (4, 1.0), (5, 0.0)):
            chosen = sources(batch, probability)
            expected = torch.where(torch.tensor(chosen == EMPTY)[:, None], 0, everything[np.maximum(chosen, 0)])
            found = own.exchange(held, chosen)
            want = expected[mine] if own.mesh.sp_rank == 0 else expected[:0]
            assert torch.equal(found, want), (layout, batch)
    for layout in LAYOUTS:
        own = carrying(ranks, layout, SOURCES[0])
        target = folder / "-".join(map(str, layout))
        if ranks.rank == 0:
            target.mkdir()
        torch.distributed.barrier()
        held = all_rows(layout)[own.layout.rows(own.mesh.dp_rank)] if own.holds else own.none_held()
        save_file({"x": torch.zeros(1), **own.saved(held)}, rank_file(target, ranks.rank))
    torch.distributed.barrier()
    for before, after in product(LAYOUTS, LAYOUTS):
        saved, own = carrying(ranks, before, SOURCES[0]).layout, carrying(ranks, after, SOURCES[0])
        found = own.restored(folder / "-".join(map(str, before)), saved)
        assert torch.equal(found, all_rows(after)[own.layout.rows(own.mesh.dp_rank)] if own.holds else own.none_held())
    # A batch that has grown: rows that were not saved start anew.
    larger = carrying(ranks, (1, 2, 2), SOURCES[0])
    found = larger.restored(folder / "1-2-1", carrying(ranks, (1, 2, 1), SOURCES[0]).layout)
    known = torch.cat([all_rows((1, 2, 1)), torch.zeros(8, WIDTH)])
    assert torch.equal(found, known[larger.layout.rows(larger.mesh.dp_rank)])


def test_rows_reach_the_ranks_that_start_from_them(tmp_path):
    spawn(WORLD, pass_on, tmp_path)
