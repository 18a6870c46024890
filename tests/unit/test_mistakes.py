"""Mistakes in a configuration that used to pass silently, or to be found late."""

import json

import pytest
from support.models import small_model
from support.paths import FP32

from armt_dist.config import ConfigError, assign, read_object, read_yaml, run_main, validate
from armt_dist.data.tasks import make_task
from armt_dist.training.run_config import RunConfig
from armt_dist.training.setup import check_task
from armt_dist.zero3.ds_config import read_ds_config
from armt_dist.zero3.sections import ModelConfig


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("train: {seed: 1}\ndata: {task: text}\ntrain: {seed: 2}\n", "train"),
        ("train:\n  seed: 1\n  log_every: 2\n  seed: 1\n", "seed"),
        ("curriculum:\n- {pairs: 1, steps: 2, pairs: 3}\n", "pairs"),
    ],
)
def test_a_key_given_twice_in_yaml(text, key, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"recipe.yaml: not valid YAML \(the key '{key}' is given twice; remove one"):
        read_yaml(tmp_path / "recipe.yaml")


def test_keys_that_merge_are_not_given_twice(tmp_path):
    (tmp_path / "recipe.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")
    assert read_yaml(tmp_path / "recipe.yaml") == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}}


def test_a_key_given_twice_in_an_override_and_in_json(tmp_path):
    with pytest.raises(ConfigError, match="the key 'lr' is given twice"):
        assign({}, "curriculum={lr: 1, lr: 2}")
    (tmp_path / "ds.json").write_text('{"train_batch_size": 4, "bf16": {"enabled": true, "enabled": false}}')
    with pytest.raises(ConfigError, match=r"ds.json: not valid JSON \(the key 'enabled' is given twice\)"):
        read_object(tmp_path / "ds.json", "ds_config")


@pytest.mark.parametrize("key", ["train", "data"])
def test_a_seed_beyond_what_generators_take(key):
    tree = {"model": {"base": "x"}, "curriculum": [{"pairs": 1, "steps": 2}], key: {"seed": 2**64}}
    with pytest.raises(ConfigError, match=rf"{key}.seed={2**64}: "):
        validate(RunConfig, tree)


def test_a_metric_that_no_validation_gives_is_found_at_the_start():
    stages = [{"pairs": 1, "steps": 2}]
    tree = {"model": {"base": "x"}, "train": {"best": "nonsense"}, "curriculum": stages}
    config = validate(RunConfig, tree)
    says = "train.best=nonsense: no such validation metric; choose from accuracy, loss, token_accuracy"
    with pytest.raises(ConfigError, match=says):
        check_task(config, make_task(config.data), small_model(segment_tokens=4).config)


@pytest.mark.parametrize("base", ["/nope", "./nope", "~/nope"])
def test_a_folder_that_is_missing_is_no_name_of_the_hub(base):
    with pytest.raises(ConfigError, match=f"model.base={base}: no such folder; give a model's folder or its Hugging"):
        validate(ModelConfig, {"base": base})
    assert json.loads(validate(ModelConfig, {"base": "gpt2"}).model_dump_json())["base"] == "gpt2"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("gradient_clipping=-1", "ds_config gradient_clipping=-1: Input should be greater than or equal to 0"),
        ("wall_clock_breakdown=x", "ds_config wall_clock_breakdown=x: Input should be a valid boolean"),
        ("bf16.enabled=yess", "ds_config bf16.enabled=yess: Input should be a valid boolean"),
        ("optimizer.params.betas=3", "ds_config optimizer.params.betas=3: Input should be a valid list"),
        ("zero_optimization.round_robin_gradients=true", "not honoured; remove it; honoured are contiguous_gradients"),
    ],
)
def test_values_of_the_ds_config_that_deepspeed_takes_in_silence(override, says):
    """It trained without clipping, for example."""
    with pytest.raises(ConfigError, match=says):
        read_ds_config(FP32, [override])
    assert read_ds_config(FP32, ["zero_optimization.sub_group_size=2e5", "optimizer.params.eps=1e-6"])


@pytest.mark.parametrize(("rank", "order"), [(0, ["print", "leave"]), (1, ["wait", "print", "leave"])])
def test_a_rank_says_what_is_wrong_before_it_leaves(rank, order, monkeypatch):
    """Rank 0 may still need the others to come to the same mistake."""
    did = []
    monkeypatch.setattr("armt_dist.config.time.sleep", lambda _: did.append("wait"))
    monkeypatch.setattr("builtins.print", lambda *_, **__: did.append("print"))

    def mistake():
        raise ConfigError("x=1: wrong")

    with pytest.raises(SystemExit) as end:
        run_main(mistake, rank, lambda: did.append("leave") or True)
    assert (end.value.code, did) == (2, order)
