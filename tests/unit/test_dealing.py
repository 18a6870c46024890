"""Which row reads which text of a stream."""

import heapq

import numpy as np
import pytest

from armt_dist.data.text.dealing import least_loaded


def one_by_one(loads, added):
    """Give each text to the first row that has got least."""
    heap = [(load, row) for row, load in enumerate(loads)]
    heapq.heapify(heap)
    rows = []
    for load in added:
        least, row = heap[0]
        heapq.heapreplace(heap, (least + load, row))
        rows.append(row)
    return rows, [load for load, _ in sorted(heap, key=lambda each: each[1])]


@pytest.mark.parametrize("rows", [1, 3, 128, 1000])
@pytest.mark.parametrize("longest", [1, 3, 1000])
def test_every_text_goes_to_the_row_that_has_got_least(rows, longest):
    random = np.random.default_rng(rows + longest)
    loads, expected = np.zeros(rows, dtype=np.int64), [0] * rows
    for block in range(60):
        # Blocks that fit at once, and those in which a row gets two; the last is short.
        added = random.integers(1, longest + 1, 128 if block < 59 else 5)
        found = least_loaded(loads, added)
        given, expected = one_by_one(expected, added.tolist())
        assert found.tolist() == given and loads.tolist() == expected
    assert len(least_loaded(loads, np.empty(0, dtype=np.int64))) == 0


def test_most_blocks_are_dealt_at_once(monkeypatch):
    """One by one, a step of 1,024 rows takes longer than reading its texts."""
    slow = []
    real = heapq.heapify
    monkeypatch.setattr(heapq, "heapify", lambda heap: slow.append(1) or real(heap))
    random, loads = np.random.default_rng(0), np.zeros(1024, dtype=np.int64)
    for _ in range(200):
        least_loaded(loads, random.integers(500, 1500, 128))
    assert len(slow) < 20
