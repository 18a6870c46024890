"""RMT and the segment-major order through the engine: ZeRO-3, two ranks, lengths that change."""

import pytest
import torch
from support.golden import TOLERANCES, assert_close
from support.models import small_model
from support.oracle import GRID, random_batch, shifted
from support.ranks import spawn

SEGMENT = 8
RUNS = {
    "rmt": (dict(memory_kind="rmt"), None),
    "rmt_window": (dict(memory_kind="rmt", sliding_window=5), None),
    "segment_major": ({}, "segment_major"),
}
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
# Less than the norm of any step's gradient.
CLIP = 0.5
# Segments of the steps: gathers of earlier steps are no guide to the later ones.
LENGTHS = (4, 4, 4, 2, 5)


def model_of(name):
    """Its own rounding stays far below the tolerances."""
    return small_model(d_mem=16, base=dict(initializer_range=0.1), **RUNS[name][0])


def batches():
    for seed, segments in enumerate(LENGTHS):
        yield random_batch(tokens=segments * SEGMENT - 3, pad=0, seed=seed)


def train(ranks, folders):
    """Losses and final weights of each run, every rank with its rows."""
    import deepspeed

    from armt_dist.config import validate as section
    from armt_dist.runtime.executor import ScheduledLM, run_backward
    from armt_dist.runtime.piece import cut_piece
    from armt_dist.zero3 import partitioned_model
    from armt_dist.zero3.ds_config import prepare
    from armt_dist.zero3.engine import start_engine

    found, device = {}, torch.device("cpu")
    for name, (_, schedule_name) in RUNS.items():
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        ds = {"train_batch_size": 4, "zero_optimization": zero, "optimizer": {"type": "AdamW", "params": ADAMW}}
        ds["gradient_clipping"] = CLIP
        prepared = prepare(ds, ranks.world_size, ranks.world_size, device)
        config = section(partitioned_model.ModelConfig, {"base": str(folders / name)})
        armt = partitioned_model.armt_config(config, {}, None)
        model = partitioned_model.build_model(config, armt, prepared.ds_config, seed=0)
        runner = ScheduledLM(model)
        grid = GRID._replace(layers=armt.num_hidden_layers, chunks=2)
        trained, losses = start_engine(runner, prepared.ds_config, grid, device), []
        rows = slice(ranks.rank * 2, ranks.rank * 2 + 2)
        for ids, labels, _ in batches():
            labels = shifted(labels)
            totals = trained(cut_piece(ids[rows], labels[rows], None, armt, grid, schedule_name=schedule_name))
            run_backward(trained, totals.nll * ranks.world_size / (labels >= 0).sum())
            trained.step()
            losses.append(totals.nll.detach() / (labels >= 0).sum())
            torch.distributed.all_reduce(losses[-1])
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            found[name] = losses, {n: p.detach().clone() for n, p in model.named_parameters()}
        trained.destroy()
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name in RUNS:
        model_of(name).save_pretrained(root / name)
    return spawn(2, train, root)[0]


@pytest.mark.parametrize("name", RUNS)
def test_steps_of_adamw(name, trained):
    """ZeRO-3, two ranks, lengths that change; a layer is called once per segment."""
    losses, weights = trained[name]
    model = model_of(name)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    for t, (ids, labels, _) in enumerate(batches()):
        loss = model(ids, labels=labels).loss
        assert_close(f"loss of step {t}", losses[t], loss.detach(), TOLERANCES["trajectory_loss"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    for parameter, value in model.named_parameters():
        assert_close(parameter, weights[parameter], value, TOLERANCES["weights"], relative=True)
