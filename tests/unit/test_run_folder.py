"""What a run records about itself, and what it refuses when it resumes."""

import json
from types import SimpleNamespace

import pytest

from armt_dist.config import ConfigError, validate
from armt_dist.data.text.files import TextFacts
from armt_dist.files import write_atomically
from armt_dist.training.run_config import RunConfig, as_yaml
from armt_dist.training.run_folder import CHANGES, check_same, check_texts, environment, record_changes, write_texts


def task_with(train, validation):
    """A task that has read texts of these names."""
    facts = {"train": train, "validation": validation}
    texts = {split: [TextFacts(name, 1, f"hash of {name}") for name in names] for split, names in facts.items()}
    return SimpleNamespace(texts=lambda: texts)


def test_a_text_that_changes_sides_is_refused(tmp_path):
    write_texts(tmp_path, task_with(["a", "b"], ["c"]))
    check_texts(tmp_path, task_with(["a", "b", "new"], ["c", "newer"]))
    # A text that is missing for a while is not forgotten.
    write_texts(tmp_path, task_with(["b", "new"], ["c"]))
    for train, validation, message in (
        (["b"], ["c", "a"], "data.text: a would be used for validation, and the run in .* has used it for train"),
        (["b", "c"], ["new"], "data.text: c would be used for train, and the run in .* has used it for validation"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            check_texts(tmp_path, task_with(train, validation))
        assert "\n" not in str(error.value)


def test_a_run_without_texts_records_none(tmp_path):
    write_texts(tmp_path, SimpleNamespace(texts=dict))
    assert not list(tmp_path.iterdir())
    check_texts(tmp_path, task_with(["a"], ["b"]))


def test_a_machine_without_git_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment()["commit"] is None


def run(ds_config=None, train=None, **stage):
    """A configuration with some values."""
    ds = {"train_batch_size": 4, "optimizer": {"params": {"lr": 1e-3}}, **(ds_config or {})}
    stages = [{"pairs": 1, "steps": 2, **stage}]
    return validate(RunConfig, {"model": {"base": "x"}, "train": train or {}, "curriculum": stages, "ds_config": ds})


def test_rates_and_batch_may_change_at_a_resume(tmp_path):
    write_atomically(tmp_path / "config.yaml", as_yaml(run()))
    check_same(tmp_path, run({"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, lr=2e-3))
    check_same(tmp_path, run({"bf16": {"enabled": False}}))
    check_same(tmp_path, run(schedule="cosine", final=0.1, warmup_steps=1))
    check_same(tmp_path, run(train={"optimizer_groups": [{"match": ["*"], "lr_scale": 2}], "max_steps": 3}))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"ds_config": {"optimizer": {"type": "Lion"}}}, "ds_config.optimizer.type=Lion: .* started with AdamW; keep"),
        (
            {"train": {"freeze": "base"}},
            "train.freeze=base: .* was started with None; keep that, or give another --out",
        ),
        (
            {"ds_config": {"bf16": {"enabled": True}}},
            "ds_config.bf16.enabled=True: .* was started with False; keep that",
        ),
        ({"steps": 3}, "curriculum.0.steps=3: .* was started with 2; keep that"),
    ],
)
def test_what_the_states_depend_on_may_not(changed, says, tmp_path):
    write_atomically(tmp_path / "config.yaml", as_yaml(run()))
    with pytest.raises(ConfigError, match=says) as error:
        check_same(tmp_path, run(**changed))
    assert "\n" not in str(error.value)


def test_changes_are_recorded_once_with_their_step(tmp_path):
    def start(step, ranks, config):
        said = record_changes(tmp_path, config, step, ranks)
        write_atomically(tmp_path / "config.yaml", as_yaml(config))
        return said

    assert start(0, 2, run()) == "" == start(5, 2, run())
    assert start(7, 4, run(lr=0.5)) == "curriculum.0.lr None -> 0.5, ranks 2 -> 4"
    assert start(9, 1, run(lr=0.5)) == "ranks 4 -> 1" and start(9, 1, run(lr=0.5)) == ""
    with (tmp_path / CHANGES).open("a") as file:
        file.write('{"half a li')
    assert start(11, 1, run({"train_batch_size": 8}, lr=0.5)) == "ds_config.train_batch_size 4 -> 8"
    assert [json.loads(line) for line in (tmp_path / CHANGES).read_text().splitlines()] == [
        {"step": 0, "ranks": 2, "changed": {}},
        {"step": 7, "ranks": 4, "changed": {"curriculum.0.lr": {"before": None, "now": 0.5}}},
        {"step": 9, "ranks": 1, "changed": {}},
        {"step": 11, "ranks": 1, "changed": {"ds_config.train_batch_size": {"before": 4, "now": 8}}},
    ]
    (tmp_path / CHANGES).write_text("damaged\n")
    assert start(12, 1, run({"train_batch_size": 8}, lr=0.5)) == ""
