"""Metrics for TensorBoard and wandb, for which a module stands that records its calls."""

import json
import sys
import threading
import time

import pytest
from support.paths import ROOT

from armt_dist.config import ConfigError, validate
from armt_dist.monitoring import trackers
from armt_dist.monitoring.run_log import RunLog
from armt_dist.monitoring.trackers import Tracked, wandb_settings
from armt_dist.training.checks import check_trackers
from armt_dist.training.run_config import TrainConfig

CONFIG = {"model": {"d_mem": 4}}


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Puts the stand-in into wandb's place; returns a function that reads its calls."""
    file = tmp_path / "calls.jsonl"
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(ROOT / "tests/support/stand_ins")
    monkeypatch.setenv("STAND_IN_CALLS", str(file))
    yield lambda: [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    sys.modules.pop("wandb", None)


def tracked(folder):
    """A run in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return Tracked(folder, 0, CONFIG, print)


def one_run(folder, rank=0, names=("wandb",), code=0, done=0):
    """Log two steps and a validation."""
    folder.mkdir(parents=True, exist_ok=True)
    log = RunLog(folder, rank, 1)
    log.start(done, 10, list(names), CONFIG)
    log.step(done + 1, {"loss": 2.0, "grad_norm": float("nan")}, None)
    log.validation(done + 1, {"loss": 1.5})
    log.step(done + 2, {"loss": 1.0}, None)
    log.finish(code)


def test_wandb_gets_the_metrics_at_their_steps(calls, tmp_path):
    one_run(tmp_path / "group/first", names=("wandb", "wandb"))
    setup, init, *metrics, one, validation, two, finish = calls()
    assert setup == {"call": "setup", "silent": True} and init["call"] == "init" and init["config"] == CONFIG
    assert [(call["name"], call["step_metric"]) for call in metrics] == [("step", None), ("*", "step")]
    assert one["values"] == {"step": 1, "train/loss": 2.0}, "a number that is not finite has no value"
    assert validation["values"] == {"step": 1, "validation/loss": 1.5}
    assert two["values"] == {"step": 2, "train/loss": 1.0} and finish["exit_code"] == 0
    assert not (tmp_path / "group/first/tensorboard").exists()


def test_a_run_that_resumes_goes_on_in_the_same_run(calls, tmp_path):
    one_run(tmp_path / "first", code=75)
    one_run(tmp_path / "first", done=2)
    one_run(tmp_path / "second")
    first, again, other = (call["settings"]["run_id"] for call in calls() if call["call"] == "init")
    assert first == again != other
    assert [call["exit_code"] for call in calls() if call["call"] == "finish"] == [75, 0, 0]


def test_only_what_is_asked_for_and_only_on_rank_0(calls, tmp_path):
    one_run(tmp_path / "other", rank=1)
    one_run(tmp_path / "none", names=())
    one_run(tmp_path / "board", names=("tensorboard",))
    assert not calls() and "wandb" not in sys.modules and not list((tmp_path / "other").iterdir())
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["metrics.jsonl"]
    assert list((tmp_path / "board/tensorboard").iterdir())


def test_variables_win(tmp_path, monkeypatch):
    for name in ("PROJECT", "NAME", "RUN_ID", "DIR", "RESUME", "SILENT", "MODE"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    run = tracked(tmp_path / "a#b/first")
    found = wandb_settings(run)
    assert (found["project"], found["run_name"], found["root_dir"]) == ("a-b", "first", str(run.folder))
    assert wandb_settings(run)["run_id"] == found["run_id"] and found["resume"] == "allow"
    for name, value in {"PROJECT": "p", "NAME": "n", "RUN_ID": "chosen", "DIR": "d", "CONSOLE": "wrap"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    assert wandb_settings(run).keys() == found.keys() - {"project", "run_name", "run_id", "root_dir", "console"}
    monkeypatch.delenv("WANDB_RUN_ID")
    assert wandb_settings(run)["run_id"] == "chosen", "a resume without the variable goes on in the same run"


@pytest.mark.parametrize("kept", ["{", '{"id": 3}', '{"id": "../x"}', "[]"])
def test_an_id_that_is_damaged_is_replaced(kept, tmp_path):
    run = tracked(tmp_path)
    (tmp_path / trackers.WANDB_ID).write_text(kept)
    found = wandb_settings(run)["run_id"]
    assert len(found) == 32 and wandb_settings(run)["run_id"] == found


def test_what_cannot_be_sent_is_kept(calls, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STAND_IN_FAILS", "online")
    one_run(tmp_path / "run")
    first, second = (call["settings"] for call in calls() if call["call"] == "init")
    assert second == {**first, "mode": "offline"} and calls()[-1]["call"] == "finish"
    assert sum(call["call"] == "log" for call in calls()) == 3
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(lines) == 1 and "wandb: cannot start online; the metrics are kept in" in lines[0]


def test_a_start_that_fails_is_a_warning(calls, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STAND_IN_FAILS", "online offline")
    one_run(tmp_path / "run")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert lines[1:] == ["warning: wandb: cannot start offline; the run continues without it"]
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 3


def test_the_run_does_not_wait_for_wandb(tmp_path, monkeypatch, capsys):
    ended = threading.Event()
    monkeypatch.setattr(trackers, "start_wandb", lambda run: ended.wait(20))
    monkeypatch.setattr(trackers, "CLOSE_S", 0.2)
    monkeypatch.setattr(trackers, "WAITING", 2)
    before = time.monotonic()
    one_run(tmp_path / "run")
    assert time.monotonic() - before < 5
    ended.set()
    for thread in threading.enumerate():
        if thread.name == "wandb":
            thread.join(20)
    assert "warning: wandb was too slow, and lacks records of metrics.jsonl" in capsys.readouterr().err


def test_wandb_is_asked_for_where_it_is_missing(calls, tmp_path, monkeypatch):
    check_trackers(["wandb"])
    says = r"train.trackers=wandb: needs the package wandb; install it with: pip install 'wandb>=0.31,<0.32', or leave"
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_trackers(["tensorboard"])
    with pytest.raises(ConfigError, match=says):
        check_trackers(["wandb"])
    # Not a package, but what wandb writes.
    monkeypatch.delitem(sys.modules, "wandb")
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match=says):
        check_trackers(["wandb"])


def test_names():
    assert TrainConfig().trackers == ["tensorboard"]
    with pytest.raises(ConfigError, match=r"trackers.0=mlflow: Input should be 'tensorboard' or 'wandb'") as error:
        validate(TrainConfig, {"trackers": ["mlflow"]})
    assert "\n" not in str(error.value)
