"""The training path: real DeepSpeed engine and ZeRO-3, against the golden cases and the oracle."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support import golden
from support.ranks import spawn

from armt_dist.schedule.grid import Grid
from armt_dist.zero3 import engine as engines
from armt_dist.zero3.ds_config import prepare

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
# Everything is released after use, so that nothing works only because a parameter happened to be whole.
ZERO = {"stage": 3, "stage3_param_persistence_threshold": 0}


def engine_on(folder, world, **ds_config):
    """An engine on an imported model. Returns it with its runner and configuration."""
    from armt_dist.config import validate as section
    from armt_dist.runtime import executor
    from armt_dist.zero3 import partitioned_model

    ds = {"train_batch_size": 2, "zero_optimization": ZERO, **ds_config}
    prepared = prepare(ds, world, world, CPU)
    config = section(partitioned_model.ModelConfig, {"base": str(folder)})
    armt = partitioned_model.armt_config(config, {}, None)
    model = partitioned_model.build_model(config, armt, prepared.ds_config, seed=0)
    runner = executor.ScheduledLM(model, states="rebuild")
    grid = Grid(segments=1, layers=armt.num_hidden_layers)
    return engines.start_engine(runner, prepared.ds_config, grid, CPU), runner, armt, grid


def step(engine, armt, grid, ranks, io, labels, drop_full_masks=False):
    """Forward and backward of one batch of two rows, spread over the ranks. Returns the global mean loss."""
    from armt_dist.runtime.piece import cut_piece

    shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
    rows = slice(ranks.rank * 2 // ranks.world_size, (ranks.rank + 1) * 2 // ranks.world_size)
    mask = io["attention_mask"][rows]
    mask = None if drop_full_masks and mask.all() else mask
    piece = cut_piece(io["input_ids"][rows], shifted[rows], mask, armt, grid)
    totals = engine(piece)
    scored = (shifted >= 0).sum()
    engine.backward(totals.nll * ranks.world_size / scored)
    nll = totals.nll.detach().clone()
    torch.distributed.all_reduce(nll)
    return (nll / scored).item()


def golden_gradients(ranks, folders):
    """Loss and every full gradient of every case."""
    from deepspeed.utils import safe_get_full_grad

    results = {}
    for name, folder in folders.items():
        case = golden.load_case(name)
        engine, runner, armt, grid = engine_on(folder, ranks.world_size)
        engine.eval()
        loss = step(engine, armt, grid, ranks, case.io, case.labels)
        gradients = {n: safe_get_full_grad(p) for n, p in runner.model.named_parameters() if p.requires_grad}
        results[name] = loss, {n: g.clone() for n, g in gradients.items()}
        engine.destroy()
    return results


def trajectory(ranks, folder):
    """Six AdamW steps: losses, gradient norms and final weights."""
    import deepspeed

    batches = load_file(golden.GOLDEN / "armt_v2_llama_trajectory" / "batches.safetensors")
    options = json.loads((golden.GOLDEN / "armt_v2_llama_trajectory" / "config.json").read_text())
    optimizer = {"lr": options["lr"], "betas": options["betas"], "eps": options["eps"]}
    engine, runner, armt, grid = engine_on(
        folder,
        ranks.world_size,
        optimizer={"type": "AdamW", "params": {**optimizer, "weight_decay": options["weight_decay"]}},
        gradient_clipping=options["clip_grad_norm"],
    )
    losses, norms = [], []
    for t in range(options["steps"]):
        io = {
            name.removeprefix(f"step{t}."): tensor for name, tensor in batches.items() if name.startswith(f"step{t}.")
        }
        losses.append(step(engine, armt, grid, ranks, io, golden.hf_labels(io)))
        engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    weights = {}
    for name, parameter in runner.model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            weights[name] = parameter.detach().clone()
    return losses, norms, weights


def uneven_padding(ranks, folder):
    """Steps in which now one rank's rows are padded and now another's, after ZeRO-3 has its trace."""
    engine, _, armt, grid = engine_on(folder, ranks.world_size)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for t in range(8):
        ids = torch.randint(0, 97, (2, 57), generator=generator)
        mask = torch.ones_like(ids)
        if t >= 4:
            mask[t % 2, 20:] = 0
        io = {"input_ids": ids, "attention_mask": mask}
        losses.append(step(engine, armt, grid, ranks, io, ids.masked_fill(mask == 0, -100), drop_full_masks=True))
        engine.step()
    return losses


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every golden case as a Hugging Face folder."""
    root = tmp_path_factory.mktemp("golden")
    for name in golden.CASES:
        golden.load_model(name).save_pretrained(root / name)
    golden.load_trajectory_model().save_pretrained(root / "trajectory")
    return root


@pytest.mark.parametrize("world", [1, 2])
def test_golden_gradients(world, folders):
    results = spawn(world, golden_gradients, {name: folders / name for name in golden.CASES}, timeout_s=300)
    for rank, by_case in enumerate(results):
        for name, (loss, gradients) in by_case.items():
            case = golden.load_case(name)
            where = f"{name}, rank {rank} of {world}"
            golden.assert_close(f"{where}: loss", torch.tensor(loss), case.io["loss"][0], golden.TOLERANCES["loss"])
            golden.assert_gradients(gradients, golden.golden_gradients(case))


@pytest.mark.parametrize("world", [1, 2])
def test_golden_trajectory(world, folders):
    folder = golden.GOLDEN / "armt_v2_llama_trajectory"
    options = json.loads((folder / "config.json").read_text())
    final = golden.our_weights(load_file(folder / "weights_final.safetensors"))
    for losses, norms, weights in spawn(world, trajectory, folders / "trajectory"):
        for t, loss in enumerate(losses):
            assert abs(loss - options["losses"][t]) <= golden.TOLERANCES["trajectory_loss"], f"loss of step {t}"
            norm = options["grad_norms_before_clip"][t]
            assert abs(norms[t] - norm) <= golden.norm_tolerance(t) * norm, (
                f"gradient norm of step {t}: {norms[t]} instead of {norm}"
            )
        for name, weight in weights.items():
            golden.assert_close(name, weight, final[name], golden.TOLERANCES["weights"], relative=True)


def test_padding_on_one_rank_alone(folders):
    """A rank that called its modules in another order than before would gather otherwise than the others: a hang."""
    (alone,) = spawn(1, uneven_padding, folders / "trajectory")
    for losses in spawn(2, uneven_padding, folders / "trajectory", timeout_s=90):
        assert losses == pytest.approx(alone, rel=1e-5)
