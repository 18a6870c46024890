"""A checkpoint on another number of ranks, or with other groups of the optimizer: every value of every state is what it
was, to the bit."""

import shutil

import pytest
import torch
from support.hostile import make_hashes_fit
from support.models import TINY_LLAMA
from support.ranks import spawn

from armt_dist.config import ConfigError

pytestmark = pytest.mark.slow

GPT2 = {"model_type": "gpt2", "n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 8}
# Name -> model, bf16, ZeRO-3's settings. Small groups: there are more of them on fewer ranks.
RUNS = {
    "frozen_bf16": ({"base_config": GPT2, "freeze_mem": True}, True, {"sub_group_size": 300}),
    "one_group": ({"base_config": TINY_LLAMA}, False, {"stage3_param_persistence_threshold": 0}),
    "regrouped": ({"base_config": TINY_LLAMA}, False, {}),
}
# Without weight decay there is one group, as in checkpoints of before there were groups.
DECAYS = {"regrouped": 0.1}
GROUPS = {"regrouped": [{"match": ["*.memory.*"], "lr_scale": 2}, {"match": ["*.self_attn.*"], "weight_decay": 0.3}]}


def start_run(ranks, out, model: dict, bf16: bool, zero: dict, groups: list = (), decay: float = 0.0):
    """A trainer for two steps."""
    from armt_dist.config import validate
    from armt_dist.monitoring.lease import Lease
    from armt_dist.training.run_config import RunConfig
    from armt_dist.training.trainer import Trainer

    config = {
        "model": {**model, "num_mem_tokens": 2, "d_mem": 4},
        "data": {"task": "rewrite", "retrieval": {"symbols": 8}},
        "train": {"save_every": 2, "validate_every": 5, "optimizer_groups": list(groups)},
        "curriculum": [{"pairs": 2, "steps": 2}],
    }
    ds = {"train_batch_size": 12, "zero_optimization": {"stage": 3, **zero}, "bf16": {"enabled": bf16}}
    ds["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": decay}}
    return Trainer(validate(RunConfig, config), ds, out, ranks, torch.device("cpu"), Lease(out))


def held(trainer) -> dict:
    """All values of all states, whole, and the counters."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    values = {}
    for name, parameter in trainer.engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            values[name] = parameter.detach().clone()
        if parameter.requires_grad:
            values[name, "master"] = safe_get_full_fp32_param(parameter).clone()
            for state in ("exp_avg", "exp_avg_sq"):
                values[name, state] = safe_get_full_optimizer_state(parameter, state).clone()
    states = trainer.engine.optimizer.optimizer.state.values()
    (steps,) = {float(state["step"]) for state in states}
    # The optimizer counts in place.
    assert len({id(state["step"]) for state in states}) == len(states), "groups share a counter"
    engine = trainer.engine
    counters = {"step": steps, "global": engine.global_steps, "samples": engine.global_samples}
    return values | {name: torch.tensor(float(count)) for name, count in counters.items()}


def train(ranks, root) -> dict:
    """Train each run; what it holds at its end."""
    found = {}
    for name, run in RUNS.items():
        trainer = start_run(ranks, root / name, *run)
        assert trainer.run("never") == 0
        found[name] = held(trainer)
        trainer.engine.destroy()
    return found


def load(ranks, root) -> dict:
    """Load each run's checkpoint, into a fresh engine and again into one that has states; what it holds then."""
    found = {}
    for name, run in RUNS.items():
        decay = DECAYS.get(name, 0.0)
        trainer = start_run(ranks, root / name, *run, GROUPS.get(name, ()), decay)
        for _ in range(2):
            trainer.restore("auto")
            found[name] = held(trainer)
            settings = [(g["lr_scale"], g["weight_decay"]) for g in trainer.engine.optimizer.param_groups]
            expected = {(2, decay), (2, 0.0), (1, 0.3), (1, decay), (1, 0.0)} if name in GROUPS else {(1, 0.0)}
            assert set(settings) == expected and len(settings) == len(expected), "the settings of this run hold"
            for group in trainer.engine.optimizer.fp32_partitioned_groups_flat:
                group.data.zero_()
        trainer.restore("auto")
        assert trainer.run("auto") == 0
        trainer.engine.destroy()
    return found


def load_what_does_not_fit(ranks, root) -> list[str]:
    """What is said of a checkpoint of another model, and of one with a shard that is too short."""
    from armt_dist.checkpoint.load import load_checkpoint

    said = []
    for name in ("another", "short"):
        model = {"base_config": {**TINY_LLAMA, "intermediate_size": 24 if name == "another" else 20}}
        trainer = start_run(ranks, root / name, model, *RUNS["one_group"][1:])
        with pytest.raises(ConfigError) as caught:
            load_checkpoint(trainer.engine, root / "one_group/checkpoints", "step_00000002", trainer.say)
        said.append(str(caught.value))
        if ranks.rank == 0 and name == "another":
            shorten(root / "one_group/checkpoints/step_00000002")
        torch.distributed.barrier()
        trainer.engine.destroy()
    return said


def shorten(folder) -> None:
    """Let the master weights of old rank 1 end early."""
    path = next(folder.glob("*rank_1_*optim_states.pt"))
    content = torch.load(path, weights_only=False)
    flats = content["optimizer_state_dict"]["fp32_flat_groups"]
    flats[-1] = flats[-1][:-3].clone()
    torch.save(content, path)
    make_hashes_fit(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of runs made by three ranks, and what they held."""
    root = tmp_path_factory.mktemp("runs")
    return root, spawn(3, train, root)[0]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_value_is_what_it_was(trained, world, tmp_path):
    root, before = trained
    shutil.copytree(root, tmp_path / "runs")
    for after in spawn(world, load, tmp_path / "runs"):
        for name in RUNS:
            assert after[name].keys() == before[name].keys()
            for value in before[name]:
                assert torch.equal(after[name][value], before[name][value]), (name, value)


def test_what_does_not_fit_is_said_by_all_ranks(trained, tmp_path):
    root, _ = trained
    shutil.copytree(root, tmp_path / "runs")
    first, second = spawn(2, load_what_does_not_fit, tmp_path / "runs")
    assert first == second
    another, short = first
    assert "does not fit this run" in another and "] in it, [" in another
    assert "does not fit this run" in short and "holds 3 values too few" in short
