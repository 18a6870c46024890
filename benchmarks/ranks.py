"""What the benchmarks of several ranks share: a tiny model behind the real engine, cells of a given length, results."""

import datetime
import os
import re
import shlex
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
RESULTS = ROOT / "benchmarks" / "results"

from support.ranks import spawn  # noqa: E402, F401

CPU = torch.device("cpu")
# Instructions in which a cell is run again.
BACKWARD = ("RERUN", "BACK")


def tiny_engine(ranks, layout, layers: int, segment_tokens: int, *, width: int = 32, zero=None, wrap=None, **options):
    """A random Llama-shaped ARMT behind the engine, nothing kept whole after use: runner, engine, config, grid, mesh.

    `layout`: ParallelConfig. The ds_config leaves windows and buckets to be derived, as a user's would, apart from
    those in `zero`. `wrap` may put another module in the runner's place; `options` are those of ScheduledLM.
    """
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, **(zero or {})}
    ds = {"train_micro_batch_size_per_gpu": layout.chunks, "zero_optimization": zero}
    base = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 64,
    }
    memory = {"num_mem_tokens": 2, "d_mem": 8, "segment_tokens": segment_tokens}
    return real_engine(ranks, layout, base, memory, ds, CPU, wrap, **options)


def real_engine(ranks, layout, base: dict, memory: dict, ds: dict, device: torch.device, wrap=None, **options):
    """A random model behind the engine as the trainer builds it: runner, engine, config, grid, mesh."""
    from armt_dist.config import validate as section
    from armt_dist.distributed.mesh import make_mesh, ring
    from armt_dist.runtime import executor, handoff
    from armt_dist.schedule.grid import Grid
    from armt_dist.zero3 import partitioned_model
    from armt_dist.zero3.ds_config import prepare
    from armt_dist.zero3.engine import start_engine

    mesh = make_mesh(ranks, layout.sp)
    prepared = prepare(ds, mesh.dp, ranks.world_size, device)
    config = section(partitioned_model.ModelConfig, {"base_config": base, **memory})
    armt = partitioned_model.armt_config(config, {}, memory["segment_tokens"])
    model = partitioned_model.build_model(config, armt, prepared.ds_config, seed=0)
    link = handoff.Wire(*ring(mesh, layout.timeout_s), device) if layout.sp > 1 else None
    options = {"states": "recompute", "offload": prepared.offload_activations, **options}
    runner = executor.ScheduledLM(model, link=link, **options)
    if wrap is not None:
        runner = wrap(runner)
    grid = Grid(1, base["num_hidden_layers"], layout.sp, layout.rounds, layout.chunks)
    return runner, start_engine(runner, prepared.ds_config, grid, device), armt, grid, mesh


def model_bytes(runner) -> int:
    """Of all parameters, partitioned or not."""
    return sum(p.ds_numel * p.element_size() for p in runner.parameters())


class Backward(torch.autograd.Function):
    """Identity whose backward takes `seconds`."""

    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        time.sleep(ctx.seconds)
        return grad, None


class Emulated(NamedTuple):
    """How long the parts of a cell take, in seconds for each row of the micro-batch."""

    forward_s: float
    rerun_s: float
    inputs_s: float
    """Gradients of the cell's inputs."""
    weights_s: float

    @classmethod
    def units(cls, cell_s: float, rerun: float = 1.0) -> "Emulated":
        """Forward, gradients of inputs and gradients of weights take a cell's time each, a re-run so much of it."""
        return cls(cell_s, rerun * cell_s, cell_s, cell_s)


def sleeping_attend(layer, runner, lasts: Emulated, x, state, context):
    """In place of the decoder layer: takes a cell's time, forward and backward, and no computing to speak of.

    Hidden states still depend on what comes in, so gradients flow along both arrows, and one linear map of the layer is
    used, so that there is a weight gradient to be put off.
    """
    backward = any(i and i.op in BACKWARD for i in runner.trace.instructions[-1:])
    time.sleep(len(x) * (lasts.rerun_s if backward else lasts.forward_s))
    if torch.is_grad_enabled():
        x = Backward.apply(x, len(x) * (lasts.inputs_s + (not runner.grouped) * lasts.weights_s))
    return x + state.z.mean() + layer.layer.self_attn.q_proj(x), context


def sleeping_write(m, state, context):
    """In place of the memory's write, of the memory positions m [B, M, D]."""
    from armt_dist.model.memory import Update

    m = m.mean(-1)[:, None, :, None]
    k, dv = (m.expand(-1, t.shape[1], -1, t.shape[-1]) for t in (state.z, state.A))
    return Update(k, dv, m[..., 0].expand(-1, k.shape[1], -1))


def emulate(runner, lasts: Emulated) -> None:
    """Put sleeps in the place of every cell, from outside, so that many ranks fit on few cores."""
    from armt_dist.runtime import weight_gradients

    add_product = weight_gradients.add_product

    def sleeping_product(total, a, b):
        time.sleep(len(a) / positions * lasts.weights_s)
        add_product(total, a, b)

    config = runner.model.config
    positions = config.segment_tokens + config.other_rows
    weight_gradients.add_product = sleeping_product
    for layer in runner.model.backbone.layers:
        layer.attend = partial(sleeping_attend, layer, runner, lasts)
        layer.write = sleeping_write


def commit() -> str:
    """The short name of what is checked out."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def table(header: list, rows: list[list]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def mean(values: list[float]) -> str:
    """Mean, and the standard deviation where there are several values; nothing where there is none."""
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{spread}" if values else ""


def heading(script: str) -> str:
    """Date, command, hardware and commit of a result. Of a path outside the project only its name: it says nothing."""
    words = [re.sub(r"(^|=)/(\S*/)*", r"\1", word) for word in sys.argv[1:]]
    command = shlex.join(["python", f"benchmarks/{script}", *words])
    return (
        f"{datetime.date.today()}, `OMP_NUM_THREADS=1 {command}`, {os.cpu_count()} CPU cores, gloo, "
        f"torch {torch.__version__}, commit {commit()}."
    )
