"""The watchdog ends a process that stays too long in a section, and leaves its stacks."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from support.paths import ROOT

from armt_dist.config import ConfigError, validate
from armt_dist.monitoring import watchdog
from armt_dist.records import RUN_CONFIG

WATCHED = """
import ctypes, os, sys, time
from pathlib import Path
from armt_dist.config import validate
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
    if out.is_dir():
        (out / RUN_CONFIG).touch()
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


def test_heartbeats_overwrite_one_open_file(tmp_path, monkeypatch):
    (tmp_path / "heartbeat").mkdir()
    file = tmp_path / "heartbeat/rank_3.json"
    file.write_text("{}" + " " * 1000)
    # Nothing beats on its own: there is no run.
    dog = watchdog.Watchdog(validate(watchdog.WatchdogConfig, {}), tmp_path, rank=3)
    opened, real = [], os.open
    monkeypatch.setattr(os, "open", lambda *args, **more: opened.append(args[0]) or real(*args, **more))
    for step in range(3):
        dog.beat(dog.phase._replace(step=step))
        assert json.loads(file.read_text())["step"] == step and len(file.read_bytes()) == watchdog.BEAT_BYTES
    dog.close()
    assert opened == [file]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_the_first_heartbeat_comes_with_the_run_folder_however_long_the_interval(tmp_path):
    body = "dog.config = dog.config.model_copy(update={'heartbeat_s': 60}); time.sleep(0.2); dog.out.mkdir()\n"
    begin = "(dog.out / 'config.yaml').touch(); time.sleep(0.3); dog.close()"
    result, _, _ = watched(tmp_path / "run", body + begin)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run/heartbeat/rank_3.json").exists(), "a short run leaves no heartbeat"


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
with end_when_alone(dog.at, dog.dump, "rank 2 on node1"):
    raise RuntimeError("[gloo] Timed out waiting 600000ms")
"""
    result, stacks, _ = watched(tmp_path, body, before)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1, result.stderr
    assert f"rank 3 on {socket.gethostname()} lost another rank in RUN 2.1 b0" in result.stderr
    assert result.stderr.endswith("ms; it hands states to and from rank 2 on node1\n") and "lost another rank" in stacks


@pytest.mark.parametrize(
    ("reason", "kind"), [("[gloo] Timed out waiting 8000ms", RuntimeError), ("size mismatch", ConfigError)]
)
def test_a_rank_that_is_lost_while_a_model_is_made_is_no_fault_of_its_base(reason, kind, monkeypatch):
    from armt_dist.zero3 import partitioned_model

    def fail(*args, **kwargs):
        raise RuntimeError(reason)

    monkeypatch.setattr(partitioned_model, "start_communication", lambda: None)
    monkeypatch.setattr(partitioned_model.AutoModelForCausalLM, "from_config", fail)
    config = partitioned_model.ModelConfig(base_config={"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1})
    armt = partitioned_model.armt_config(config, {"vocab_size": 8}, 4)
    with pytest.raises(kind, match=reason.replace("[", r"\[").replace("]", r"\]")):
        partitioned_model.build_model(config, armt, {"zero_optimization": {"stage": 3}}, seed=0)


def test_one_line_where_the_limit_runs_out_during_the_report_of_a_lost_rank(tmp_path):
    before = """
import torch.distributed as dist
from armt_dist.monitoring.watchdog import end_when_alone
dist.get_rank = lambda: 3
"""
    body = """
def slow_dump(why):
    time.sleep(1.5)
watchdog.TIMER_LATER_S = 5
dog.enter('step', 1)
with end_when_alone(dog.at, slow_dump):
    raise RuntimeError("[gloo] Timed out waiting 600000ms")
"""
    result, _, _ = watched(tmp_path, body, before)
    assert result.returncode == 1, f"exit code {result.returncode}: {result.stderr}"
    assert len(result.stderr.splitlines()) == 1 and "lost another rank" in result.stderr, result.stderr


def test_heartbeats_of_ranks_that_are_no_more_are_removed(tmp_path):
    """Otherwise a run that was resumed on fewer ranks is planned, and looked at, as one with dead ranks."""
    (tmp_path / "heartbeat").mkdir()
    for name in ("rank_0.json", "rank_1.json", "rank_2.json", "rank_10.json", ".rank_1.tmp"):
        (tmp_path / "heartbeat" / name).touch()
    watchdog.remove_heartbeats(tmp_path, 2)
    assert {file.name for file in (tmp_path / "heartbeat").iterdir()} == {"rank_0.json", "rank_1.json", ".rank_1.tmp"}
