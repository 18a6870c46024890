"""Which parameters are trained, by patterns of their names."""

import pytest
from support.models import small_model

from armt_dist.config import ConfigError, validate
from armt_dist.training.run_config import RunConfig, resolved
from armt_dist.training.run_folder import fixed
from armt_dist.zero3.trained_parameters import freeze_parameters, is_memory


def trained(model, freeze):
    """The names of what is trained when something is frozen."""
    freeze_parameters(model, freeze)
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_base_is_all_but_the_memory():
    model = small_model(sink=2, state_decay="learned")
    names = {name for name, _ in model.named_parameters()}
    memory = {name for name in names if name.startswith("memory_tokens.") or ".memory." in name}
    assert trained(model, "base") == memory == {name for name in names if is_memory(name)}
    assert {"memory_tokens.weight", "memory_tokens.sink"} < memory < names


def test_patterns_and_the_word_base_in_a_list():
    assert trained(small_model(), ["base", "*.W_mb.*", "*.layers.1.*"]) == {
        "memory_tokens.weight",
        *(f"base.model.layers.0.memory.W_m{kind}.weight" for kind in "qkv"),
    }


def test_what_is_frozen_already_stays_frozen():
    assert trained(small_model(freeze_mem=True), "base") == {"memory_tokens.weight"}


@pytest.mark.parametrize(
    ("freeze", "says"),
    [
        (["*.norm.*", "lm_head.*"], "train.freeze=lm_head.*: matches no parameter; names are those of an export, such"),
        (["*"], r"train.freeze=\['\*'\]: nothing is left to train; freeze less"),
        ("base", "train.freeze=base: nothing is left to train"),
    ],
)
def test_mistakes_are_one_line(freeze, says):
    # A Transformer-XL has no memory of its own.
    model = small_model(memory_kind="transformer_xl") if freeze == "base" else small_model()
    with pytest.raises(ConfigError, match=says) as error:
        freeze_parameters(model, freeze)
    assert "\n" not in str(error.value)


def test_what_is_frozen_does_not_change_at_a_resume():
    """The optimizer's states are those of the parameters that were trained."""

    def of(freeze):
        tree = {"model": {"base": "x"}, "curriculum": [{"pairs": 1, "steps": 2}], "train": {"freeze": freeze}}
        return {key: value for key, value in fixed(resolved(validate(RunConfig, tree))).items() if "freeze" in key}

    assert of("base") == {"model.freeze_mem": None, "train.freeze": "base"}
    assert of(["a", "b"]) == {"model.freeze_mem": None, "train.freeze.0": "a", "train.freeze.1": "b"}
