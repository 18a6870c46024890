"""Metrics of a step: the time of a cell, and ranks that are slower than the others."""

from armt_dist.monitoring.step_metrics import Stragglers, cell_s, slowest
from armt_dist.schedule.grid import Grid
from armt_dist.schedule.program import Instruction, Op
from armt_dist.schedule.timeline import Event


def test_a_cell_time_is_that_of_one_segment_through_one_layer():
    # Three segments on two ranks: blocks of two and of one.
    grid = Grid(segments=3, layers=1, sp=2, chunks=2)
    units = [Instruction(Op.RUN, 0, 0, 0), Instruction(Op.RUN, 0, 0, 1), Instruction(Op.SEND, 0, 0, 1)]
    events = [Event(0, instruction, i, i + 1.0) for i, instruction in enumerate(units)]
    assert cell_s(events, grid) == 1.0
    assert cell_s([Event(0, Instruction(Op.RUN, 0, 1, c), c, c + 0.5) for c in (0, 1)], grid) == 1.0


def test_a_straggler_is_one_over_several_steps():
    assert slowest([1.0, 3.0]) == (1, 3.0) and slowest([2.0, 8.0, 4.0]) == (1, 2.0)
    watch = Stragglers(1.5)
    assert watch.report() is None
    assert watch.add([1.0, 1.0, 2.0]) == {"straggler_rank": 2, "slowest_over_median": 2.0}
    watch.add([2.0, 1.0, 1.0])
    assert watch.report() is None, "slow once is nothing to tell"
    watch.add([1.0, 1.0, 2.0])
    text = watch.report()
    assert text.startswith("rank 2 ") and "2.00 times" in text
