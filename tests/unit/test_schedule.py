"""Schedules, their checks and the simulator: properties of every generated schedule, and faults put in on purpose."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armt_dist.config import ConfigError
from armt_dist.schedule.checker import ScheduleError
from armt_dist.schedule.grid import (
    ARMT_ARROWS,
    RMT_ARROWS,
    Grid,
    block_owner,
    block_segments,
    check_grid,
    efficiency_bound,
    pipeline_warning,
    prefetch_window,
    rank_blocks,
)
from armt_dist.schedule.program import (
    Instruction,
    Op,
    backward_program,
    build_program,
    cut_calls,
    fit_grid,
    layer_calls,
    layer_major,
    segment_major,
    wavefront,
)
from armt_dist.schedule.simulator import Costs, simulate, simulate_step
from armt_dist.schedule.timeline import plot_timeline, show
from armt_dist.schedule.weight_groups import GROUP, left_over

FAULTY = Grid(segments=7, layers=2, sp=3, rounds=2, chunks=2)


@st.composite
def grids(draw, ragged=True):
    sp, rounds, chunks = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    extra = draw(st.integers(0, 7)) if ragged else sp * rounds * draw(st.integers(0, 2))
    return Grid(sp * rounds + extra, draw(st.integers(1, 5)), sp, rounds, chunks)


def full_programs(grid, weights=False):
    forwards = [wavefront(grid, rank) for rank in range(grid.sp)]
    return [forward + backward_program(forward, weights) for forward in forwards]


def spans(report, op):
    """(layer, block, chunk) -> (start, end), and that no unit occurs twice."""
    own = [
        (event.instruction[1:], (event.start_s, event.end_s)) for event in report.events if event.instruction.op is op
    ]
    assert len(own) == len(dict(own)), f"a unit has two {op}"
    return dict(own)


def assert_order(grid, report, arrows):
    """Every unit ran once and after those it depends on, by the clock alone; the backward mirrored."""
    count = grid.sp * grid.rounds
    units = {(layer, b, c) for layer in range(grid.layers) for b in range(count) for c in range(grid.chunks)}
    run, rerun, back = (spans(report, op) for op in (Op.RUN, Op.RERUN, Op.BACK))
    assert set(run) == set(rerun) == set(back) == units
    for layer, block, chunk in units:
        unit = (layer, block, chunk)
        source = layer if arrows == ARMT_ARROWS else grid.layers - 1
        for before in [(layer - 1, block, chunk), (source, block - 1, chunk)]:
            if before in units:
                assert run[unit][0] >= run[before][1] - 1e-9, f"{unit} ran before {before} was done"
                assert back[before][0] >= back[unit][1] - 1e-9, f"backward of {before} before that of {unit}"
        assert run[unit][1] <= rerun[unit][0] + 1e-9
        assert rerun[unit][1] <= back[unit][0] + 1e-9


@given(grids())
def test_blocks_cut_the_sequence_evenly_and_cyclically(grid):
    cut = block_segments(grid)
    assert [s for block in cut for s in block] == list(range(grid.segments))
    assert max(map(len, cut)) - min(map(len, cut)) <= 1
    assert len(cut) == grid.sp * grid.rounds
    for rank in range(grid.sp):
        assert [b for b in range(len(cut)) if block_owner(grid, b) == rank] == list(rank_blocks(grid, rank))


@settings(max_examples=60, deadline=None)
@given(grids(), st.sampled_from([0, 1, None, 99]), st.booleans(), st.sampled_from([0.0, 0.7]))
def test_wavefront_covers_every_cell_once_and_respects_the_arrows(grid, window, reduce_blocks, weight_ratio):
    costs = Costs(gather_s=0.3, reduce_s=0.2, latency_s=0.1, prefetch_layers=window, reduce_blocks=reduce_blocks)
    costs = costs._replace(weight_ratio=weight_ratio)
    assert_order(grid, simulate_step("wavefront", grid, costs), ARMT_ARROWS)


@settings(max_examples=30, deadline=None)
@given(grids(), st.sampled_from([ARMT_ARROWS, RMT_ARROWS]))
def test_segment_major_respects_the_arrows_of_both_kinds(grid, arrows):
    grid = fit_grid("segment_major", grid._replace(sp=1, rounds=1), arrows)
    assert [len(block) for block in block_segments(grid)] == [1] * grid.segments
    assert_order(grid, simulate_step("segment_major", grid, arrows=arrows), arrows)


@settings(max_examples=60, deadline=None)
@given(grids(), st.booleans())
def test_no_gradient_is_waited_for_before_the_rerun_and_dstate_goes_before_weights_and_reduce(grid, weights):
    for program in full_programs(grid, weights):
        at = {instruction: index for index, instruction in enumerate(program)}
        units = [instruction[1:] for instruction in program if instruction.op is Op.BACK]
        assert [i[1:] for i in program if i.op is Op.WEIGHT] == (units if weights else [])
        for instruction, index in at.items():
            if instruction.op is Op.WEIGHT:
                before = program[index - 1].op
                sends = instruction.block > 0
                assert before is (Op.SEND_GRAD if sends else Op.BACK)
            if instruction.op is Op.RECV_GRAD:
                assert at[instruction._replace(op=Op.RERUN)] < index
            if instruction.op is Op.REDUCE:
                sends = [i for other, i in at.items() if other.op is Op.SEND_GRAD and other.layer == instruction.layer]
                assert all(sent < index for sent in sends)
        reduced = [instruction.layer for instruction in program if instruction.op is Op.REDUCE]
        assert reduced == list(reversed(range(grid.layers))), "each layer is reduced once, from the top"


@settings(max_examples=60, deadline=None)
@given(grids(ragged=False))
def test_efficiency_is_the_bound_when_communication_is_free(grid):
    forward = simulate(grid, [wavefront(grid, rank) for rank in range(grid.sp)])
    assert 1 - forward.bubble == pytest.approx(efficiency_bound(grid))
    without_rerun = simulate_step("wavefront", grid, Costs(rerun_ratio=0.0))
    assert 1 - without_rerun.bubble == pytest.approx(efficiency_bound(grid))
    # With a re-run the bound is beaten a little: the first one fills the wait for dState.
    assert 1 - simulate_step("wavefront", grid).bubble >= efficiency_bound(grid) - 1e-9


def test_the_bound_is_the_published_formula_where_the_pipeline_fills():
    for grid in (Grid(8, 16, sp=4), Grid(16, 16, sp=8, rounds=2), Grid(8, 4, sp=8, chunks=2)):
        units = grid.rounds * grid.layers * grid.chunks
        assert efficiency_bound(grid) == pytest.approx(units / (units + grid.sp - 1))
        assert pipeline_warning(grid) is None


def test_without_a_prefetch_window_the_collectives_serialise_the_wavefront():
    grid = Grid(segments=4, layers=16, sp=4)
    forwards = [wavefront(grid, rank) for rank in range(4)]
    makespan_cells = [
        simulate(grid, forwards, Costs(cell_s=0.03, prefetch_layers=window)).makespan_s / 0.03 for window in range(5)
    ]
    assert makespan_cells[0] == pytest.approx(4 * 16)
    assert makespan_cells[1] > 30
    assert makespan_cells[prefetch_window(grid)] == pytest.approx(16 + 3)


@settings(max_examples=60, deadline=None)
@given(grids(), st.floats(0, 0.3))
def test_the_derived_window_is_as_good_as_any(grid, gather_s):
    # Units of one cell or more hide a gather of less than a layer's time, whatever the skew.
    grid = grid._replace(segments=grid.sp * grid.rounds * 3)
    forwards = [wavefront(grid, rank) for rank in range(grid.sp)]
    derived = simulate(grid, forwards, Costs(gather_s=gather_s))
    endless = simulate(grid, forwards, Costs(gather_s=gather_s, prefetch_layers=10**6))
    assert derived.makespan_s == pytest.approx(endless.makespan_s)


def test_hand_off_is_hidden_until_the_link_is_slower_than_a_unit():
    grid = Grid(segments=16, layers=8, sp=4)
    free, hidden = (simulate_step("wavefront", grid, Costs(latency_s=latency)) for latency in (0.0, 0.5))
    assert hidden.makespan_s == pytest.approx(free.makespan_s + 2 * 3 * 0.5)
    assert sum(hidden.exposed_s) == pytest.approx(0)
    assert hidden.skew_s[3] == pytest.approx(free.skew_s[3] + 3 * 0.5)
    slow = simulate_step("wavefront", grid, Costs(state_bytes=10.0, bytes_per_s=2.0, prefetch_layers=99))
    assert slow.exposed_s[3] == pytest.approx(7 * (10 / 2 - 4)), "forward units of 4 s behind transfers of 5 s"


def test_peaks_of_layers_and_states():
    grid = Grid(segments=8, layers=12, sp=4)
    for window in (0, 2, 4):
        assert simulate_step("wavefront", grid, Costs(prefetch_layers=window)).peak_live_layers == window + 1
    assert simulate_step("wavefront", grid).peak_live_states == 1
    # On one rank the second block reads all layers' states of the first.
    assert simulate_step("wavefront", Grid(4, 12, sp=1, rounds=2)).peak_live_states == 12
    assert simulate_step("segment_major", Grid(4, 12), arrows=RMT_ARROWS).peak_live_states == 1


def test_the_window_grows_with_a_slow_hand_off():
    grid = Grid(segments=16, layers=8, sp=4, chunks=2)
    assert [prefetch_window(grid, share) for share in (0.0, 0.25, 1.0)] == [3, 3, 4]


def test_one_rank_takes_the_sum_of_its_cells():
    costs = Costs(cell_s=2.0, rerun_ratio=1.5, backward_ratio=3.0)
    assert simulate_step("layer_major", Grid(5, 3, chunks=2), costs).makespan_s == pytest.approx(
        5 * 3 * 2 * (1 + 1.5 + 3)
    )


def test_collectives_run_one_after_another():
    # Forward and backward gather four layers each, the backward reduces four; compute hides behind them.
    report = simulate_step("layer_major", Grid(1, 4), Costs(0.01, gather_s=5.0, reduce_s=7.0, prefetch_layers=99))
    assert report.makespan_s == pytest.approx(8 * 5 + 4 * 7)


def test_gather_waits_are_counted_apart():
    report = simulate_step("layer_major", Grid(2, 4), Costs(gather_s=5.0, prefetch_layers=1))
    assert report.gather_wait_s[0] > 5
    assert report.exposed_s == report.skew_s == (0.0,)


@pytest.mark.parametrize("rank", range(3))
def test_every_dropped_or_doubled_instruction_is_caught_and_named(rank):
    programs = full_programs(FAULTY)
    for index, instruction in enumerate(programs[rank]):
        dropped = programs[rank][:index] + programs[rank][index + 1 :]
        with pytest.raises(ScheduleError) as error:
            simulate(FAULTY, [*programs[:rank], dropped, *programs[rank + 1 :]])
        assert error.value.rank == rank
        assert error.value.instruction.layer == instruction.layer or str(instruction) in str(error.value)
        doubled = programs[rank][: index + 1] + programs[rank][index:]
        with pytest.raises(ScheduleError) as error:
            simulate(FAULTY, [*programs[:rank], doubled, *programs[rank + 1 :]])
        assert (error.value.rank, error.value.index, error.value.instruction) == (rank, index + 1, instruction)


NEEDED_ORDER = {
    (Op.GATHER, Op.RUN),
    (Op.GATHER, Op.RERUN),
    (Op.RECV, Op.RUN),
    (Op.RUN, Op.SEND),
    (Op.RUN, Op.RELEASE),
    (Op.RECV_GRAD, Op.BACK),
    (Op.RERUN, Op.BACK),
    (Op.BACK, Op.SEND_GRAD),
    (Op.BACK, Op.REDUCE),
    (Op.RELEASE, Op.GATHER),
}
# With weight gradients of their own.
NEEDED_HALVES = NEEDED_ORDER - {(Op.BACK, Op.REDUCE)} | {(Op.BACK, Op.WEIGHT), (Op.WEIGHT, Op.REDUCE)}


@pytest.mark.parametrize(("weights", "needed"), [(False, NEEDED_ORDER), (True, NEEDED_HALVES)])
def test_every_harmful_swap_is_caught_and_named(weights, needed):
    programs, caught = full_programs(FAULTY, weights), set()
    for rank, program in enumerate(programs):
        for index, (first, second) in enumerate(zip(program, program[1:], strict=False)):
            # Releasing one layer after gathering the next is harmless unless it is the same layer.
            harmless = second.op is Op.GATHER and first.layer != second.layer
            if (first.op, second.op) not in needed or harmless:
                continue
            swapped = [*program[:index], second, first, *program[index + 2 :]]
            named = rf"rank {rank}, instruction ({index}, {second}|{index + 1}, {first}): "
            with pytest.raises(ScheduleError, match=named):
                simulate(FAULTY, [*programs[:rank], swapped, *programs[rank + 1 :]])
            caught.add((first.op, second.op))
    assert caught == needed


@pytest.mark.parametrize("sp", [2, 4, 8, 16])
def test_weight_gradients_leave_the_critical_path(sp):
    """Forward, re-run, gradients of inputs and of weights take one each: of every hop the last one is saved."""
    grid, layers = Grid(sp, 16, sp), 16
    steps = [simulate_step("wavefront", grid, Costs(weight_ratio=ratio)).makespan_s for ratio in (0.0, 1.0)]
    assert steps == [4 * layers + (sp - 1) * hop for hop in (3, 2)]


def test_a_long_unit_leaves_its_last_group():
    assert [left_over(cells) for cells in (1, 7, GROUP, GROUP + 1, 2 * GROUP, 2 * GROUP + 3)] == [1, 7, 8, 1, 8, 3]
    grid = Grid(2 * (GROUP + 3), 4, sp=2)
    per_cell, grouped = (simulate_step("wavefront", grid, Costs(weight_ratio=ratio)) for ratio in (0.0, 1.0))
    assert per_cell.makespan_s - grouped.makespan_s == 3
    weights = spans(grouped, Op.WEIGHT)
    assert {end - start for start, end in weights.values()} == {3}


def test_layers_out_of_order_are_named_in_both_directions():
    grid = Grid(segments=2, layers=2)
    forward = wavefront(grid, 0)
    with pytest.raises(ScheduleError, match=r"RUN 1.0 b0: needs RUN 0.0 b0 before it"):
        simulate(grid, [sorted(forward, key=lambda instruction: -instruction.layer)])
    upwards = sorted(backward_program(forward), key=lambda instruction: instruction.layer)
    with pytest.raises(ScheduleError, match=r"BACK 0.0 b0: needs BACK 1.0 b0 before it"):
        simulate(grid, [forward + upwards])


def test_a_foreign_cell_is_named():
    programs = full_programs(FAULTY)
    with pytest.raises(
        ScheduleError, match=r"rank 0, instruction 0, GATHER 0 b1: is not among the instructions of rank 0"
    ):
        simulate(FAULTY, [programs[1], programs[0], programs[2]])


def test_one_rank_with_another_order_of_collectives_is_named():
    # Two rounds with two layers: gathering layer 1 ahead of layer 0 respects all arrows of this rank.
    grid = Grid(segments=3, layers=2, sp=3)
    programs = [wavefront(grid, rank) for rank in range(3)]
    gather = next(i for i in programs[2] if i.op is Op.GATHER and i.layer == 1)
    programs[2] = [gather, *(i for i in programs[2] if i is not gather)]
    with pytest.raises(ScheduleError, match=r"rank 2, instruction 0, GATHER 1 b2: .* GATHER 0 on the other ranks"):
        simulate(grid, programs)


def test_a_blocking_reduction_before_dstate_deadlocks_and_is_named():
    grid = Grid(segments=3, layers=3, sp=3)
    programs = full_programs(grid)
    send = next(i for i in programs[2] if i.op is Op.SEND_GRAD)
    reduce = next(i for i in programs[2] if i.op is Op.REDUCE)
    late = [i for i in programs[2] if i is not send]
    late.insert(late.index(reduce) + 1, send)
    simulate(grid, [*programs[:2], late], Costs(reduce_blocks=False))
    with pytest.raises(ScheduleError, match=r"rank 2, instruction \d+, REDUCE 2 b2: deadlock; .*rank 0 in RECV_GRAD 2"):
        simulate(grid, [*programs[:2], late], Costs(reduce_blocks=True))


def test_receives_posted_in_the_wrong_order_deadlock():
    grid = Grid(segments=4, layers=1, sp=2, rounds=2)
    programs = [wavefront(grid, rank) for rank in range(2)]
    # Rank 0 asks for the second block's state before it has run the first.
    receive = next(i for i in programs[0] if i.op is Op.RECV)
    programs[0] = [receive, *(i for i in programs[0] if i is not receive)]
    with pytest.raises(ScheduleError, match="deadlock"):
        simulate(grid, programs)


@pytest.mark.parametrize(
    ("name", "grid", "arrows", "message"),
    [
        ("wavefront", Grid(8, 2, sp=2), RMT_ARROWS, "schedule=wavefront: forbidden .* use schedule=segment_major"),
        ("layer_major", Grid(8, 2), ("last_layer",), "schedule=layer_major: forbidden"),
        ("diagonal", Grid(8, 2), ARMT_ARROWS, "schedule=diagonal: unknown; use one of wavefront"),
        ("layer_major", Grid(8, 2, sp=2), ARMT_ARROWS, "sp=2: schedule=layer_major runs a sequence on one rank"),
        ("layer_major", Grid(8, 2, rounds=2), ARMT_ARROWS, "rounds=2: "),
        ("segment_major", Grid(8, 2, sp=2), RMT_ARROWS, "sp=2: schedule=segment_major"),
        ("segment_major", Grid(8, 2, rounds=2), RMT_ARROWS, "rounds=2: "),
        ("wavefront", Grid(7, 2, sp=4, rounds=2), ARMT_ARROWS, "segments=7 is fewer than sp=4 x rounds=2"),
        ("wavefront", Grid(8, 0), ARMT_ARROWS, "layers=0: must be at least 1"),
    ],
)
def test_a_forbidden_schedule_or_grid_is_refused_by_name(name, grid, arrows, message):
    with pytest.raises(ConfigError, match=message):
        build_program(name, grid, 0, arrows)


def test_a_pipeline_that_never_fills_is_a_warning_not_an_error():
    grid = Grid(16, layers=2, sp=8)
    check_grid(grid)
    assert pipeline_warning(grid).startswith("sp=8 > layers x chunks = 2: the pipeline never fills")
    assert f"{efficiency_bound(grid):.0%}" in pipeline_warning(grid)
    assert 1 - simulate_step("wavefront", grid, Costs(rerun_ratio=0.0)).bubble == pytest.approx(2 / 9)


def test_layer_major_gathers_each_layer_once_and_segment_major_once_per_segment():
    grid = Grid(segments=5, layers=3)
    gathers = [sum(i.op is Op.GATHER for i in program) for program in (layer_major(grid), segment_major(grid))]
    assert gathers == [3, 15]


def test_calls_of_any_length_are_kept_once_and_of_few_numbers_of_blocks():
    grid = Grid(37, 3, 4, 2, 2)
    calls = layer_calls("wavefront", grid, 1, ARMT_ARROWS)
    assert calls is layer_calls("wavefront", grid._replace(segments=99), 1, ARMT_ARROWS)
    lengths = [layer_calls("segment_major", Grid(n, 3), 0, RMT_ARROWS) for n in range(1, 20)]
    assert [len(calls) for calls in lengths] == [3 * n for n in range(1, 20)]
    assert cut_calls.cache_info().currsize <= 2


def test_programs_print_short_and_read_like_the_design():
    first, second = wavefront(Grid(2, 1, sp=2, chunks=2), 0), wavefront(Grid(2, 1, sp=2), 1)
    assert ", ".join(map(str, first)) == "GATHER 0 b0, RUN 0.0 b0, SEND 0.0 b0, RUN 0.1 b0, SEND 0.1 b0, RELEASE 0 b0"
    assert ", ".join(map(str, backward_program(second))) == (
        "GATHER 0 b1, RERUN 0.0 b1, BACK 0.0 b1, SEND_GRAD 0.0 b1, REDUCE 0 b1, RELEASE 0 b1"
    )
    assert Instruction("RUN", 0, 0, 0) in first, "the arrows and operations compare equal to their names"


def test_text_timeline():
    report = simulate(Grid(2, 3, sp=2), [wavefront(Grid(2, 3, sp=2), rank) for rank in range(2)])
    assert show(report.events, width=8).splitlines()[:2] == ["rank   0 |001122  |", "rank   1 |..001122|"]


def test_png_timeline(tmp_path):
    plot_timeline(simulate_step("wavefront", Grid(4, 3, sp=2, rounds=2)).events, tmp_path / "timeline.png", "wavefront")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_schedules_need_neither_torch_nor_matplotlib():
    code = "import armt_dist.schedule.simulator, sys; sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
