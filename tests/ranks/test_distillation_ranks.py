"""Distillation in real runs: on one rank and on two that share the batch or the sequence, stopped and continued."""

import pytest
import torch
from support.commands import records
from support.models import TINY_LLAMA
from support.ranks import spawn
from transformers import AutoModelForCausalLM, LlamaConfig

from armt_dist.checkpoint.adapters import whole as whole_tensor
from armt_dist.checkpoint.zero_shards import open_checkpoint

pytestmark = pytest.mark.slow

STEPS, STOP = 4, 2
LORA = {"model": {"lora": {"r": 3, "targets": ["q_proj", "down_proj"]}}}
# Name -> sections of the configuration.
RUNS = {
    "memory": {"train": {"freeze": "base"}},
    "adapters": LORA,
    # The samples of a rank have different lengths in every step, and the ranks of a sequence different windows.
    "sequence": {**LORA, "parallel": {"sp": 2, "rounds": 2}},
    "one_rank": {**LORA, "parallel": {"rounds": 2}},
}


def train(ranks, root, base, names, max_steps):
    """Start or continue runs of the given names in `root`, until `max_steps`."""
    from armt_dist.config import validate
    from armt_dist.monitoring.lease import Lease
    from armt_dist.training.run_config import RunConfig
    from armt_dist.training.trainer import Trainer

    for name in names:
        own = RUNS[name]
        config = {
            "data": {"task": "rewrite", "retrieval": {"symbols": 8}},
            "loss": {"distill": {"window": 10, "weight": 0.7}},
            "curriculum": [{"pairs": 6, "at_least": 0.6, "steps": 10, "lr": 0.001}],
            **own,
            "model": {"base": str(base), "num_mem_tokens": 2, "d_mem": 4, **own.get("model", {})},
            "train": {"save_every": STOP, "validate_every": 3, "max_steps": max_steps, **own.get("train", {})},
        }
        ds = {
            "train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        }
        out = root / name
        trainer = Trainer(validate(RunConfig, config), ds, out, ranks, torch.device("cpu"), Lease(out))
        assert trainer.run("auto") == 0
        trainer.engine.destroy()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folders of the runs on one rank, on two, and on two with a stop."""
    root = tmp_path_factory.mktemp("distilled")
    torch.manual_seed(0)
    fields = {name: value for name, value in TINY_LLAMA.items() if name != "model_type"}
    base = AutoModelForCausalLM.from_config(LlamaConfig(**fields, vocab_size=20, initializer_range=0.2))
    base.save_pretrained(root / "base")
    for kind in ("one", "two", "again"):
        (root / kind).mkdir()
    spawn(1, train, root / "one", root / "base", ["memory", "adapters", "one_rank"], STEPS, timeout_s=300)
    shared = ["memory", "adapters", "sequence"]
    spawn(2, train, root / "two", root / "base", shared, STEPS, timeout_s=300)
    spawn(2, train, root / "again", root / "base", shared, STOP, timeout_s=300)
    spawn(2, train, root / "again", root / "base", shared, STEPS, timeout_s=300)
    return root


def curve(run):
    """Loss, divergence and norm of the gradients of every step."""
    steps = records(run)
    assert len(steps) == STEPS
    return [(step["loss"], step["divergence"], step["grad_norm"]) for step in steps]


@pytest.mark.parametrize(("one", "two"), [("memory", "memory"), ("adapters", "adapters"), ("one_rank", "sequence")])
def test_two_ranks_do_what_one_does(root, one, two):
    alone, shared = curve(root / "one" / one), curve(root / "two" / two)
    # The divergence is what differences of log-probabilities of about 3 leave, so those of float32 count.
    assert shared[0] == pytest.approx(alone[0], rel=1e-6, abs=3e-7)
    for before, after in zip(alone, shared, strict=True):
        # What rounding leaves after some steps of Adam.
        assert after == pytest.approx(before, rel=5e-4)
    assert min(divergence for _, divergence, _ in alone) > 0.01


@pytest.mark.parametrize("name", ["memory", "adapters", "sequence"])
def test_a_stopped_run_continues_bit_for_bit(root, name):
    assert curve(root / "two" / name) == curve(root / "again" / name)
    tag = f"checkpoints/step_{STEPS:08d}"
    whole, again = (open_checkpoint(root / kind / name / tag).parameters for kind in ("two", "again"))
    assert whole.keys() == again.keys()
    for weight, stored in whole.items():
        assert torch.equal(whole_tensor(stored), whole_tensor(again[weight])), weight


def test_validation_has_no_teacher(root):
    validations = records(root / "one/memory", "validation")
    assert validations and not any("divergence" in record for record in validations)
