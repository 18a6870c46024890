"""Low-rank adapters: which maps get one, and what is said where none fits."""

import sys

import pytest
import torch
from support.golden import TOLERANCES, assert_close, assert_gradients
from support.models import small_model
from support.oracle import oracle, random_batch, scheduled_loss

from armt_dist.checkpoint.adapters import MergedParameter, merged, read_lora
from armt_dist.checkpoint.zero_shards import StoredParameter
from armt_dist.config import ConfigError, validate
from armt_dist.training.checks import check_peft
from armt_dist.zero3.adapters import add_adapters
from armt_dist.zero3.sections import LoraSection, ModelConfig
from armt_dist.zero3.trained_parameters import is_memory


def adapted(family="llama", **fields):
    """A model whose adapters matter."""
    torch.manual_seed(1)
    model = small_model(family).eval()
    add_adapters(model, LoraSection(**{"r": 2, "targets": ["q_proj", "mlp.up_proj"], **fields}))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_the_adapters_and_the_memory_are_trained_and_nothing_else():
    model = adapted()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if not is_memory(name)} == {
        f"base.model.layers.{i}.layer.{name}.lora_{kind}.default.weight"
        for i in (0, 1)
        for name in ("self_attn.q_proj", "mlp.up_proj")
        for kind in "AB"
    }
    assert {name for name in trained if is_memory(name)} == {n for n, _ in model.named_parameters() if is_memory(n)}


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize(("family", "targets"), [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn"])])
def test_gradients_are_those_of_the_plain_forward(family, targets, graphs):
    model, batch = adapted(family, targets=targets), random_batch()
    loss, gradients = oracle(model, *batch)
    fast_loss, fast_gradients = scheduled_loss(model, *batch, graphs=graphs)
    assert_close("loss", fast_loss, loss, TOLERANCES["loss"])
    assert any(".lora_A." in name for name in gradients) and not any("base_layer" in name for name in gradients)
    assert_gradients({n: g for n, g in fast_gradients.items() if g is not None}, gradients)


def test_a_target_that_names_no_linear_map_is_one_line():
    says = "model.lora.targets=qproj: no linear map of the base has this name; there are: down_proj, gate_proj, k_proj"
    with pytest.raises(ConfigError, match=says):
        add_adapters(small_model(), LoraSection(targets=["q_proj", "qproj"]))
    # A memory's projections are trained themselves, and a module around maps is none.
    for target in ("W_mq", "mlp"):
        with pytest.raises(ConfigError, match=f"targets={target}: no linear map"):
            add_adapters(small_model(), LoraSection(targets=[target]))


def test_peft_is_asked_for_where_it_is_missing(monkeypatch):
    model = validate(ModelConfig, {"base": "x", "lora": {"targets": ["q_proj"]}})
    check_peft(model)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"model.lora: needs the package peft; install it with: pip install 'peft"):
        check_peft(model)
    check_peft(validate(ModelConfig, {"base": "x"}))


def stored(*shape):
    tensor = torch.randn(*shape)
    return StoredParameter(tensor.shape, (tensor.flatten()[:3], tensor.flatten()[3:]))


@pytest.mark.parametrize(("family", "name", "shape"), [("llama", "q_proj", (5, 4)), ("gpt2", "c_attn", (4, 5))])
def test_merging(family, name, shape):
    model = small_model(family)
    (path,) = (f"model.{n}" for n, _ in model.named_modules() if ".0." in n and n.endswith(name))
    names = [f"{path}.{leaf}" for leaf in ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight")]
    parts = dict(zip(names, (stored(*shape), stored(2, 4), stored(5, 2)), strict=True)) | {"model.other": stored(7)}
    found = merged(parts, model, "model.", {"r": 2, "alpha": 3})
    assert found.keys() == {f"{path}.weight", "model.other"} and isinstance(found[f"{path}.weight"], MergedParameter)
    own, a, b = (torch.cat(parts[n].pieces).view(parts[n].shape) for n in names)
    expected = own + 1.5 * (b @ a if family == "llama" else (b @ a).T)
    assert found[f"{path}.weight"].shape == shape
    assert torch.equal(found[f"{path}.weight"].pieces[0].view(shape), expected)
    with pytest.raises(ValueError, match="r=3"):
        merged(parts, model, "model.", {"r": 3, "alpha": 3})


@pytest.mark.parametrize("lora", ["[1]", "{r: 2}", "{r: 0, alpha: 1, targets: [a]}", "{r: 2, alpha: x, targets: [a]}"])
def test_a_run_whose_adapters_no_run_has(lora, tmp_path):
    (tmp_path / "config.yaml").write_text(f"model: {{lora: {lora}}}")
    with pytest.raises(ConfigError, match="model.lora=.* is no run's; give an undamaged run"):
        read_lora(tmp_path)
