"""Of the ranks of a run that hangs, the one that the others wait for is named."""

import json

import pytest

from armt_dist.config import ConfigError
from armt_dist.monitoring.stuck_ranks import describe, ranges

STACKS = """2026-11-27 08:12:11 pid {old}: rank {rank} spent too long in step, last instruction RUN 0.0 b0 (layer 0)
Thread 0x00007f0000000001 (most recent call first):
  File "/site/threading.py", line 1 in earlier
2026-11-27 08:12:11 pid {pid}: rank {rank} spent more than 3 s in step, last instruction {at} (layer 3)
Thread 0x00007f0000000002 (most recent call first):
  File "/site/armt_dist/monitoring/watchdog.py", line 125 in watch

Thread 0x00007f0000000003 (most recent call first):
  File "/site/torch/distributed/distributed_c10d.py", line 77 in {function}
  File "/site/armt_dist/runtime/handoff.py", line 88 in receive
  File "/site/armt_dist/training/train_step.py", line 99 in train_step
"""
NOW = 1_700_000_000.0


def leave(
    run, rank: int, function: str | None = "wait", at: str = "RECV 0.3 b0", step: int = 7, silent: float = 0
) -> None:
    """What a rank leaves behind; no stacks without a function that it stands in."""
    beat = {"rank": rank, "host": f"node{rank}", "pid": 100 + rank, "section": "step", "step": step, "seconds": 40.0}
    text = json.dumps({**beat, "instruction": at, "time": NOW - silent})
    (run / f"heartbeat/rank_{rank}.json").write_text(text + " " * 200)
    if function:
        content = STACKS.format(rank=rank, old=99, pid=100 + rank, at=at, function=function)
        (run / f"stacks/rank_{rank}.txt").write_text(content)


@pytest.fixture
def run(tmp_path):
    for folder in ("heartbeat", "stacks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "config.yaml").write_text("watchdog: {heartbeat_s: 5}\n")
    return tmp_path


def test_the_rank_that_computes_while_all_others_wait(run):
    for rank in range(6):
        leave(run, rank, "read" if rank == 4 else "wait", "RUN 0.3 b0" if rank == 4 else "REDUCE 3 b0")
    first, odd, others, last = describe(run)
    assert first == f"{run}: 6 ranks stand in 2 places, the odd ones first"
    assert odd.startswith("  rank 4 on node4 (pid 104): in step after step 7 since ") and "RUN 0.3 b0" in odd
    called = "called by receive (armt_dist/runtime/handoff.py:88)"
    assert odd.endswith(f"stands in read (torch/distributed/distributed_c10d.py:77), {called}")
    assert others.startswith("  5 ranks (0-3, 5): ") and "no sign of life" not in others
    assert last == "apart from the others: rank 4 on node4 (pid 104)"


@pytest.mark.parametrize("gone", [{"silent": 60}, {"function": None}], ids=["silent", "no stacks"])
def test_the_rank_that_is_gone_comes_first_wherever_the_others_stand(run, gone):
    for rank in range(4):
        leave(run, rank, at=f"RECV 0.{rank} b0", **(gone if rank == 2 else {}))
    lines = list(describe(run))
    assert lines[1].startswith("  rank 2 on node2 (pid 102): no sign of life since ")
    assert lines[-1] == "apart from the others: rank 2 on node2 (pid 102)"


def test_a_run_that_is_not_stuck_names_nobody(run):
    for rank in range(4):
        leave(run, rank, function=None)
    (only, place) = describe(run)
    assert only == f"{run}: 4 ranks stand in one place" and place.startswith("  4 ranks (0-3): ")
    for rank in range(2):
        leave(run, rank, function=None, step=8)
    assert not any("apart" in line for line in describe(run))


def test_stacks_of_an_earlier_start_and_damaged_files_say_nothing(run):
    for rank in range(3):
        leave(run, rank)
    (run / "stacks/rank_1.txt").write_text((run / "stacks/rank_1.txt").read_text().replace("pid 101", "pid 5"))
    (run / "heartbeat/rank_7.json").write_text("{")
    lines = list(describe(run))
    assert "3 ranks" in lines[0] and "rank 1 on node1" in lines[1] and "no stacks" in lines[1]


def test_a_folder_without_heartbeats(tmp_path):
    with pytest.raises(ConfigError, match="no heartbeat/rank_"):
        list(describe(tmp_path))


def test_ranges():
    assert list(ranges([0, 1, 2, 5, 7, 8])) == ["0-2", "5", "7-8"]
    assert list(ranges([3])) == ["3"] and not list(ranges([]))
