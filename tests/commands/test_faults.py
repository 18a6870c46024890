"""Faults planted in a run: stuck ranks, non-finite losses, jumps of the loss, a slow rank, a disturbed memory."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest
from support.commands import records
from support.faults import Plant, start
from support.paths import FP32, ROOT

from armt_dist.config import ConfigError
from armt_dist.monitoring import state_digests as digest
from armt_dist.monitoring.state_digests import first_difference
from armt_dist.monitoring.stuck_ranks import describe

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


def curve(out):
    """Loss and gradient norm of every training step, repeated ones included."""
    return [(record["loss"], record["grad_norm"]) for record in records(out)]


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
        assert list(describe(out))[-1].startswith("apart from the others: rank 1 on ")
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
    assert "skipped 3 consecutive optimizer steps" in line and line.endswith(
        str(root / "planted/checkpoints/step_00000009")
    )
    assert (root / "planted/checkpoints/step_00000009/manifest.json").exists()
    assert [record["skipped"] for record in records(root / "planted")[-3:]] == [1, 2, 3]


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


@pytest.mark.parametrize("what", ["memory", "defect"])
def test_the_cause_is_what_is_shown_first(what, tmp_path):
    """One rank of two fails; nothing that it would wait for comes before its words, and the other ends as well."""
    began = time.monotonic()
    settings = ["train.max_steps=4", "parallel.timeout_s=300", "ds_config.train_batch_size=8"]
    ended = run(tmp_path / "run", 2, *settings, plants=[Plant(what, step=2, rank=1)])
    assert ended.codes == [1, 1] and time.monotonic() - began < 60
    first = ended.err[1].splitlines()
    if what == "defect":
        assert "Traceback" in ended.err[1] and first[-1] == "KeyError: 'a planted defect'"
        return
    (line,) = [line for line in first if line.startswith("error")]
    assert line.startswith("error: rank 1: out of memory in BACK") and "2.00 GiB more were wanted" in line
    assert "planned were" in line and "Traceback" not in ended.err[1]
    assert all(setting in line for setting in ("bptt.states=rebuild", "train_micro_batch_size_per_gpu=2", "GB)"))
