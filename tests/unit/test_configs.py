"""Every recipe is a valid configuration, names its initialisation where it starts from nothing, and fits its task."""

import sys

import pytest
from support.paths import ROOT

from armt_dist.config import ConfigError, load_config
from armt_dist.data.tasks import make_task
from armt_dist.training.run_config import RunConfig
from armt_dist.zero3 import partitioned_model as build

sys.path.insert(0, str(ROOT / "benchmarks"))
from experiments import EXPERIMENTS

CONFIGS = sorted((ROOT / "launch/configs").glob("*.yaml"))
FULL_SIZE = {"retrieval_remember", "retrieval_rewrite", "babilong_gpt2", "pg19_llama3.2_1b_sliding", "wikitext103_gpt2"}


def test_the_recipes_are_all_there():
    assert {path.stem for path in CONFIGS} >= FULL_SIZE


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe(path, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Some words to train on. " * 40)
    own = [f"data.text.files={text}", "data.text.validation_fraction=0"] if path.stem.startswith("plays") else []
    config = load_config(RunConfig, path, own)
    units = {stage.unit for stage in config.curriculum}
    assert len(units) == 1
    if config.model.base is not None:
        # Its weights and its tokenizer are on the hub.
        assert config.model.segment_tokens and config.model.init is None
        return
    assert config.model.init and config.model.init.linear_std, "the initialisation is part of a recipe"
    task = make_task(config.data, config.model.segment_tokens, None, 4)
    armt = build.armt_config(config.model, build.token_fields(task.tokenizer), task.segment_tokens)
    assert armt.vocab_size >= len(task.tokenizer) and units == {task.unit}
    for stage in config.curriculum:
        assert task.sequence_tokens(stage.length) > 0


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment(name):
    """What benchmarks/learn.py would start hours later."""
    experiment = EXPERIMENTS[name]
    assert experiment.legs and experiment.lengths
    for leg in experiment.legs:
        settings = [s for s in (*experiment.settings, *leg.overrides) if not s.startswith("ds_config.")]
        config = load_config(RunConfig, ROOT / "launch/configs" / experiment.recipe, settings)
        assert {stage.unit for stage in config.curriculum} == {experiment.unit}


def test_overrides_reach_into_lists(tmp_path):
    default = ROOT / "launch/configs/default.yaml"
    config = load_config(RunConfig, default, ["curriculum.1.pairs=7", "train.seed=3", "model.d_mem=8"])
    assert config.curriculum[1].pairs == 7 and config.train.seed == 3 and config.model.d_mem == 8
    for bad in ("curriculum.5.pairs=7", "curriculum.x.pairs=7", "train", "train.seed.x=1", "train.seed=-1"):
        with pytest.raises(ConfigError):
            load_config(RunConfig, default, [bad])
