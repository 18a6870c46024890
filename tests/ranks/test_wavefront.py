"""The wavefront: loss, every gradient and the weights after several steps equal the single-process oracle's, through
the real DeepSpeed engine, however a sequence is spread over ranks, rounds and chunks; and a lost rank is named."""

import itertools
import multiprocessing
import os
import signal
import socket
import sys
import time

import pytest
import torch
from support import golden
from support.models import accepted, small_model
from support.oracle import oracle, random_batch, random_starts, shifted
from support.ranks import spawn

from armt_dist.distributed import rendezvous as parallel
from armt_dist.distributed.launchers import Ranks
from armt_dist.distributed.mesh import make_mesh, ring
from armt_dist.schedule.grid import Grid
from armt_dist.zero3.sections import OptimizerGroup
from armt_dist.zero3.trained_parameters import freeze_parameters, set_rates

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
# How the backward has the state that entered a cell, the share of the cells that are not run again, and whether weight
# gradients are put off.
WAYS = (
    ("store", 0, False),
    ("rebuild", 0.5, True),
    ("recompute", 0.4, False),
    ("store", 1, True),
    ("rebuild", 0, True),
    ("recompute", 0, False),
)
BATCH = 4
PASSES = 2
# World -> (sp, rounds, chunks): of few ranks all of 1 and 2, of many every pair of values. 16 ranks are too many for a
# test.
LAYOUTS = {1: list(itertools.product((1,), (1, 2), (1, 2))), 2: list(itertools.product((2, 1), (1, 2), (1, 2)))}
LAYOUTS |= {world: [(world, 1, 1), (world, 2, 2), (world // 2, 1, 2), (world // 2, 2, 1)] for world in (4, 8)}
GOLDEN_WORLDS = (2, 4)
# World -> layout and accumulation steps of the AdamW steps.
ADAMW = {2: ((2, 2, 1), 1), 4: ((2, 2, 2), 2)}
ADAMW_STEPS = 4
WINDOWS = {
    "window": dict(sliding_window=6, sink=1, state_decay="learned"),
    "transformer_xl": dict(memory_kind="transformer_xl"),
}
# Of two ranks.
WINDOW_LAYOUT = (2, 2, 2)
# What is frozen -> patterns; in `low`, the lowest layer and all below it, which then run forward only.
FREEZES = {"base": "base", "low": ["*embed_tokens*", "memory_tokens.*", "*.layers.0.*"]}
FROZEN_LAYOUTS = {1: [(1, 2, 1)], 2: [(1, 1, 2), (2, 2, 1)]}
# Less than the norm of any step's gradient.
CLIP = 0.5
# Steps that change nothing.
STILL = {"type": "AdamW", "params": {"lr": 1e-30, "weight_decay": 0.0}}
# Rates and weight decays of their own: the memory, and one matrix.
GROUPS = [
    OptimizerGroup(match=["*.memory.*"], lr_scale=0.5),
    OptimizerGroup(match=["*.0.layer.mlp.up_proj.weight"], lr=2e-4, weight_decay=0.4),
]
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def batch_for(seed):
    """Rows of 17 segments (odd seeds) or 19, so that blocks differ in length; a row's last is nothing but padding."""
    return random_batch(tokens=(17 if seed % 2 else 19) * 8 - 3, batch=BATCH, pad=12, seed=seed)


def engine_on(
    folder,
    ranks,
    layout,
    states="store",
    keep=0,
    grouped=False,
    rows=BATCH,
    timeout_s=60,
    offload=False,
    graphs=False,
    window=None,
    freeze=None,
    groups=(),
    **ds_config,
):
    """An engine that keeps no parameter whole after use; its runner, the model's configuration, grid and mesh."""
    from armt_dist.config import validate as section
    from armt_dist.runtime import executor, handoff
    from armt_dist.schedule.kept_cells import Keep
    from armt_dist.zero3 import partitioned_model
    from armt_dist.zero3.ds_config import prepare
    from armt_dist.zero3.engine import start_engine
    from armt_dist.zero3.trained_parameters import freeze_parameters, parameter_groups

    sp, rounds, chunks = layout
    mesh = make_mesh(ranks, sp)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    ds = {"train_batch_size": rows, "zero_optimization": zero, **ds_config}
    prepared = prepare(ds, mesh.dp, ranks.world_size, CPU)
    config = section(partitioned_model.ModelConfig, {"base": str(folder)})
    armt = partitioned_model.armt_config(config, {}, None)
    model = partitioned_model.build_model(config, armt, prepared.ds_config, seed=0)
    freeze_parameters(model, freeze)
    link = handoff.Wire(*ring(mesh, timeout_s), CPU) if sp > 1 else None
    options = {"states": states, "keep": Keep(keep), "grouped": grouped, "offload": offload, "graphs": graphs}
    runner = executor.ScheduledLM(model, link=link, **options)
    grid = Grid(1, armt.num_hidden_layers, sp, rounds, chunks)
    groups = parameter_groups(model, groups, prepared.ds_config["optimizer"]["params"])
    return start_engine(runner, prepared.ds_config, grid, CPU, groups, window), runner, armt, grid, mesh


def step(parts, ranks, ids, labels, mask, starts=None):
    """Forward and backward of a global batch, its rows spread over accumulation steps and dp ranks. The mean loss."""
    from armt_dist.runtime.executor import run_backward
    from armt_dist.runtime.piece import cut_piece

    engine, _, armt, grid, mesh = parts
    accumulation = engine.gradient_accumulation_steps()
    labels = shifted(labels if starts is None else labels.masked_fill(starts, -100))
    scored, rows = (labels >= 0).sum(), len(ids) // mesh.dp // accumulation
    total = torch.zeros(())
    for micro in range(accumulation):
        start = (micro * mesh.dp + mesh.dp_rank) * rows
        own = slice(start, start + rows)
        starts_here = None if starts is None else starts[own]
        more = {"sp_rank": mesh.sp_rank, "document_starts": starts_here}
        totals = engine(cut_piece(ids[own], labels[own], mask[own], armt, grid, **more))
        run_backward(engine, totals.nll * ranks.world_size * accumulation / scored)
        total += totals.nll.detach()
        if micro < accumulation - 1:
            engine.step()
    torch.distributed.all_reduce(total)
    return total / scored


def full_gradients(runner):
    from deepspeed.utils import safe_get_full_grad

    return {n: safe_get_full_grad(p).clone() for n, p in runner.model.named_parameters() if p.requires_grad}


def run_layouts(ranks, folder):
    """Loss and gradients of each layout. The second pass has a complete order of gathers: it prefetches.

    With two rounds the layer inputs wait in host memory; with two chunks cells are recorded, with one only one layer is
    gathered ahead.
    """
    found = {}
    for layout, way in zip(LAYOUTS[ranks.world_size], itertools.cycle(WAYS), strict=False):
        _, rounds, chunks = layout
        options = dict(offload=rounds == 2, graphs=chunks == 2, window=1 if chunks == 1 else None)
        parts = engine_on(folder, ranks, layout, *way, **options, optimizer=STILL)
        for attempt in range(PASSES):
            loss = step(parts, ranks, *batch_for(1))
            found[layout, way, attempt] = loss, full_gradients(parts[1])
            parts[0].step()
        parts[0].destroy()
    return found


def run_window(ranks, folder):
    """Loss and gradients where keys and values are handed on with the memory; and where documents are packed."""
    parts = engine_on(folder, ranks, WINDOW_LAYOUT, "rebuild", optimizer=STILL)
    found = [(step(parts, ranks, *batch_for(1)), full_gradients(parts[1]))]
    parts[0].step()
    batch = batch_for(1)
    found.append((step(parts, ranks, *batch, random_starts(batch[0])), full_gradients(parts[1])))
    parts[0].destroy()
    return found


def run_frozen(ranks, folder):
    """Loss, gradients, and how many elements were reduced, with a part of the model frozen."""
    found = {}
    for name, layout in itertools.product(FREEZES, FROZEN_LAYOUTS.get(ranks.world_size, ())):
        parts = engine_on(folder, ranks, layout, "rebuild", graphs=True, freeze=FREEZES[name], optimizer=STILL)
        flat = sum(group.numel() for group in parts[0].optimizer.fp32_partitioned_groups_flat) * ranks.world_size
        for attempt in range(PASSES):
            loss = step(parts, ranks, *batch_for(1))
            found[name, layout, attempt] = loss, full_gradients(parts[1]), flat
            parts[0].step()
        parts[0].destroy()
    return found


def run_golden(ranks, folders):
    """Loss and gradients of the golden cases, one segment or two a rank."""
    found = {}
    for name in LONG_ENOUGH if ranks.world_size in GOLDEN_WORLDS else ():
        io, labels = golden.load_case(name).io, golden.load_case(name).labels
        parts = engine_on(folders / name, ranks, (ranks.world_size, 1, 1), rows=len(labels))
        parts[0].eval()
        found[name] = step(parts, ranks, io["input_ids"], labels, io["attention_mask"]), full_gradients(parts[1])
        parts[0].destroy()
    return found


def run_adamw(ranks, folder):
    """Losses of several steps, evaluation between them; the weights after the last; whether gathers ran ahead; how
    often a layer was released after a backward."""
    import deepspeed

    from armt_dist.model.modeling_armt import ARMTLayer
    from armt_dist.runtime.piece import cut_piece

    if ranks.world_size not in ADAMW:
        return None
    layout, accumulation = ADAMW[ranks.world_size]
    optimizer = {"type": "AdamW", "params": OPTIONS}
    options = {"gradient_accumulation_steps": accumulation, "gradient_clipping": CLIP}
    parts = engine_on(folder, ranks, layout, optimizer=optimizer, groups=GROUPS, **options)
    engine, runner, armt, grid, mesh = parts
    losses, ahead = [], []
    gathers = engine.optimizer.parameter_offload.get_param_coordinator()
    releases, release = [], gathers.release_sub_module

    def counted(module, forward=False):
        releases.append(isinstance(module, ARMTLayer) and not forward)
        release(module, forward)

    gathers.release_sub_module = counted
    for t in range(ADAMW_STEPS):
        losses.append(step(parts, ranks, *batch_for(t)))
        ahead.append(gathers.is_complete_trace())
        rates = set_rates(engine.optimizer.param_groups, OPTIONS["lr"])
        assert rates == {"lr": OPTIONS["lr"], "lr_group_0": OPTIONS["lr"] * 0.5, "lr_group_1": 2e-4}
        engine.step()
        with torch.no_grad():
            ids, labels, mask = batch_for(100)
            engine.eval()
            engine(cut_piece(ids, shifted(labels), mask, armt, grid, mesh.sp_rank), count=True)
            engine.train()
    weights = {}
    for name, parameter in runner.model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            weights[name] = parameter.detach().clone()
    return losses, weights, ahead, sum(releases)


def run_all(ranks, folders):
    """Everything of one world, so that its processes are started once. From rank 0."""
    found = run_layouts(ranks, folders / "random"), run_golden(ranks, folders), run_adamw(ranks, folders / "random")
    windows = {name: run_window(ranks, folders / name) for name in WINDOWS} if ranks.world_size == 2 else None
    found = *found, windows, run_frozen(ranks, folders / "random")
    return found if ranks.rank == 0 else None


LONG_ENOUGH = [name for name in golden.CASES if name != "armt_v2_llama_single_segment" and not name.startswith("rmt_")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The models as Hugging Face folders."""
    root = tmp_path_factory.mktemp("models")
    random_model().save_pretrained(root / "random")
    for name, options in WINDOWS.items():
        random_model(**options).save_pretrained(root / name)
    for name in LONG_ENOUGH:
        golden.load_model(name).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def results(folders):
    """What each world found, run when first asked for."""
    found = {}

    def of(world):
        if world not in found:
            found[world] = spawn(world, run_all, folders, timeout_s=300)[0]
        return found[world]

    return of


def random_model(**options):
    """One whose own rounding, of rows one by one instead of together, stays far below the tolerances."""
    sizes = accepted(options.get("memory_kind", "armt"), d_mem=16)
    return small_model(base=dict(num_hidden_layers=3, initializer_range=0.1), **sizes, **options)


@pytest.mark.parametrize("world", LAYOUTS)
def test_loss_and_gradients(world, results):
    model = random_model()
    loss, gradients = oracle(model, *batch_for(1))
    layouts = results(world)[0]
    assert len(layouts) == PASSES * len(LAYOUTS[world])
    for (layout, way, attempt), found in layouts.items():
        where = f"world {world}, (sp, rounds, chunks) {layout}, {way}, pass {attempt}"
        golden.assert_close(f"{where}: loss", found[0], loss, golden.TOLERANCES["loss"])
        golden.assert_gradients(found[1], gradients, where)


@pytest.mark.parametrize("world", FROZEN_LAYOUTS)
def test_frozen_parameters(world, results):
    found = results(world)[4]
    assert len(found) == PASSES * len(FREEZES) * len(FROZEN_LAYOUTS[world])
    for (name, layout, attempt), (found_loss, found_gradients, flat) in found.items():
        model = random_model()
        freeze_parameters(model, FREEZES[name])
        loss, gradients = oracle(model, *batch_for(1))
        where = f"{name} frozen, world {world}, {layout}, pass {attempt}"
        golden.assert_close(f"{where}: loss", found_loss, loss, golden.TOLERANCES["loss"])
        golden.assert_gradients(found_gradients, gradients, where)
        trained = sum(gradient.numel() for gradient in gradients.values())
        # The optimizer's share of a parameter is padded to equal parts.
        assert trained <= flat <= trained + world * len(gradients), f"{where}: elements with an optimizer state"


@pytest.mark.parametrize("world", GOLDEN_WORLDS)
def test_golden_cases(world, results):
    cases = results(world)[1]
    assert set(cases) == set(LONG_ENOUGH)
    for name, (loss, gradients) in cases.items():
        case, where = golden.load_case(name), f"{name}, sp {world}"
        golden.assert_close(f"{where}: loss", loss, case.io["loss"][0], golden.TOLERANCES["loss"])
        golden.assert_gradients(gradients, golden.golden_gradients(case), where)


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_is_handed_on(name, results):
    """With its gradient, unless it is detached: a rank's first segment reads the other rank's last keys and values."""
    loss, gradients = oracle(random_model(**WINDOWS[name]), *batch_for(1))
    found = results(2)[3][name][0]
    golden.assert_close("loss", found[0], loss, golden.TOLERANCES["loss"])
    golden.assert_gradients(found[1], gradients)


@pytest.mark.parametrize("name", WINDOWS)
def test_packed_documents_on_two_ranks(name, results):
    batch = batch_for(1)
    loss, gradients = oracle(random_model(**WINDOWS[name]), *batch, random_starts(batch[0]))
    found = results(2)[3][name][1]
    golden.assert_close("loss", found[0], loss, golden.TOLERANCES["loss"])
    golden.assert_gradients(found[1], gradients)


def settings_of(name, parameter):
    """A group of AdamW for one parameter, as GROUPS and the defaults have it."""
    group = {"params": [parameter], "weight_decay": OPTIONS["weight_decay"]}
    if parameter.ndim < 2 or name == "memory_tokens.weight":
        group["weight_decay"] = 0.0
    if "memory." in name:
        group["lr"] = OPTIONS["lr"] * 0.5
    if name == "base.model.layers.0.layer.mlp.up_proj.weight":
        group.update(lr=2e-4, weight_decay=0.4)
    return group


@pytest.mark.parametrize("world", ADAMW)
def test_steps_of_adamw(world, results):
    """With rounds, accumulation, changing lengths and evaluation between the steps."""
    losses, weights, ahead, releases = results(world)[2]
    (_, rounds, _), accumulation = ADAMW[world]
    calls = rounds * random_model().config.num_hidden_layers * accumulation * ADAMW_STEPS
    assert releases == calls, "layers stay gathered after a backward, so that nothing is gathered ahead in the next"
    assert ahead[1:] == [True] * (ADAMW_STEPS - 1), "the order of modules changed, so nothing is gathered ahead"
    model = random_model()
    optimizer = torch.optim.AdamW([settings_of(*named) for named in model.named_parameters()], **OPTIONS)
    for t in range(ADAMW_STEPS):
        ids, labels, mask = batch_for(t)
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP) > CLIP
        optimizer.step()
        optimizer.zero_grad()
        golden.assert_close(f"loss of step {t}", losses[t], loss.detach(), golden.TOLERANCES["trajectory_loss"])
    for name, weight in model.named_parameters():
        golden.assert_close(name, weights[name], weight.detach(), golden.TOLERANCES["weights"], relative=True)


LOST_TIMEOUT_S = 15


def lose_rank_1(rank, port, folder, how, log):
    """Train until rank 1 is lost; stderr goes to a file of each rank."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.dup2(os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    ranks = Ranks(rank, 3, rank, 3, "environment")
    parallel.start(ranks, LOST_TIMEOUT_S)
    from armt_dist.monitoring.watchdog import end_when_alone

    parts = engine_on(folder, ranks, (3, 1, 1), timeout_s=LOST_TIMEOUT_S)
    link, send = parts[1].link, parts[1].link.send

    def faulty(instruction, state):
        if rank == 1 and instruction.layer == 1:
            # The first such instruction is of the forward.
            if how == "dies":
                os._exit(9)
            elif instruction.op == "SEND_GRAD":
                os.kill(os.getpid(), signal.SIGSTOP)
        send(instruction, state)

    step(parts, ranks, *batch_for(1))
    link.send = faulty
    with end_when_alone(parts[1].at):
        step(parts, ranks, *batch_for(1))


@pytest.mark.parametrize("how", ["dies", "stops"])
def test_a_lost_rank_is_named_and_nobody_hangs(how, folders, tmp_path):
    context = multiprocessing.get_context("spawn")
    arguments = (parallel.free_port(), folders / "random", how, tmp_path / "stderr")
    workers = [context.Process(target=lose_rank_1, args=(rank, *arguments), daemon=True) for rank in range(3)]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + 100 + LOST_TIMEOUT_S
    for rank in (0, 2):
        workers[rank].join(max(0, deadline - time.monotonic()))
        assert workers[rank].exitcode == 1, f"rank {rank}: exit code {workers[rank].exitcode}"
        lines = [line for line in (tmp_path / f"stderr.{rank}").read_text().splitlines() if line.startswith("error:")]
        assert len(lines) == 1 and f"rank {rank} on {socket.gethostname()} lost another rank in " in lines[0], lines
        assert "(layer " in lines[0] and f" b{rank}" in lines[0], lines
    workers[1].kill()
