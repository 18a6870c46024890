"""Runs that train a part of a pretrained model: stopped, continued on as many and on fewer ranks, and exported."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.models import TINY_LLAMA
from support.ranks import spawn
from transformers import AutoModelForCausalLM, LlamaConfig

from armt_dist.checkpoint.export import export
from armt_dist.zero3.trained_parameters import is_memory

pytestmark = pytest.mark.slow

# Name -> keys of the train section, bf16.
RUNS = {"frozen": ({"freeze": "base"}, False), "frozen_bf16": ({"freeze": "base"}, True)}
STEPS, STOP = 4, 2


def train(ranks, root, base, names, max_steps):
    """Start or continue runs of the given names in `root`, until `max_steps`."""
    from armt_dist.config import validate
    from armt_dist.monitoring.lease import Lease
    from armt_dist.training.run_config import RunConfig
    from armt_dist.training.trainer import Trainer

    for name in names:
        own, bf16 = RUNS[name]
        config = {
            "model": {"base": str(base), "num_mem_tokens": 2, "d_mem": 4},
            "data": {"task": "rewrite", "retrieval": {"symbols": 8}},
            "train": {"save_every": STOP, "validate_every": 100, "max_steps": max_steps, **own},
            "curriculum": [{"pairs": 2, "steps": 10, "lr": 0.01, "warmup_steps": 3}],
        }
        ds = {"train_batch_size": 4, "zero_optimization": {"stage": 3}, "bf16": {"enabled": bf16}}
        out = root / name
        trainer = Trainer(validate(RunConfig, config), ds, out, ranks, torch.device("cpu"), Lease(out))
        assert trainer.run("auto") == 0
        assert trainer.progress.step == max_steps
        trainer.engine.destroy()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pretrained model's folder."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    fields = {name: value for name, value in TINY_LLAMA.items() if name != "model_type"}
    AutoModelForCausalLM.from_config(LlamaConfig(**fields, vocab_size=20)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """By name: each run without a stop, stopped and continued on two ranks, and stopped and continued on one."""
    root = tmp_path_factory.mktemp("runs")
    for name in ("whole", "again", "alone"):
        (root / name).mkdir()
    spawn(2, train, root / "again", base, list(RUNS), STOP)
    for name in RUNS:
        shutil.copytree(root / "again" / name, root / "alone" / name)
    spawn(2, train, root / "whole", base, list(RUNS), STEPS)
    spawn(2, train, root / "again", base, list(RUNS), STEPS)
    spawn(1, train, root / "alone", base, list(RUNS), STEPS)
    return root


def exported(run, out):
    """The weights of a run's last checkpoint by name."""
    export(run, out, "latest")
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("name", RUNS)
def test_frozen_parameters_keep_their_bits(name, runs, base, tmp_path):
    own, bf16 = RUNS[name]
    before = {f"base.{name}": tensor for name, tensor in load_file(base / "model.safetensors").items()}
    weights = {kind: exported(runs / kind / name, tmp_path / kind) for kind in ("whole", "again", "alone")}
    for kind, found in weights.items():
        kept = {name.replace(".layer.", "."): tensor for name, tensor in found.items() if not is_memory(name)}
        assert kept.keys() == before.keys()
        for weight, tensor in kept.items():
            expected = before[weight].bfloat16().float() if bf16 else before[weight]
            assert torch.equal(tensor, expected), f"{kind}: {weight}"
    memory = [weight for weight in weights["whole"] if is_memory(weight)]
    assert len(memory) == 11 and all(torch.equal(weights["whole"][m], weights["again"][m]) for m in memory)
    for weight in memory:
        torch.testing.assert_close(
            weights["alone"][weight], weights["whole"][weight], rtol=1e-2, atol=1e-3 + bf16 * 0.01
        )
