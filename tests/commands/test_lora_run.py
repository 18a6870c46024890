"""Adapters, frozen parameters and rates by group in one run of the real command, and the mistakes that one can make."""

import re

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.commands import call_script, curve, records, train
from support.models import TINY_LLAMA
from support.paths import FP32
from transformers import AutoModelForCausalLM, LlamaConfig

STEPS, STOP = 4, 2
FROZEN = re.compile(r"memory\.W_mq\.")
ADAPTED = re.compile(r"[.](q|v)_proj\.weight")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a base, `base`, and a recipe, `recipe.yaml`."""
    root = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    fields = {name: value for name, value in TINY_LLAMA.items() if name != "model_type"}
    AutoModelForCausalLM.from_config(LlamaConfig(**fields, vocab_size=20)).save_pretrained(root / "base")
    recipe = {
        "model": {
            "base": str(root / "base"), "num_mem_tokens": 2, "d_mem": 4,
            "lora": {"r": 3, "alpha": 12, "dropout": 0.1, "targets": ["q_proj", "v_proj"]},
        },
        "data": {"task": "rewrite", "retrieval": {"symbols": 8}},
        "train": {
            "validate_every": 100, "validation_steps": 1, "freeze": ["*.memory.W_mq.*"],
            "optimizer_groups": [
                {"match": ["*.lora_*"], "lr_scale": 3, "weight_decay": 0.0},
                {"match": ["*.memory.*", "memory_tokens.*"], "lr": 2e-3},
            ],
        },
        "curriculum": [{"pairs": 2, "steps": STEPS, "lr": 0.01}],
        "ds_config": {"train_batch_size": 4},
    }  # fmt: skip
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


@pytest.fixture(scope="module")
def runs(root):
    """`whole`, a run, and `again`, the same one stopped and resumed; on two ranks."""
    for name, limits in (("whole", [[]]), ("again", [[f"train.max_steps={STOP}"], []])):
        for limit in limits:
            result = start(root, root / name, *limit)
            assert result.returncode == 0, result.stderr[-3000:]
    return root


def start(root, out, *arguments, ranks=2):
    """Start or resume a run."""
    return train("--ds_config", FP32, "--config", root / "recipe.yaml", "--out", out, *arguments, ranks=ranks)


def exported(run, out, monkeypatch, capsys, *options):
    """Export the newest checkpoint of a run by the real script."""
    arguments = [run, "--tag", "latest", "--out", out, *options]
    code, _, errors = call_script("consolidate.py", arguments, monkeypatch, capsys)
    assert not code, errors


def test_a_resumed_run_is_the_uninterrupted_one(runs):
    whole = curve(runs / "whole")
    assert curve(runs / "again") == whole and len(whole) == STEPS + 1, "and a validation at the end"
    for record in records(runs / "again"):
        assert (record["lr"], record["lr_group_0"]) == pytest.approx((0.01, 0.03))
        # 2e-3 where the others have the 1e-3 of the ds_config.
        assert record["lr_group_1"] == pytest.approx(0.02)


def test_merged_and_alone_it_is_what_was_trained(runs, tmp_path, monkeypatch, capsys):
    for name in ("whole", "again"):
        exported(runs / name, tmp_path / name, monkeypatch, capsys)
    exported(runs / "again", tmp_path / "adapter", monkeypatch, capsys, "--adapter")
    merged, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    base = load_file(runs / "base/model.safetensors")
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    memory = load_file(tmp_path / "adapter/memory.safetensors")
    assert again.keys() == merged.keys() and all(torch.equal(again[name], merged[name]) for name in merged)
    for name, weight in base.items():
        found = merged["base." + re.sub(r"(layers\.\d+\.)", r"\1layer.", name)]
        if not ADAPTED.search(name):
            assert torch.equal(found, weight), f"{name} is not trained"
            continue
        path = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        low = adapter[f"{path}B.weight"] @ adapter[f"{path}A.weight"]
        assert low.abs().max() > 1e-4
        torch.testing.assert_close(found, weight + 12 / 3 * low)
    assert len(adapter) == 8
    assert all(torch.equal(memory[name], merged[name]) for name in memory)
    assert sum(bool(FROZEN.search(name)) for name in memory) == 2


def test_what_is_frozen_stays_and_what_is_not_moves(runs, tmp_path, monkeypatch, capsys):
    weights = {}
    for tag in (STOP, STEPS):
        arguments = [runs / "again", "--tag", f"step_{tag:08d}", "--out", tmp_path / str(tag)]
        assert not call_script("consolidate.py", arguments, monkeypatch, capsys)[0]
        weights[tag] = load_file(tmp_path / str(tag) / "model.safetensors")
    still = {name for name in weights[STOP] if torch.equal(weights[STOP][name], weights[STEPS][name])}
    memory = {name for name in weights[STOP] if ".memory." in name or name.startswith("memory_tokens.")}
    assert still & memory == {name for name in memory if FROZEN.search(name)} != set()
    assert not any(ADAPTED.search(name) for name in still)


MISTAKES = {
    "target": (
        ["model.lora.targets=[q_proj, c_attn]"],
        r"model.lora.targets=c_attn: no linear map of the base has this name; there are: .*q_proj",
    ),
    "frozen": (["train.freeze=['*']"], r"train.freeze=\['\*'\]: nothing is left to train; freeze less"),
    "group": (
        ["train.optimizer_groups=[{match: ['*.W_mq.*'], lr_scale: 2}]"],
        r"train.optimizer_groups.0.match=\*.W_mq.\*: matches no trained parameter; names are",
    ),
    "peft": ([], r"model.lora: the package peft cannot be imported \(made for another torch\); install it with: pip"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(name, root, tmp_path, monkeypatch):
    arguments, says = MISTAKES[name]
    if name == "peft":
        (tmp_path / "peft.py").write_text("raise ImportError('made for another torch')\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    # Who speaks, and whether nobody is left waiting, differs between these two.
    ranks = 2 if name in ("target", "peft") else 1
    result = start(root, tmp_path / "run", *arguments, ranks=ranks)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert result.returncode == 2 and len(lines) == 1 and re.match(f"error: {says}", lines[0]), result.stderr[-2000:]
    assert "Traceback" not in result.stderr + result.stdout and not (tmp_path / "run").exists()
