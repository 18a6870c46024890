"""Which parameters are trained, by patterns of their names."""

import pytest
from support.models import small_model

from armt_dist.config import ConfigError, validate
from armt_dist.training.run_config import RunConfig, resolved
from armt_dist.training.run_folder import fixed
from armt_dist.zero3.sections import OptimizerGroup
from armt_dist.zero3.trained_parameters import freeze_parameters, is_memory, parameter_groups, set_rates


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


ADAMW = {"lr": 1e-3, "weight_decay": 0.1}


def groups_of(model, *chosen, optimizer=ADAMW):
    """Groups as (names, settings beside them)."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, [OptimizerGroup(**group) for group in chosen], optimizer)
    return [
        ({names[p] for p in group["params"]}, {k: v for k, v in group.items() if k != "params"}) for group in groups
    ]


def test_vectors_and_memory_rows_do_not_decay():
    model = small_model("gpt2", sink=1)
    (decayed, settings), (others, none) = groups_of(model)
    assert decayed | others == {name for name, _ in model.named_parameters()} and not decayed & others
    assert others == {n for n, p in model.named_parameters() if p.ndim == 1 or n.startswith("memory_tokens.")}
    assert settings == {"lr_scale": 1.0, "metric": "lr"} and none == {**settings, "weight_decay": 0.0}
    assert len(groups_of(model, optimizer={"lr": 1e-3, "weight_decay": 0})) == 1, "as before there were groups"
    assert len(groups_of(model, {"match": ["*"], "weight_decay": 0.1})) == 1, "unless asked"


def test_the_first_group_that_matches_has_a_parameter():
    model = small_model()
    chosen = {"match": ["*.W_mb.*"], "lr": 5e-3}, {"match": ["*.memory.*", "memory_tokens.*"], "weight_decay": 0.5}
    groups = groups_of(model, *chosen)
    by_settings = {(settings["metric"], settings.get("weight_decay")): names for names, settings in groups}
    strengths = {f"base.model.layers.{i}.memory.W_mb" for i in (0, 1)}
    assert by_settings["lr_group_0", None] == {f"{name}.weight" for name in strengths}
    assert by_settings["lr_group_0", 0.0] == {f"{name}.bias" for name in strengths}
    assert by_settings["lr_group_1", 0.5] == {
        n for n, _ in model.named_parameters() if is_memory(n) and "W_mb" not in n
    }
    assert sum(map(len, by_settings.values())) == len(list(model.parameters()))
    optimizer = parameter_groups(model, [OptimizerGroup(**group) for group in chosen], ADAMW)
    assert set_rates(optimizer, 1e-4) == {"lr": 1e-4, "lr_group_0": pytest.approx(5e-4), "lr_group_1": 1e-4}
    assert sorted(group["lr"] for group in optimizer) == pytest.approx([1e-4, 1e-4, 1e-4, 5e-4, 5e-4])


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ([{"match": ["nothing"]}], r"train.optimizer_groups.0.match=nothing: matches no trained parameter; names are"),
        ([{"match": ["base"]}], r"train.optimizer_groups.0.match=base: matches no trained parameter; names are"),
        (
            [{"match": ["*"]}, {"match": ["*.memory.*"]}],
            r"train.optimizer_groups.1.match=\['\*.memory.\*'\]: groups before it have all of these",
        ),
    ],
)
def test_groups_without_parameters_are_refused(chosen, says):
    model = small_model()
    freeze_parameters(model, "base")
    with pytest.raises(ConfigError, match=says) as error:
        groups_of(model, *chosen)
    assert "\n" not in str(error.value)


def test_two_rates_are_refused():
    tree = {"model": {"base": "x"}, "curriculum": [{"pairs": 1, "steps": 2}]}
    both = {"match": ["*"], "lr": 1.0, "lr_scale": 2.0}
    with pytest.raises(ConfigError, match="train.optimizer_groups lr=1.0, lr_scale=2.0: give one of them"):
        validate(RunConfig, {**tree, "train": {"optimizer_groups": [both]}})
