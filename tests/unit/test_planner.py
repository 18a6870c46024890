"""The planner's arithmetic against facts from elsewhere: published sizes, the schedules themselves, the simulator."""

import json

import pytest
from support.commands import run_script

from armt_dist.config import ConfigError
from armt_dist.runtime.teacher import spans
from armt_dist.schedule import step_memory
from armt_dist.schedule.grid import Grid, prefetch_window
from armt_dist.schedule.hardware import H100, estimate_s
from armt_dist.schedule.model_sizes import MODELS, StepWork, memory_fields, model_sizes, teacher_tokens
from armt_dist.schedule.planner import Layout, candidates, choose, fits, largest_useful_sp, plan, schedule_name
from armt_dist.schedule.program import Op, backward_program, build_program, wavefront
from armt_dist.schedule.simulator import Costs, simulate_step
from armt_dist.schedule.weight_groups import left_over

SMALL, LARGE = MODELS["llama-1b"], MODELS["llama-8b"]


def simulated(model, work, layout, hardware=H100):
    result = plan(model, work, layout, hardware)
    report = simulate_step(schedule_name(model), result.grid, result.costs, model.kind.arrows)
    return plan(model, work, layout, hardware, pipeline_s=report.makespan_s), report


@pytest.mark.parametrize(
    ("name", "published"), [("llama-1b", 1_235_814_400), ("llama-8b", 8_030_261_248), ("gpt2", 124_439_808)]
)
def test_backbones_have_the_published_number_of_parameters(name, published):
    model = MODELS[name]._replace(memory_kind="rmt")
    assert model.parameters == published + model.num_mem_tokens * model.hidden_size


def test_state_and_update_sizes_of_a_1b_model():
    assert SMALL.state_bytes == (384 * 2048 + 384) * 4
    assert 18 < SMALL.state_bytes / SMALL.update_bytes < 22


def test_operations_follow_the_six_parameters_rule():
    work = StepWork(131072)
    plain = LARGE._replace(memory_kind="rmt")
    # Per parameter and token 2 forward, 2 re-run, 4 backward (the head is not re-run); attention and the memory's
    # rows come on top.
    layers, head = plain.num_hidden_layers * plain.layer_parameters, plain.hidden_size * plain.vocab_size
    ratio = plan(plain, work, Layout()).flops / ((8 * layers + 6 * head) * work.sequence_tokens)
    assert 1.0 < ratio < 1.1
    result = plan(LARGE, work, Layout())
    # RMT has its memory rows twice, ARMT reads F x D of a state at every position: about the same.
    assert result.flops == pytest.approx(plan(plain, work, Layout()).flops, rel=0.02)
    assert result.mfu < result.efficiency * H100.kernel_efficiency


def test_a_teacher_costs_a_forward_of_the_base_and_its_hidden_states():
    model = SMALL._replace(freeze_base=True)
    # All at once, so that the teacher is one forward over the tokens; then in windows that overlap by half.
    work = StepWork(4096, segment_tokens=512, micro_batch=4, padded=False)
    without, whole, windows = (plan(model, work._replace(teacher_window=w), Layout()) for w in (0, 4096, 1024))
    assert without.teacher_s == 0 and "teacher" not in [name for name, held in without.gpu_bytes.items() if held]
    forward = without.compute_s / (3 + 1)
    assert 0.7 * forward < whole.teacher_s < 1.3 * forward
    assert whole.step_s - without.step_s == pytest.approx(whole.teacher_s)
    assert teacher_tokens(work._replace(teacher_window=4096)) == 4096
    assert teacher_tokens(work._replace(teacher_window=1024)) == sum(len(span) for span, _ in spans(4096, 1024)) == 7168
    assert teacher_tokens(work._replace(teacher_window=1023)) == sum(len(span) for span, _ in spans(4096, 1023))
    # More tokens, shorter attention, as many logits.
    assert 1.2 < windows.teacher_s / whole.teacher_s < 7168 / 4096
    held = step_memory.phase_bytes(step_memory.Held(model, work._replace(teacher_window=1024), Grid(8, 16), 1, 3))
    assert held["loss head"]["teacher"] == 4 * (7168 + 4096 + 2 * 4096) * 2048 * 2
    # A rank of a group of four reads its part.
    shared = plan(model, work._replace(teacher_window=1024), Layout(sp=4))
    assert shared.teacher_s == pytest.approx(windows.teacher_s / 4, rel=0.01)


def test_layer_major_gathers_the_model_twice_and_rmt_twice_per_segment():
    layers = LARGE.num_hidden_layers * LARGE.layer_parameters * 2
    once = plan(LARGE, StepWork(131072), Layout(dp=4, sp=8)).gather_bytes
    twice = plan(LARGE, StepWork(131072), Layout(dp=4, sp=8, rounds=2)).gather_bytes
    assert once <= 2.2 * LARGE.parameters * 2
    # Norms and W_mb are small enough to stay whole.
    assert twice - once == pytest.approx(2 * layers * 31 / 32, rel=1e-4)
    rmt = LARGE._replace(memory_kind="rmt")
    assert plan(rmt, StepWork(131072), Layout(dp=32)).gather_bytes > 128 * 1.8 * layers * 0.9


@pytest.mark.parametrize("layout", [Layout(2, 4), Layout(1, 4, 2, 2), Layout(1, 8, 1, 4)])
def test_hand_off_bytes_are_those_of_the_schedule(layout):
    work = StepWork(16 * 1024, micro_batch=4)
    result = plan(SMALL, work, layout)
    program = wavefront(result.grid, 1)
    sends = sum(i.op in (Op.SEND, Op.SEND_GRAD) for i in program + backward_program(program))
    assert result.handoff_bytes == sends * result.handoff_unit_bytes
    assert plan(SMALL, work, Layout(8, 1)).handoff_bytes == 0


@pytest.mark.parametrize(
    ("model", "layout", "segments", "micro_batch"),
    [
        (LARGE, Layout(16, 8, 1, 2), 16, 4),
        (SMALL, Layout(1, 4, 2, 4), 16, 4),
        (SMALL, Layout(1, 16, 4, 2), 256, 2),
        (SMALL, Layout(1, 32, 2, 1), 128, 2),
        (LARGE, Layout(16, 1, 1, 1), 12, 2),
        (LARGE, Layout(8, 4, 1, 1), 32, 1),
    ],
)
def test_the_closed_form_agrees_with_the_simulator(model, layout, segments, micro_batch):
    work = StepWork(segments * 1024, micro_batch=micro_batch)
    exact, report = simulated(model, work, layout)
    assert plan(model, work, layout).step_s == pytest.approx(exact.step_s, rel=0.01)
    assert report.peak_live_layers <= exact.window + 1


@pytest.mark.parametrize(("segments", "sp"), [(8, 8), (64, 8), (88, 4)])
def test_weight_gradients_that_are_put_off_shorten_the_pipeline(segments, sp):
    per_cell = StepWork(segments * 1024)
    grouped, layout = per_cell._replace(weight_gradients="grouped"), Layout(4, sp)
    plain, halves = (plan(SMALL, work, layout) for work in (per_cell, grouped))
    exact, _ = simulated(SMALL, grouped, layout)
    assert halves.step_s == pytest.approx(exact.step_s, rel=0.01)
    # Products are not all that a cell does.
    assert 0.3 < halves.costs.weight_ratio < 0.5
    saved = (sp - 1) * left_over(segments // sp) * halves.costs.weight_ratio * halves.costs.cell_s
    assert plain.step_s - halves.step_s == pytest.approx(saved, rel=0.01)
    assert plan(SMALL._replace(freeze_base=True), grouped, layout).costs.weight_ratio == 0


def test_where_gathers_dominate_the_closed_form_is_rougher():
    work, layout, slow = StepWork(8 * 1024), Layout(16, 2, 4), H100._replace(gather_bytes_per_s=50e9)
    exact, report = simulated(SMALL, work, layout, slow)
    assert report.gather_wait_s[0] > 0.1 * report.makespan_s
    assert plan(SMALL, work, layout, slow).step_s == pytest.approx(exact.step_s, rel=0.15)


def test_memory_follows_states_and_offload():
    def items(**options):
        result = plan(LARGE, StepWork(262144, **options), Layout(4, 2))
        return result.gpu_bytes, result.host_bytes

    store, rebuild, recompute = (items(states=name)[0]["states"] for name in ("store", "rebuild", "recompute"))
    assert store == 32 * 128 * LARGE.state_bytes
    assert store > 10 * rebuild > 10 * recompute
    device, host = items()
    assert sum(host.values()) == 0
    assert device["layer inputs H"] == 32 * 128 * (1024 + 16) * 4096 * 2
    assert device["optimizer (shard)"] == 12 * LARGE.parameters / 8
    for flag, item in [("activations", "layer inputs H"), ("parameters", "parameters (shard)")]:
        offloaded, on_host = items(**{f"offload_{flag}": True})
        assert on_host[item] == device[item]
        assert offloaded[item] <= device[item] / 16
    offloaded, on_host = items(offload_optimizer=True)
    assert offloaded["optimizer (shard)"] == 0 < on_host["gradients and optimizer (shard)"]


def test_masks_are_those_that_segments_do_not_share():
    def masks(model=SMALL, chunks=1, **options):
        work = StepWork(64 * 1024, micro_batch=4, **options)
        items = plan(model, work, Layout(1, 1, 1, chunks)).gpu_bytes
        return items["masks"] / (2 * (1024 + 16) ** 2)

    assert masks() == 0 and masks(SMALL._replace(sliding_window=8)) == 1
    # Of the rows of a chunk, each is whole, ends, or is over.
    assert masks(padded=True) == 4 * 9 and masks(padded=True, chunks=4) == 4 * 3
    assert masks(padded=True, packed=True) == 4 * 64


def test_offloaded_inputs_cannot_be_faster_than_the_link_to_the_host():
    slow = H100._replace(host_link_bytes_per_s=1e9)
    work = StepWork(131072, offload_activations=True)
    assert plan(SMALL, work, Layout(), slow).costs.cell_s == pytest.approx(1040 * 2048 * 2 / 1e9)


def test_rounds_cost_gathers_and_whole_gradients_and_buy_efficiency():
    one, four = (plan(LARGE, StepWork(2**20, states="rebuild"), Layout(1, 64, rounds)) for rounds in (1, 4))
    assert four.efficiency > one.efficiency
    assert four.gather_bytes > 3 * one.gather_bytes
    assert four.gpu_bytes["whole gradients"] > 10 * one.gpu_bytes["whole gradients"]


def test_no_layout_is_faster_than_the_chosen_one():
    work, cap = StepWork(2**15), 2**17
    best, layout = choose(SMALL, work, 8, max_step_tokens=cap)
    assert layout.dp * layout.sp == 8
    assert layout.dp * best.micro_batch * best.sequence_tokens <= cap
    chosen, _ = simulated(SMALL, best, layout)
    others = [row for row in candidates(SMALL, work, 8, cap) if fits(plan(SMALL, *row))]
    assert len(others) > 10
    fastest = max(simulated(SMALL, *row)[0].tokens_per_s for row in others)
    assert chosen.tokens_per_s >= 0.98 * fastest


def test_the_choice_shares_a_sequence_only_when_it_must():
    # Where memory allows larger micro-batches, which add to gradients once for all rows.
    assert choose(SMALL, StepWork(2**15, states="rebuild"), 64)[1] == Layout(64, 1, 1, 1)
    work, layout = choose(LARGE, StepWork(2**22, states="rebuild", offload_activations=True), 64)
    assert layout.sp > 1
    assert fits(plan(LARGE, work, layout))
    assert choose(LARGE._replace(memory_kind="rmt"), StepWork(2**15), 8)[1].sp == 1


def test_transformer_xl_hands_on_a_window_and_has_no_memory():
    work, layout = StepWork(16 * 1024), Layout(2, 4)
    memory = {"memory_kind": "transformer_xl", "num_mem_tokens": None, "sliding_window": 0}
    model = SMALL._replace(**memory_fields(memory, work.segment_tokens))
    assert (model.num_mem_tokens, model.sliding_window) == (0, 1024)
    assert model.parameters == 1_235_814_400
    result, report = simulated(model, work, layout)
    # Keys and values of 8 heads of 64, and a mark for each token.
    assert result.handoff_unit_bytes == 1024 * (2 * 8 * 64 + 1) * 4
    assert plan(model, work, layout).step_s == pytest.approx(result.step_s, rel=0.01)
    with pytest.raises(ConfigError, match="num_mem_tokens=4: memory_kind=transformer_xl has no memory tokens; leave"):
        memory_fields({**memory, "num_mem_tokens": 4}, 1024)


@pytest.mark.parametrize(
    ("model", "work", "layout", "message"),
    [
        (SMALL, StepWork(4096, 1000), Layout(), "segment_tokens=1000 does not divide sequence_tokens=4096; try 1024"),
        (SMALL, StepWork(4096, states="keep"), Layout(), "states=keep: unknown; known here: store, rebuild, recompute"),
        (SMALL, StepWork(4096, micro_batch=3), Layout(chunks=4), "chunks=4 is more than micro_batch=3"),
        (SMALL, StepWork(4096), Layout(sp=8), "segments=4 is fewer than sp=8 x rounds=1"),
        (SMALL, StepWork(4096), Layout(dp=0), "dp=0: must be at least 1"),
        (
            SMALL._replace(memory_kind="lstm"),
            StepWork(4096),
            Layout(),
            "memory_kind=lstm: unknown; known here: armt, rmt, transformer_xl",
        ),
        (SMALL._replace(memory_kind="rmt"), StepWork(4096), Layout(sp=2), "sp=2: schedule=segment_major"),
    ],
)
def test_wrong_sizes_are_refused(model, work, layout, message):
    with pytest.raises(ConfigError, match=message):
        plan(model, work, layout)


def test_a_choice_that_cannot_be_made_says_why():
    with pytest.raises(ConfigError, match="gpus=8: .*needs more memory; use more gpus, states=rebuild"):
        choose(LARGE, StepWork(2**24), 8)
    with pytest.raises(ConfigError, match="has more than max_step_tokens=1000; "):
        choose(SMALL, StepWork(2**15), 8, max_step_tokens=1e3)


def test_advice_does_not_repeat_what_is_given():
    work = StepWork(2**24, states="rebuild", offload_activations=True)
    with pytest.raises(ConfigError, match="needs more memory; use more gpus, offload_optimizer or offload_parameters$"):
        choose(MODELS["llama-8b"], work, 1)
    with pytest.raises(ConfigError, match=r"use more gpus$"):
        choose(LARGE, work._replace(offload_optimizer=True, offload_parameters=True, sequence_tokens=2**26), 1)
    done = run_script("plan.py", "--model", "llama-8b", "--gpus", "1", "--sp", "1", "--states", "rebuild")
    assert "does NOT fit; try more gpus, offload_activations, offload_optimizer or offload_parameters\n" in done.stdout


@pytest.mark.parametrize("tokens", [float("nan"), 0.0, -1.0])
def test_a_largest_batch_that_is_no_number_is_refused(tokens):
    with pytest.raises(ConfigError, match=r"^max_step_tokens=.*: expected a number of tokens above 0$"):
        choose(SMALL, StepWork(2**15), 8, max_step_tokens=tokens)


@pytest.mark.parametrize("layout", [Layout(1, 128, 8), Layout(1, 32, 8), Layout(4, 8, 2), Layout(1, 7, 3), Layout(8)])
def test_no_efficiency_is_above_its_bound(layout):
    for work in (StepWork(2**20), StepWork(2**20, states="recompute", micro_batch=4, scored_tokens=1)):
        result, _ = simulated(SMALL, work, layout)
        assert 0 < result.efficiency <= result.bound <= 1 + 1e-9
        estimated = plan(SMALL, work, layout)
        assert estimated.efficiency <= estimated.bound <= 1 + 1e-9


def test_a_pipeline_that_idles_is_chosen_only_where_there_is_no_other():
    for cap in (2**20, 2**21, 2**23):
        work, layout = choose(SMALL, StepWork(2**20, states="rebuild"), 128, max_step_tokens=cap)
        busy = [plan(SMALL, *row) for row in candidates(SMALL, StepWork(2**20, states="rebuild"), 128, cap)]
        assert plan(SMALL, work, layout).bound >= 0.5 or all(each.bound < 0.5 for each in busy if fits(each))


def test_the_largest_useful_sp_fills_its_pipeline_and_fits():
    work = StepWork(2**20, states="rebuild", offload_activations=True)
    assert largest_useful_sp(SMALL, work, Layout(1, 128)) == SMALL.num_hidden_layers
    assert largest_useful_sp(SMALL, work._replace(micro_batch=4), Layout(1, 128, 1, 4)) == 4 * SMALL.num_hidden_layers
    # Whole layers of a wider model fill the memory: 17 of them fit beside the shards, 33 do not.
    wide = LARGE._replace(hidden_size=8192, intermediate_size=28672, num_attention_heads=64)
    assert largest_useful_sp(wide, work, Layout(16, 32)) == 16
    all_wanted, bounded, asked = (
        plan(wide, work, each) for each in (Layout(32, 16), Layout(16, 32), Layout(16, 32, prefetch=32))
    )
    assert fits(all_wanted) and all_wanted.window == all_wanted.wanted_window
    assert fits(bounded) and bounded.window < bounded.wanted_window and bounded.efficiency < all_wanted.efficiency
    more = plan(wide, work, Layout(16, 32, prefetch=bounded.window + 1))
    assert not fits(more) and not fits(asked) and asked.efficiency > bounded.efficiency


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize(("layers", "sp"), [(16, 4), (16, 16), (32, 8), (80, 32)])
def test_fewer_layers_ahead_cost_what_is_simulated(layers, sp, chunks):
    grid = Grid(4 * sp, layers, sp, 1, chunks)
    steps = []
    for window in range(1, prefetch_window(grid) + 1, max(1, sp // 8)):
        costs = Costs(prefetch_layers=window, gather_s=0.01)
        steps.append(estimate_s(grid, costs))
        report = simulate_step("wavefront", grid, costs)
        assert steps[-1] == pytest.approx(report.makespan_s, rel=0.03)
        assert report.peak_live_layers <= window + 2
    assert steps == sorted(steps, reverse=True) and steps[0] > 1.15 * steps[-1]


def test_sizes_from_hugging_face_configs():
    llama = {
        "model_type": "llama", "num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 8192, "tie_word_embeddings": True, "head_dim": 64,
        "vocab_size": 128256,
    }  # fmt: skip
    assert model_sizes(llama, {}) == SMALL._replace(max_position_embeddings=2048)
    gpt2 = {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_inner": None}
    assert model_sizes(gpt2, {"d_mem": 32}) == MODELS["gpt2"]._replace(d_mem=32)
    with pytest.raises(ConfigError, match="model_type=vit: no such backbone"):
        model_sizes({"model_type": "vit"}, {})


def test_the_live_layers_of_the_plan_cover_those_of_the_schedule():
    grid = Grid(8, 32, 8)
    report = simulate_step("wavefront", grid)
    result = plan(LARGE, StepWork(8 * 1024), Layout(1, 8))
    assert result.gpu_bytes["live layers"] >= report.peak_live_layers * LARGE.layer_parameters * 2
    assert build_program("wavefront", result.grid, 3) == wavefront(grid, 3)


def test_command_prints_the_table_and_draws(tmp_path):
    config = {"model_type": "gpt2", "n_layer": 4, "n_embd": 128, "n_head": 4, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run_script(
        "plan.py",
        *("--model", str(tmp_path / "config.json"), "--gpus", "8", "--sp", "8", "--sequence-tokens", "8192"),
        *("--timeline", "--png", str(tmp_path / "timeline.png")),
    )
    assert (done.returncode, done.stderr) == (0, "")
    for wanted in ("dp 1 x sp 8", "fits", "warning: sp=8 > layers x chunks = 4", "rank   7 |"):
        assert wanted in done.stdout
    assert (tmp_path / "timeline.png").stat().st_size > 1000


def test_command_reports_a_mistake_in_one_line():
    done = run_script("plan.py", "--gpus", "8", "--sp", "3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: sp=3 does not divide gpus=8; try sp=1\n"
