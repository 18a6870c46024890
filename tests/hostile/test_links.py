"""Links and special files in a stranger's run folder, into which a run that resumes would write."""

import os

import pytest
from support.commands import run_script
from support.paths import FP32

from armt_dist.config import ConfigError
from armt_dist.evaluation.run_report import write_run_report
from armt_dist.records import check_links

# All that a run writes by itself.
WRITTEN = (
    *(
        "config.yaml",
        "ds_config.json",
        "environment.json",
        "texts.json",
        "changes.jsonl",
        "metrics.jsonl",
        "report.md",
        "report.png",
    ),
    *("model", "model/config.json", "checkpoints", "checkpoints/latest", "checkpoints/.latest.tmp", "lease"),
    *("checkpoints/staging-step_00000002", "stacks/rank_0.txt", "heartbeat/rank_0.json", "digests/rank_0.jsonl"),
    *("tensorboard", "profile", "wandb", "wandb.json", "wandb/latest-run"),
)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_link_is_refused_and_its_target_untouched(name, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("mine")
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(victim / "file" if "." in name else victim)
    with pytest.raises(ConfigError, match=f"out={tmp_path}/run: {name} is a link"):
        check_links(tmp_path / "run")
    with pytest.raises(ConfigError, match="is a link"):
        write_run_report(tmp_path / "run")
    assert (victim / "file").read_text() == "mine" and [path.name for path in victim.iterdir()] == ["file"]


def test_the_links_that_wandb_makes_to_its_logs_are_its_own(tmp_path):
    (tmp_path / "wandb/run-1/logs").mkdir(parents=True)
    (tmp_path / "wandb/run-1/logs/debug-core.log").symlink_to(tmp_path / "log")
    check_links(tmp_path)
    (tmp_path / "wandb/run-1").rename(tmp_path / "run-1")
    with pytest.raises(ConfigError, match="run-1/logs/debug-core.log is a link"):
        check_links(tmp_path)


def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(ConfigError, match="metrics.jsonl is no regular file; remove it"):
        check_links(tmp_path)


def test_a_run_does_not_start_there(tmp_path):
    """The folder itself may be reached by a link."""
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "real").mkdir()
    (tmp_path / "real/metrics.jsonl").symlink_to(tmp_path / "victim")
    (tmp_path / "run").symlink_to(tmp_path / "real")
    result = run_script("train.py", "--ds_config", FP32, "--out", tmp_path / "run", "ds_config.train_batch_size=4")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert "metrics.jsonl is a link, and what is written there would land elsewhere" in result.stderr
    assert (tmp_path / "victim").read_text() == "mine" and os.listdir(tmp_path / "real") == ["metrics.jsonl"]


def test_a_file_that_another_rank_removes_meanwhile(tmp_path, monkeypatch):
    (tmp_path / "rank_2.txt").touch()
    walk = os.walk

    def walk_and_remove(folder):
        for found in walk(folder):
            (tmp_path / "rank_2.txt").unlink(missing_ok=True)
            yield found

    monkeypatch.setattr("armt_dist.records.os.walk", walk_and_remove)
    check_links(tmp_path)
