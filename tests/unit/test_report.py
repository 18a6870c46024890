"""What a run tells people: the report, and the notice of the key-blind plateau; and what a resumed run keeps of it."""

import json
from random import Random

import pytest
import yaml

from armt_dist import records as metrics
from armt_dist.config import ConfigError
from armt_dist.evaluation import run_report as report
from armt_dist.evaluation.run_history import LAST, POINTS, History, Thinned
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


def random_metrics(seed):
    """Records of up to 300 steps in stages, some validated."""
    draw, records, stage = Random(seed), [], 0
    for step in range(1, draw.randint(2, 300)):
        stage += draw.random() < 0.02
        values = {"loss": draw.choice([draw.random(), None]), "tokens": step, "step_s": draw.random()}
        records.append({"kind": "train", "step": step, "stage": stage, **values})
        if draw.random() < 0.05:
            records.append({"kind": "validation", "step": step, "loss": draw.random()})
    return records


@pytest.mark.parametrize("seed", range(20))
def test_a_history_is_what_all_records_at_once_say(seed):
    records = random_metrics(seed)
    training, validation = ([r for r in records if r["kind"] == kind] for kind in ("train", "validation"))
    found = History(iter(records), ["loss", "accuracy"])
    assert found.last == training[-1] and found.seconds == sum(r["step_s"] for r in training)
    assert found.training["loss"].y == [r["loss"] or 0.0 for r in training] and not found.training["accuracy"].x
    assert found.validation["loss"].x == [r["step"] for r in validation]
    assert found.validation["loss"].y == [r["loss"] for r in validation]
    assert [number for number, _ in found.by_stage()] == sorted({r["stage"] for r in training})
    for number, stage in found.by_stage():
        steps = [r for r in training if r["stage"] == number]
        inside = [r for r in validation if steps[0]["step"] <= r["step"] <= steps[-1]["step"]]
        assert (stage.first, stage.last) == (steps[0]["step"], steps[-1]["step"])
        assert list(stage.losses) == [r["loss"] or 0.0 for r in steps[-LAST:]]
        assert stage.validation == (inside[-1] if inside else {})


def test_a_validation_that_a_rollback_undid_is_not_the_stages():
    steps = [{"kind": "train", "step": step, "stage": 0, "loss": 1.0, "step_s": 1.0} for step in (1, 2, 1)]
    found = History([*steps[:2], {"kind": "validation", "step": 2, "loss": 5.0}, steps[2]], ["loss"])
    assert found.stages[0].validation == {}


@pytest.mark.parametrize("count", [1, POINTS, 2 * POINTS, 2 * POINTS + 1, 12_345])
def test_a_long_curve_is_a_few_means_of_neighbours(count):
    curve = Thinned()
    for i in range(count):
        curve.add(i, 2 * i)
    assert len(curve.points) <= 2 * POINTS and sum(point.values for point in curve.points) == count
    assert len(curve.points) > POINTS / 2 or curve.size == 1
    assert {point.values for point in curve.points[:-1]} <= {curve.size} and curve.x[-1] == count - 1
    for y, point in zip(curve.y, curve.points, strict=True):
        assert y == pytest.approx(2 * point.x - (point.values - 1))


# --- metrics.jsonl at a resume -------------------------------------------------------------------------------------


def lines(records):
    """A file of records."""
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize("block", [7, 64, 2**16])
@pytest.mark.parametrize("seed", range(5))
def test_a_resumed_run_keeps_the_records_of_the_steps_that_were_made(seed, block, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", block)
    records = random_metrics(seed)
    for done in (0, 1, records[-1]["step"] // 2, records[-1]["step"], 1000):
        # A run that was killed may have left half a line, or one without its end.
        for tail in ("", '{"kind": "tr', "\0" * 100):
            (tmp_path / "metrics.jsonl").write_text(lines(records) + tail)
            metrics.cut_metrics(tmp_path, done)
            kept = [record for record in records if record["step"] <= done]
            assert (tmp_path / "metrics.jsonl").read_text() == lines(kept)
        (tmp_path / "metrics.jsonl").write_text(lines(records)[:-1])
        metrics.cut_metrics(tmp_path, done)
        assert (tmp_path / "metrics.jsonl").read_text() == lines(kept)


def test_what_a_rollback_undid_stays_before_the_steps_that_took_its_place(tmp_path):
    train = [{"kind": "train", "step": step} for step in (1, 2, 3, 4)]
    records = [*train, {"kind": "rollback", "step": 4, "to": 2}, *train[2:]]
    for done, kept in ((4, 7), (3, 6), (2, 2)):
        (tmp_path / "metrics.jsonl").write_text(lines(records))
        metrics.cut_metrics(tmp_path, done)
        assert (tmp_path / "metrics.jsonl").read_text() == lines(records[:kept])


def test_the_beginning_of_the_metrics_is_neither_read_nor_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("no record }\n" * 100_000 + lines([{"step": 1}, {"step": 2}]))
    inode = path.stat().st_ino
    metrics.cut_metrics(tmp_path, 1)
    assert path.read_text().endswith(lines([{"step": 1}])) and path.stat().st_ino == inode


def test_metrics_that_are_none_are_left_alone(tmp_path):
    metrics.cut_metrics(tmp_path, 1)
    assert not list(tmp_path.iterdir())
    (tmp_path / "metrics.jsonl").write_text("my { notes }\n")
    with pytest.raises(ConfigError, match=r"^run=.*no readable metrics\.jsonl"):
        metrics.cut_metrics(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == "my { notes }\n"
