"""Every row of FAMILIES and MEMORIES trained under ZeRO-3, saved and exported; new rows need no edit here."""

import pytest
import torch
from support.models import BASES, accepted
from support.ranks import spawn
from transformers import AutoModelForCausalLM

from armt_dist.checkpoint.export import export
from armt_dist.model.backbone import FAMILIES
from armt_dist.model.configuration_armt import MEMORIES

pytestmark = pytest.mark.slow

RUNS = {family: (family, {}) for family in FAMILIES}
RUNS |= {f"llama_{kind}": ("llama", {"memory_kind": kind}) for kind in MEMORIES if kind != "armt"}
RUNS |= {
    f"llama_{kind}_window": ("llama", {"memory_kind": kind, "sliding_window": 3})
    for kind, row in MEMORIES.items()
    if "sliding_window" in row.own_fields
}
TEST_IDS = torch.randint(0, 12, (2, 11), generator=torch.Generator().manual_seed(0))


def train(ranks, root):
    """A run of two steps each, with a checkpoint after the second. Returns the trained models' logits."""
    from armt_dist.config import validate
    from armt_dist.monitoring.lease import Lease
    from armt_dist.training.run_config import RunConfig
    from armt_dist.training.trainer import Trainer

    logits = {}
    for name, (family, options) in RUNS.items():
        base, kind = {"model_type": family, **BASES[family]}, options.get("memory_kind", "armt")
        config = {
            "model": {"base_config": base, **accepted(kind, num_mem_tokens=2, d_mem=4), **options},
            "data": {"task": "rewrite", "retrieval": {"symbols": 8}},
            "train": {"save_every": 2, "validate_every": 2, "validation_steps": 1},
            "curriculum": [{"pairs": 2, "steps": 2}],
        }
        ds = {"train_batch_size": 4, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
        trainer = Trainer(validate(RunConfig, config), ds, root / name, ranks, torch.device("cpu"), Lease(root / name))
        assert trainer.run("never") == 0, name
        trainer.engine.eval()
        with torch.no_grad():
            logits[name] = trainer.runner.model(TEST_IDS).logits
        trainer.engine.destroy()
    return logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of the runs, and the trained models' logits by run."""
    root = tmp_path_factory.mktemp("runs")
    first, second = spawn(2, train, root, timeout_s=600)
    for name in RUNS:
        assert torch.equal(first[name], second[name]), f"{name}: the ranks differ"
    return root, first


@pytest.mark.parametrize("name", RUNS)
@torch.no_grad()
def test_the_export_of_a_checkpoint_is_the_trained_model(name, trained, tmp_path):
    root, logits = trained
    export(root / name, tmp_path / "model", "latest", "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True).eval()
    assert (model(TEST_IDS).logits - logits[name]).abs().max() <= 1e-5
