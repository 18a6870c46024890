"""When something goes wrong: stuck ranks, bad numbers, runs that should be equal and are not."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.faults import Plant, start
from support.golden import load_case, load_model

from armt_dist.config import ConfigError, validate
from armt_dist.monitoring import state_digests as digest
from armt_dist.monitoring.bad_steps import Rollback, spiked, weigh
from armt_dist.monitoring.smallest_read import SmallestRead
from armt_dist.monitoring.state_digests import Key, first_difference
from armt_dist.monitoring.step_metrics import Stragglers, cell_s, slowest
from armt_dist.runtime.executor import ScheduledLM
from armt_dist.runtime.piece import cut_piece
from armt_dist.schedule.grid import Grid
from armt_dist.schedule.program import Instruction, Op
from armt_dist.schedule.timeline import Event
from armt_dist.training.progress import Progress

ROOT = Path(__file__).parents[2]
FP32 = ROOT / "ds_configs/zero3_fp32.json"
CPU = torch.device("cpu")
# Samples of one length, so that every step has the same cells; dropout, so that generators matter.
SHORT = [
    "model.base_config.resid_pdrop=0.1",
    "ds_config.train_batch_size=6",
    "curriculum.0.at_least=1.0",
    "curriculum.0.warmup_steps=0",
    "train.log_every=2",
    "watchdog.heartbeat_s=0.2",
]


class Ended:
    """A run without a launcher: exit codes and output by rank."""

    def __init__(self, ranks, timeout_s=120):
        try:
            self.out, self.err = zip(*(rank.communicate(timeout=timeout_s) for rank in ranks), strict=True)
        finally:
            for rank in ranks:
                rank.kill()
        self.codes = [rank.returncode for rank in ranks]


def run(out, world, *arguments, plants=()):
    """One run to its end."""
    return Ended(start(world, ["--ds_config", FP32, "--out", out, *SHORT, *arguments], plants))


def records(out, kind="train"):
    """The records of one kind in metrics.jsonl."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if record["kind"] == kind]


def curve(out):
    return [(record["loss"], record["grad_norm"]) for record in records(out)]


# --- watchdog --------------------------------------------------------------------------------------------------------

WATCHED = """
import ctypes, os, sys, time
from pathlib import Path
from armt_dist.monitoring import watchdog
from armt_dist.config import validate
from armt_dist.schedule.program import Instruction, Op
watchdog.POLL_S, watchdog.TIMER_LATER_S = 0.05, 0.5
limits = {"setup_s": 0.7, "step_s": 0.4, "validation_s": 0.4, "checkpoint_s": 0.4, "heartbeat_s": 0.1}
dog = watchdog.Watchdog(validate(watchdog.WatchdogConfig, limits), Path(sys.argv[1]), rank=3)
dog.at = lambda: Instruction(Op.RUN, 2, 0, 1)

def wait_for_ever():
    time.sleep(20)

def hold_the_interpreter():
    ctypes.PyDLL(None).sleep(20)

"""


def watched(out, body, before=""):
    """A process that does `body` under a watchdog: its end, its stacks if there are any, and how long it lived."""
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", before + WATCHED + body, out], capture_output=True, text=True, cwd=ROOT
    )
    stacks = out / "stacks/rank_3.txt"
    return result, stacks.read_text() if stacks.exists() else None, time.monotonic() - began


@pytest.mark.parametrize(
    ("body", "section", "limit"),
    [
        ("wait_for_ever()", "setup", "0.7"),
        # The first two steps may take as long as the set-up.
        ("dog.enter('step', 0); time.sleep(0.5); dog.enter('step', 1); wait_for_ever()", "step", "0.7"),
        ("[dog.enter('step', i) for i in range(3)]; wait_for_ever()", "step", "0.4"),
        ("dog.enter('step', 7); dog.enter('checkpoint', 7); wait_for_ever()", "checkpoint", "0.4"),
    ],
)
def test_who_stays_too_long_in_a_section_ends_with_stacks(tmp_path, body, section, limit):
    result, stacks, seconds = watched(tmp_path, body)
    assert result.returncode == 1 and seconds < 10
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: rank 3 spent more than {limit} s in {section}") and "RUN 2.1 b0 (layer 2)" in line
    assert "wait_for_ever" in stacks and "RUN 2.1 b0" in stacks and section in stacks


def test_who_holds_the_interpreter_ends_too(tmp_path):
    result, stacks, seconds = watched(tmp_path, "hold_the_interpreter()")
    assert result.returncode == 1 and seconds < 10
    assert stacks.startswith("Timeout") and "hold_the_interpreter" in stacks


def test_who_is_aborted_leaves_stacks(tmp_path):
    result, stacks, _ = watched(tmp_path, "os.abort()")
    assert result.returncode == -signal.SIGABRT
    assert "Aborted" in stacks and "<module>" in stacks


def test_who_is_done_in_time_leaves_nothing_but_a_heartbeat(tmp_path):
    body = "dog.enter('validation', 5); time.sleep(0.3); dog.close(); time.sleep(1)"
    result, stacks, _ = watched(tmp_path, body)
    assert (result.returncode, result.stderr, stacks) == (0, "", None)
    beat = json.loads((tmp_path / "heartbeat/rank_3.json").read_text())
    assert (beat["section"], beat["step"], beat["instruction"]) == ("validation", 5, "RUN 2.1 b0")
    assert beat["time"] == pytest.approx(time.time(), abs=30)


def test_nothing_is_written_where_there_is_no_run_folder(tmp_path):
    result, stacks, _ = watched(tmp_path / "none", "time.sleep(0.3); dog.close()")
    assert result.returncode == 0 and not (tmp_path / "none").exists()
    # A stuck rank makes it: its stacks must go somewhere.
    _, stacks, _ = watched(tmp_path / "none", "wait_for_ever()")
    assert "wait_for_ever" in stacks


def test_who_lost_another_rank_leaves_stacks(tmp_path):
    before = """
import torch.distributed as dist
from armt_dist.monitoring.watchdog import end_when_alone
dist.get_rank = lambda: 3
"""
    body = """
with end_when_alone(dog.at, dog.dump):
    raise RuntimeError("[gloo] Timed out waiting 600000ms")
"""
    result, stacks, _ = watched(tmp_path, body, before)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1, result.stderr
    assert "lost another rank in RUN 2.1 b0" in result.stderr and "lost another rank" in stacks


def heartbeats(out, world):
    """What each rank says of itself; nothing of those that said nothing yet."""
    files = [out / f"heartbeat/rank_{rank}.json" for rank in range(world)]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def test_a_stopped_rank_leaves_no_other_waiting(tmp_path):
    """SIGSTOP: the stopped rank's sockets stay open, so only time tells."""
    out, limit_s = tmp_path / "run", 3
    limits = [f"watchdog.step_s={limit_s}", "watchdog.setup_s=60", "parallel.timeout_s=300"]
    ranks = start(3, ["--ds_config", FP32, "--out", out, *SHORT, *limits, "parallel.sp=3"])
    try:
        deadline = time.monotonic() + 60
        while min([beat["step"] for beat in heartbeats(out, 3)] or [0]) < 3:
            assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks), "it never began"
            time.sleep(0.1)
        assert {beat["pid"] for beat in heartbeats(out, 3)} == {rank.pid for rank in ranks}
        ranks[1].send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        assert [ranks[i].wait(timeout=30) for i in (0, 2)] == [1, 1]
        # A step that was under way counts from its beginning; then the thread's poll, and this machine's load.
        assert time.monotonic() - stopped < limit_s + 4
        assert ranks[1].poll() is None
        ranks[1].send_signal(signal.SIGCONT)
    finally:
        ended = Ended(ranks, timeout_s=30)
    # Its own time has run out as well, if it does not first notice that it is alone.
    assert ended.codes[1] == 1
    for i in (0, 2):
        lines = [line for line in ended.err[i].splitlines() if line.startswith("error")]
        assert len(lines) == 1 and "Traceback" not in ended.err[i], ended.err[i]
        assert lines[0].startswith(f"error: rank {i} ") and "layer" in lines[0]
        stacks = (out / f"stacks/rank_{i}.txt").read_text()
        assert "train_step" in stacks and "instruction" in stacks


# --- bad numbers -----------------------------------------------------------------------------------------------------


def test_only_a_bad_loss_changes_its_gradients():
    factor = torch.tensor(0.37)
    for value in (3.0, -0.0, math.inf, math.nan):
        nll = torch.tensor(value, requires_grad=True)
        weighed = weigh(nll, factor)
        weighed.backward()
        if math.isfinite(value):
            assert weighed.item() == (nll * factor).item() and nll.grad == factor
        else:
            assert nll.grad.isnan()


def test_a_loss_spikes_against_the_median_of_enough_steps():
    rollback = Rollback(factor=2.0, over=3)
    assert spiked(2.1, [1.0, 9.0, 1.0], rollback) and not spiked(2.0, [1.0, 9.0, 1.0], rollback)
    assert not spiked(2.1, [1.0, 1.0], rollback), "too few steps to tell"
    assert not spiked(2.1, [1.0, 1.0, 1.0, 3.0, 3.0], rollback), "steps too long ago"
    assert not spiked(100.0, [1.0] * 9, None)
    with pytest.raises(ConfigError, match="factor"):
        validate(Rollback, {"factor": 1.0})


def test_progress_counts_what_was_skipped_and_survives_json():
    step = {"accuracy": 0.5, "tokens": 10, "seconds": 1.0, "window": 2}
    progress = Progress().after_step(**step).after_loss(1.0, 2).after_step(**step).after_loss(2.0, 2)
    progress = progress.after_step(**step).after_loss(3.0, 2).after_step(**step).after_skip()
    assert (progress.losses, progress.skipped, progress.skipped_in_a_row) == ((2.0, 3.0), 1, 1)
    assert progress.after_step(**step).after_loss(1.0, 0).skipped_in_a_row == 0
    assert Progress.restored(json.loads(json.dumps(progress._asdict()))) == progress
    assert progress._replace(passed_over=3).batch == progress.step + 3 and progress.next_stage().losses == ()


@pytest.fixture(scope="module")
def bad_numbers(tmp_path_factory):
    """A run with bad batches; one without those batches; that one again with a memory that is slightly off."""
    root = tmp_path_factory.mktemp("bad")
    # No dropout: it draws in a skipped step too.
    same = ["deterministic=true", "digests=true", "ds_config.train_batch_size=8", "model.base_config.resid_pdrop=0.0"]
    planted = [
        Plant("nan", step=4, rank=1),
        Plant("loss", step=6, rank=0, size=math.inf),
        Plant("slow", rank=1, size=0.05),
    ]
    left_out = [Plant("without", step=6), Plant("without", step=4)]
    off = [*left_out, Plant("write", step=5, segment=3, layer=1, size=1e-6)]
    ends = {
        "planted": run(root / "planted", 2, *same, "train.max_steps=8", plants=planted),
        "left_out": run(root / "left_out", 2, *same, "train.max_steps=6", plants=left_out),
        "off": run(root / "off", 2, *same, "train.max_steps=6", plants=off),
    }
    for name, ended in ends.items():
        assert ended.codes == [0, 0], (name, ended.err)
    return root, ends


def test_all_ranks_skip_a_bad_step_as_if_its_batch_had_never_been(bad_numbers):
    """A NaN in rank 1's activations, then an infinite loss with finite gradients on rank 0."""
    root, _ = bad_numbers
    found, expected = curve(root / "planted"), curve(root / "left_out")
    assert [i for i, step in enumerate(found, 1) if None in step] == [4, 6]
    # Bit for bit, so neither weights nor Adam's moments and count nor left-over gradients had any part of it.
    assert [step for step in found if step != (None, None)] == expected and len(expected) == 6


def test_a_skipped_step_is_logged_with_its_samples(bad_numbers):
    root, ends = bad_numbers
    first, second = records(root / "planted", "skipped")
    # Of eight rows rank 0 has the first four.
    assert (first["step"], first["batch"], first["rows"]) == (4, 3, [4, 5, 6, 7])
    assert (second["step"], second["batch"], second["rows"]) == (6, 5, [0, 1, 2, 3])
    assert len(first["sample_ids"]) == 4
    assert [record["skipped"] for record in records(root / "planted")] == [0, 0, 0, 1, 1, 2, 2, 2]
    said = [line for line in ends["planted"].out[0].splitlines() if "was skipped" in line]
    assert len(said) == 2 and "rows 4, 5, 6, 7" in said[0]
    assert "was skipped" not in ends["planted"].out[1]


def test_the_slow_rank_is_named(bad_numbers):
    root, ends = bad_numbers
    found = [record for record in records(root / "planted") if record["straggler_rank"] == 1]
    assert len(found) == 8 and all(record["slowest_over_median"] > 1.5 for record in found)
    assert "rank 1 is a straggler" in ends["planted"].err[0]


def test_the_smallest_read_is_a_metric_now_and_then(bad_numbers):
    root, _ = bad_numbers
    found = {record["step"]: record.get("min_zq") for record in records(root / "left_out")}
    assert [step for step, value in found.items() if value is not None] == [2, 4, 6]
    assert all(0 < value < 10 for value in found.values() if value is not None)


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory):
    """A run that rolls back once and later gives up; and one whose data never had the batches in question."""
    root = tmp_path_factory.mktemp("back")
    same = ["train.save_every=3", "train.rollback.factor=3", "train.rollback.over=3", "train.max_skipped=3"]
    jump = Plant("loss", step=8, size=1000.0)
    planted = [jump, *(Plant("nan", step=step) for step in (12, 13, 14))]
    left_out = [Plant("without", step=8), Plant("without", step=7)]
    ends = {
        "planted": run(root / "planted", 1, *same, "train.max_steps=20", plants=planted),
        "left_out": run(root / "left_out", 1, *same, "train.max_steps=9", plants=left_out),
    }
    assert ends["left_out"].codes == [0], ends["left_out"].err
    return root, ends


def test_a_jump_of_the_loss_rolls_back_past_its_batch(rolled_back):
    root, ends = rolled_back
    (record,) = records(root / "planted", "rollback")
    # The checkpoint of step 6; batches 7 and 8 are left out.
    assert (record["step"], record["to"], record["passed_over"]) == (8, 6, 2)
    steps = [entry["step"] for entry in records(root / "planted")]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8, 7, 8, 9, 10, 11, 12]
    found = curve(root / "planted")
    assert found[:6] + found[8:11] == curve(root / "left_out"), "not the run without those batches"
    assert "back to step_00000006" in ends["planted"].out[0]


def test_bad_steps_in_a_row_end_the_run_with_the_last_good_checkpoint(rolled_back):
    root, ends = rolled_back
    ended = ends["planted"]
    assert ended.codes == [1] and "Traceback" not in ended.err[0]
    (line,) = [line for line in ended.err[0].splitlines() if line.startswith("error")]
    assert "3 steps in a row" in line and line.endswith(str(root / "planted/checkpoints/step_00000009"))
    assert (root / "planted/checkpoints/step_00000009/manifest.json").exists()
    assert [record["skipped"] for record in records(root / "planted")[-3:]] == [1, 2, 3]


# --- determinism and digests -----------------------------------------------------------------------------------------


def test_two_runs_are_equal_to_the_bit_until_one_is_disturbed(bad_numbers):
    root, _ = bad_numbers
    command = [sys.executable, "-m", "armt_dist.digest", root / "left_out", root / "off"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1 and result.stderr == ""
    # All 4 steps before, and all cells of step 5 that do not depend on the disturbed one, are equal.
    assert result.stdout.startswith("first difference: step 5, segment 3, layer 1 ")
    equal, disturbed = curve(root / "left_out"), curve(root / "off")
    assert equal[:4] == disturbed[:4] and equal[4:] != disturbed[4:]


def test_runs_without_a_difference(bad_numbers, tmp_path):
    root, _ = bad_numbers
    a, b = digest.read_digests(root / "left_out"), digest.read_digests(root / "left_out")
    steps, segments, layers, rows = (sorted({key[i] for key in a}) for i in range(4))
    assert (steps, layers, rows) == ([1, 2, 3, 4, 5, 6], [0, 1], [0, 4])
    assert len(a) == 6 * len(segments) * 2 * 2 and first_difference(a, b) is None
    with pytest.raises(ConfigError, match="digests=true"):
        digest.read_digests(tmp_path)


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


# --- stragglers ------------------------------------------------------------------------------------------------------


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
