"""What a run tells people: the report, and the notice of the key-blind plateau."""

import json

import pytest
import yaml

from armt_dist.config import ConfigError
from armt_dist.evaluation import run_report as report
from armt_dist.monitoring.plateau import WINDOW, Plateau


def watched(accuracy, steps=WINDOW):
    """A plateau watcher that saw `accuracy(i, guessing)` at 1 to 5 pairs."""
    plateau = Plateau()
    for i in range(steps):
        pairs = i % 5 + 1
        guessing = {1: 1.0, 2: 0.54, 3: 0.40, 4: 0.34, 5: 0.30}[pairs]
        plateau.add(pairs, accuracy(i, guessing), guessing)
    return plateau


def test_a_model_that_is_blind_to_the_key_is_noticed_once():
    plateau = watched(lambda i, guessing: guessing + 0.02 * (-1) ** i, steps=2 * WINDOW)
    line = plateau.notice()
    assert "blind to the key" in line and "2: 0.5" in line and "(0.54)" in line and "\n" not in line
    assert plateau.notice() is None


@pytest.mark.parametrize(
    "accuracy, steps",
    [
        (lambda i, guessing: min(1.0, guessing + 0.1), 2 * WINDOW),
        # Not above guessing yet, but on its way.
        (lambda i, guessing: guessing - 0.3 + 0.3 * i / (2 * WINDOW), 2 * WINDOW),
        (lambda i, guessing: guessing, WINDOW - 1),
    ],
    ids=["it finds the key", "it is still learning", "too early to say"],
)
def test_nothing_is_said_of_a_model_that_learns(accuracy, steps):
    assert watched(accuracy, steps).notice() is None


@pytest.fixture
def run(tmp_path):
    config = {
        "model": {"d_mem": 16},
        "data": {"task": "rewrite"},
        "train": {"seed": 3},
        "curriculum": [{"pairs": 5, "steps": 6}, {"pairs": 10, "steps": 6}],
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "environment.json").write_text(json.dumps({"commit": "abc", "torch": "2.13.0"}))
    records = []
    for step in range(1, 13):
        values = {"loss": 1 / step, "accuracy": step / 12, "tokens": 10 * step, "tokens_per_s": 5.0, "step_s": 2.0}
        records.append({"kind": "train", "step": step, "stage": (step - 1) // 6, **values})
    records.append({"kind": "validation", "step": 12, "loss": 0.125, "accuracy": 0.875})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"half a li')
    return tmp_path


def test_the_report_says_what_was_measured(run):
    text = report.write_run_report(run).read_text()
    assert "12 steps, 120 tokens, 0.4 min" in text and "seed 3" in text and "commit abc" in text
    assert "| 1 | 10 | 7 to 12 |" in text and "0.1250" in text and "0.8750" in text and "d_mem: 16" in text
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")


def test_evaluations_below_the_run_are_in_the_report(run):
    (run / "evaluation").mkdir()
    rows = [{"length": 50, "unit": "pairs", "accuracy": 0.906, "by_segment": [1, 2]}]
    (run / "evaluation/evaluation.json").write_text(json.dumps({"rows": rows}))
    text = report.write_run_report(run).read_text()
    assert "## Evaluation evaluation" in text and "| 50 | pairs | 0.906 |" in text


def test_there_is_nothing_to_report(tmp_path):
    with pytest.raises(ConfigError, match="no readable metrics.jsonl"):
        report.write_run_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="train first"):
        report.write_run_report(tmp_path)
