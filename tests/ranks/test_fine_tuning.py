"""Runs that train a part of a pretrained model: stopped, continued on as many and on fewer ranks, and exported."""

import json
import re
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.commands import call_script, curve, records
from support.models import TINY_LLAMA
from support.ranks import spawn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from armt_dist.checkpoint.adapter_export import export_adapter, load_adapted
from armt_dist.checkpoint.adapters import A, whole
from armt_dist.checkpoint.export import export
from armt_dist.checkpoint.zero_shards import open_checkpoint
from armt_dist.config import ConfigError
from armt_dist.model.modeling_armt import ARMTForCausalLM
from armt_dist.zero3.trained_parameters import is_memory

pytestmark = pytest.mark.slow

LORA = {"r": 3, "alpha": 12, "targets": ["q_proj", "v_proj", "c_attn", "c_proj"]}
# Name -> base, keys of the model and train sections, bf16.
RUNS = {
    "frozen": ("llama", {}, {"freeze": "base"}, False),
    "frozen_bf16": ("llama", {}, {"freeze": "base"}, True),
    "lora": ("llama", {"lora": {**LORA, "targets": ["q_proj", "v_proj"]}}, {}, False),
    "lora_gpt2": ("gpt2", {"lora": {**LORA, "targets": ["c_attn", "attn.c_proj"]}}, {}, False),
}
ADAPTED = ("lora", "lora_gpt2")
STEPS, STOP = 4, 2
TEST_IDS = torch.randint(0, 12, (2, 11), generator=torch.Generator().manual_seed(0))


def train(ranks, root, bases, names, max_steps):
    """Start or continue runs of the given names in `root`, until `max_steps`. Returns the trained models' logits."""
    from armt_dist.config import validate
    from armt_dist.monitoring.lease import Lease
    from armt_dist.training.run_config import RunConfig
    from armt_dist.training.trainer import Trainer

    logits = {}
    for name in names:
        base, model, own, bf16 = RUNS[name]
        config = {
            "model": {"base": str(bases / base), "num_mem_tokens": 2, "d_mem": 4, **model},
            "data": {"task": "rewrite", "retrieval": {"symbols": 8}},
            "train": {"save_every": STOP, "validate_every": 100, "max_steps": max_steps, **own},
            "curriculum": [{"pairs": 2, "steps": 10, "lr": 0.01, "warmup_steps": 3}],
        }
        ds = {"train_batch_size": 4, "zero_optimization": {"stage": 3}, "bf16": {"enabled": bf16}}
        out = root / name
        trainer = Trainer(validate(RunConfig, config), ds, out, ranks, torch.device("cpu"), Lease(out))
        assert trainer.run("auto") == 0
        assert trainer.progress.step == max_steps
        trainer.engine.eval()
        with torch.no_grad():
            logits[name] = trainer.runner.model(TEST_IDS).logits.clone()
        trainer.engine.destroy()
    return logits


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The folders of pretrained models."""
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    fields = {name: value for name, value in TINY_LLAMA.items() if name != "model_type"}
    # Dropout would differ between numbers of ranks.
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    gpt2 = GPT2Config(n_embd=12, n_layer=2, n_head=2, n_positions=64, vocab_size=20, bos_token_id=0, **still)
    for name, config in (("llama", LlamaConfig(**fields, vocab_size=20)), ("gpt2", gpt2)):
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def runs(bases, tmp_path_factory):
    """A folder with each run without a stop, stopped and continued on two ranks, and stopped and continued on one; and
    the logits of the first."""
    root = tmp_path_factory.mktemp("runs")
    for name in ("whole", "again", "alone", "single"):
        (root / name).mkdir()
    spawn(2, train, root / "again", bases, list(RUNS), STOP)
    shutil.copytree(root / "again", root / "alone", dirs_exist_ok=True)
    logits = spawn(2, train, root / "whole", bases, list(RUNS), STEPS)[0]
    spawn(2, train, root / "again", bases, list(RUNS), STEPS)
    spawn(1, train, root / "alone", bases, list(RUNS), STEPS)
    spawn(1, train, root / "single", bases, ["lora"], STOP)
    return root, logits


def exported(run, out, tag="latest"):
    """The weights of a run's last checkpoint by name."""
    export(run, out, tag)
    return load_file(out / "model.safetensors")


def base_weights(folder):
    """A base's weights by the names that they have in an export."""
    weights = load_file(folder / "model.safetensors")
    inside = re.compile("((layers|h)[.][0-9]+[.])")
    return {"base." + inside.sub(r"\1layer.", name): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("name", RUNS)
def test_frozen_parameters_keep_their_bits(name, runs, bases, tmp_path):
    base, _, _, bf16 = RUNS[name]
    before = base_weights(bases / base)
    weights = {kind: exported(runs[0] / kind / name, tmp_path / kind) for kind in ("whole", "again", "alone")}
    trained = {
        n
        for n in weights["whole"]
        if is_memory(n) or name in ADAPTED and re.search("(q_proj|v_proj|attn.c_).*weight", n)
    }
    assert len(trained) == {"lora": 15, "lora_gpt2": 15}.get(name, 11)
    for kind, found in weights.items():
        assert found.keys() - before.keys() == {n for n in found if is_memory(n)} and not before.keys() - found.keys()
        for weight in before.keys() - trained:
            expected = before[weight].bfloat16().float() if bf16 else before[weight]
            assert torch.equal(found[weight], expected), f"{kind}: {weight}"
    for weight in trained:
        assert weight not in before or not torch.equal(weights["whole"][weight], before[weight]), "the adapter is 0"
        assert torch.equal(weights["whole"][weight], weights["again"][weight]), weight
    kept, alone = (curve(runs[0] / kind / name) for kind in ("whole", "alone"))
    assert len(kept) == STEPS
    for key in kept:
        assert alone[key][0] == pytest.approx(kept[key][0], rel=1e-2 if bf16 else 1e-3), key


@pytest.mark.parametrize("name", ADAPTED)
def test_merged_logits_are_those_of_the_adapters(name, runs, tmp_path):
    export(runs[0] / "whole" / name, tmp_path / "out", "latest")
    model = ARMTForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(TEST_IDS).logits, runs[1][name], rtol=1e-4, atol=1e-5)


def test_adapters_begin_alike_on_any_number_of_ranks(runs):
    root, tag = runs[0], "checkpoints/step_00000002"
    one, two = (open_checkpoint(root / kind / "lora" / tag).parameters for kind in ("single", "again"))
    drawn = [name for name in one if name.endswith(A)]
    assert len(drawn) == 4
    for name in drawn:
        # Two steps apart from their first values, which are drawn up to 0.29.
        torch.testing.assert_close(whole(one[name]), whole(two[name]), rtol=0, atol=5e-3)
    assert not torch.allclose(whole(one[drawn[0]]), whole(one[drawn[2]]), atol=0.05)


# peft's own use of transformers.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_folder_is_what_peft_reads(name, runs, bases, tmp_path, monkeypatch, capsys):
    run, out = runs[0] / "whole" / name, tmp_path / "adapter"
    code, said, errors = call_script(
        "consolidate.py", [run, "--adapter", "--tag", "latest", "--out", out], monkeypatch, capsys
    )
    assert not code and f"wrote {out}" in said, errors
    assert {path.name for path in out.iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "memory.safetensors",
    }
    assert str(bases) not in "".join(path.read_text() for path in out.glob("*.json"))

    def base():
        return AutoModelForCausalLM.from_pretrained(bases / RUNS[name][0]).eval()

    export(run, tmp_path / "merged", "latest")
    whole = ARMTForCausalLM.from_pretrained(tmp_path / "merged").eval()
    adapted = PeftModel.from_pretrained(base(), out).eval()
    loaded = load_adapted(out, base()).eval()
    with torch.no_grad():
        # The base without memory: segments do not matter to it.
        plain = whole.base.__class__.from_pretrained(bases / RUNS[name][0]).eval()
        weights = {n.replace(".layer.", "."): p for n, p in whole.base.named_parameters() if ".memory." not in n}
        plain.load_state_dict(weights, strict=False)
        torch.testing.assert_close(adapted(TEST_IDS).logits, plain(TEST_IDS).logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(adapted(TEST_IDS).logits, base()(TEST_IDS).logits, atol=1e-4), "the adapter is 0"
        torch.testing.assert_close(loaded(TEST_IDS).logits, runs[1][name], rtol=1e-4, atol=1e-5)


def test_what_has_no_adapter_is_one_line(runs, tmp_path):
    with pytest.raises(ConfigError, match=r"has no adapters \(model.lora\); export it without --adapter"):
        export_adapter(runs[0] / "whole/frozen", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def train_on(ranks, out, steps, batch, lr, decay, beta):
    """Start a run, or go on with another rate, batch, weight decay and betas. Its optimizer's groups then."""
    from armt_dist.config import validate
    from armt_dist.monitoring.lease import Lease
    from armt_dist.training.run_config import RunConfig
    from armt_dist.training.trainer import Trainer

    config = {
        "model": {"base_config": TINY_LLAMA, "num_mem_tokens": 2, "d_mem": 4},
        "data": {"task": "rewrite", "retrieval": {"symbols": 8}},
        "train": {"max_steps": steps, "optimizer_groups": [{"match": ["*.memory.*"], "lr_scale": 3}]},
        "curriculum": [{"pairs": 2, "steps": 10, "lr": lr}],
    }
    # The type is left out: it is AdamW.
    params = {"lr": 1e-3, "weight_decay": decay, "betas": [beta, 0.99]}
    ds = {"train_batch_size": batch, "zero_optimization": {"stage": 3}, "optimizer": {"params": params}}
    trainer = Trainer(validate(RunConfig, config), ds, out, ranks, torch.device("cpu"), Lease(out))
    assert trainer.run("auto") == 0 and trainer.progress.step == steps
    keys = ("lr", "weight_decay", "betas")
    return [{key: group[key] for key in keys} for group in trainer.engine.optimizer.param_groups]


def test_a_resume_with_other_settings_has_them(tmp_path):
    spawn(1, train_on, tmp_path / "run", 1, 4, 0.01, 0.1, 0.9)
    (groups,) = spawn(1, train_on, tmp_path / "run", 2, 8, 0.02, 0.2, 0.8)
    expected = {(rate, decay) for rate in (0.02, 0.06) for decay in (0.2, 0.0)}
    assert {(round(group["lr"], 9), group["weight_decay"]) for group in groups} == expected
    assert all(tuple(group["betas"]) == (0.8, 0.99) for group in groups)
    first, second = records(tmp_path / "run")
    assert (first["lr"], first["lr_group_0"], second["lr"]) == pytest.approx((0.01, 0.03, 0.02))
    changes = [json.loads(line) for line in (tmp_path / "run/changes.jsonl").read_text().splitlines()]
    assert [(line["step"], line["ranks"]) for line in changes] == [(0, 1), (1, 1)]
    assert changes[1]["changed"]["ds_config.train_batch_size"] == {"before": 4, "now": 8}
    assert changes[1]["changed"]["curriculum.0.lr"] == {"before": 0.01, "now": 0.02}
