"""Communication in the order of the schedule ends, and uses no memory too early or too late: proved on a double of NCCL
(support/nccl_model.py) that runs the real hand-off of all ranks with random delays."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.nccl_model import Deadlock, Hazard
from support.nccl_schedule import Case, mutated, play

from armt_dist.distributed.machine import LEAST_QUEUES
from armt_dist.runtime import handoff
from armt_dist.schedule.grid import Grid

# Communicators of a rank: the world's, and those of its two edges.
COMMUNICATORS = 3


def grid(sp, rounds, chunks, layers=3):
    """A grid with a segment in each block."""
    return Grid(sp * rounds, layers, sp, rounds, chunks)


@pytest.mark.parametrize("sp", range(2, 17))
def test_every_layout_of_up_to_16_ranks_ends(sp):
    for rounds, chunks in ((1, 3), (2, 1)):
        play(Case(grid(sp, rounds, chunks, layers=2), seed=sp))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_delay_and_no_layout_ends_in_a_deadlock_or_a_hazard(data):
    def draw(name, low, high):
        return data.draw(st.integers(low, high), label=name)

    layout = grid(draw("sp", 2, 6), draw("rounds", 1, 3), draw("chunks", 1, 4), draw("layers", 1, 4))
    window = data.draw(st.none() | st.integers(0, 8), label="layers gathered ahead")
    play(Case(layout, dp=draw("dp", 1, 2), seed=draw("seed", 0, 10**6), slots=COMMUNICATORS, window=window))


def test_the_hardware_queues_that_a_rank_may_have_suffice():
    for sp, seed in itertools.product((2, 3, 4), range(4)):
        play(Case(grid(sp, 2, 2), seed=seed, queues=LEAST_QUEUES))


# (line of handoff.py, what stands there instead, what is found)
FAULTS = {
    "a state is sent before it is computed": (
        "            self.stream.wait_stream(torch.cuda.current_stream())\n",
        "",
        Hazard,
        r"cat does not wait for (RUN|BACK)",
    ),
    "a state's memory is used again before it is copied": (
        "                tensor.record_stream(self.stream)\n",
        "                pass\n",
        Hazard,
        r"(RUN|BACK) .* does not wait for cat",
    ),
    "a state is used before it has come": (
        "        work.wait()\n",
        "        pass\n",
        Hazard,
        r"(RUN|BACK) .* does not wait for recv",
    ),
    "a received state's memory is used again before it is read": (
        "            buffer.record_stream(torch.cuda.current_stream())\n",
        "            pass\n",
        Hazard,
        r"(recv|cat) .*does not wait for (RUN|BACK)",
    ),
    "a gradient's receive is posted before all states are sent": (
        "        if self.due and self.due[0].op is instruction.op:\n",
        "        if self.due:\n",
        Deadlock,
        "in recv",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_hand_off_is_found(fault):
    line, instead, kind, message = FAULTS[fault]
    broken = mutated(handoff, line, instead)
    for sp in (2, 3):
        with pytest.raises(kind, match=message):
            play(Case(grid(sp, 2, 2), seed=1, handoff=broken))


@pytest.mark.parametrize("sp", (2, 3, 4))
def test_one_communicator_for_both_neighbours_is_a_deadlock(sp):
    """Why every edge has its own; with enough units on the way, where each rank also receives from the last one."""
    with pytest.raises(Deadlock, match="in send"):
        play(Case(grid(sp, 2, 2, layers=5), seed=1, shared=True))


@pytest.mark.parametrize(
    "too_few",
    # A GPU that ran two communicators' kernels at once would nearly always get by: not with this seed.
    [dict(slots=1), dict(slots=2, seed=2), dict(queues=1), dict(queues=LEAST_QUEUES // 2)],
    ids=str,
)
def test_a_gpu_that_runs_too_little_at_once_is_a_deadlock(too_few):
    with pytest.raises(Deadlock, match="in all GATHER|in all REDUCE"):
        play(Case(grid(4, 2, 2), **too_few))
