"""Stages of the curriculum: their learning rates, and when each ends."""

import pytest

from armt_dist.config import ConfigError, validate
from armt_dist.training.checks import check_curriculum, lengths_of
from armt_dist.training.curriculum import Stage, learning_rate, with_steps
from armt_dist.training.progress import Progress, stage_over
from armt_dist.training.run_config import RunConfig


def test_learning_rates():
    stage = Stage(pairs=2, steps=110, warmup_steps=10, schedule="cosine", final=0.1, lr=2.0)
    assert learning_rate(stage, 0, 1.0) == pytest.approx(0.2)
    assert learning_rate(stage, 9, 1.0) == learning_rate(stage, 10, 1.0) == pytest.approx(2.0)
    assert learning_rate(stage, 109, 1.0) == pytest.approx(0.2)
    assert learning_rate(Stage(segments=2, steps=3), 2, 0.5) == 0.5
    linear = Stage(segments=2, steps=3, schedule="linear")
    assert [learning_rate(linear, s, 1.0) for s in range(3)] == [1.0, 0.5, 0.0]


def test_a_stage_ends_by_steps_by_accuracy_or_by_patience():
    stage = Stage(pairs=2, steps=10, until={"accuracy": 0.9, "over": 3})
    progress = Progress(stage_step=5, recent=(0.8, 0.9, 0.95))
    assert not stage_over(stage, progress, None)
    assert stage_over(stage, progress._replace(recent=(0.9, 0.9, 0.9)), None)
    assert not stage_over(stage, progress._replace(recent=(1.0, 1.0)), None), "too few steps to judge"
    assert stage_over(stage, progress._replace(stage_step=10), None)
    assert stage_over(stage, progress._replace(stale=2), 2) and not stage_over(stage, progress._replace(stale=1), 2)


@pytest.mark.parametrize(
    "parallel, stage, segments",
    [
        ({"sp": 4}, {"pairs": 8}, 2),
        ({"sp": 2, "rounds": 2}, {"pairs": 8, "at_least": 0.2}, 3),
        ({"rounds": 9}, {"pairs": 8, "at_least": 1.0}, None),
        ({"sp": 8}, {"pairs": 8, "at_least": 0.9}, None),
    ],
)
def test_a_stage_with_samples_too_short_for_the_ranks_is_found_at_the_start(parallel, stage, segments):
    # A sample of n pairs has n + 1 segments of 4 tokens; stages before the last are checked too.
    stages = [{**stage, "steps": 5}, {"pairs": 20, "at_least": 1.0, "steps": 5}]
    config = validate(RunConfig, {"model": {"base": "x"}, "parallel": parallel, "curriculum": stages})
    lengths = lengths_of(config.data, None)
    if segments is None:
        check_curriculum(config, lengths)
        return
    blocks = parallel["sp"] * parallel.get("rounds", 1)
    says = rf"= {blocks} blocks: curriculum.0 may draw samples of {segments} segments; raise its at_least"
    with pytest.raises(ConfigError, match=says):
        check_curriculum(config, lengths)


def test_the_steps_of_epochs_follow_from_the_set():
    stages = [Stage(segments=2), Stage(segments=2, steps=7), Stage(segments=2, schedule="linear")]
    found = with_steps(stages, 1.5, size=101, global_batch=10)
    assert [stage.total_steps for stage in found] == [16, 7, 16]
    assert learning_rate(found[2], 15, 1.0) == 0.0
    with pytest.raises(ConfigError, match=r"train.epochs=3: .* no finite training set; set curriculum.0.steps"):
        with_steps(stages, 3, None, 10)
    with pytest.raises(ConfigError, match=r"curriculum.0.warmup_steps=9: must be below the 6 steps of train.epochs=2"):
        with_steps([Stage(segments=2, warmup_steps=9)], 2, 30, 10)


@pytest.mark.parametrize(
    "epochs, steps, says",
    [(None, None, "curriculum.0.steps: missing; set it, or train.epochs"), (2, 5, "train.epochs=2")],
)
def test_a_stage_has_steps_or_epochs(epochs, steps, says):
    tree = {"model": {"base": "x"}, "train": {"epochs": epochs}, "curriculum": [{"segments": 1, "steps": steps}]}
    with pytest.raises(ConfigError, match=says):
        validate(RunConfig, tree)
