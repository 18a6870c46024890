"""What keeping graphs costs in memory and saves in time, against a plain loop that keeps everything.

    python benchmarks/speed.py [--segments 16 32] [--repeats 7] [--shape wide | quickstart] [--out FILE]

The plain loop is the oracle: `ARMTForCausalLM.forward` segment by segment in one graph, and its backward. Float32, one
process with torch's default number of threads. `wide`: the Llama shape of benchmarks/bptt_memory.py, width 256, a row,
segments of 128; `quickstart`: that of launch/configs/default.yaml, 128 rows as one of two ranks has them.
`all computed again` runs cells again with the last product of their layer, whose result is known.
All variants take turns; a variant's speed is the median over turns of the plain loop's time over its own, so noise
common to a turn cancels. Memory: peak bytes in tensors that the step has made, and how far that is above `keep 0`.
Kernels of a cell: benchmarks/cell_kernels.py.
Prints a table per length and one JSON line last.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from bptt_memory import BASE, SEGMENT_TOKENS, LiveBytes
from ranks import table

from armt_dist.model.configuration_armt import ARMTConfig
from armt_dist.model.modeling_armt import ARMTForCausalLM
from armt_dist.runtime.executor import ScheduledLM
from armt_dist.runtime.piece import cut_piece
from armt_dist.schedule.grid import Grid
from armt_dist.schedule.kept_cells import Keep

PLAIN = "plain loop"


class Shape(NamedTuple):
    """A model, and what a batch of it holds."""

    base: dict
    memory: dict
    rows: int


SHAPES = {
    "wide": Shape(BASE, dict(segment_tokens=SEGMENT_TOKENS, num_mem_tokens=8, d_mem=32), 1),
    "quickstart": Shape(
        dict(
            model_type="gpt2",
            n_embd=64,
            n_head=4,
            n_layer=2,
            n_positions=16,
            activation_function="gelu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=False,
            vocab_size=22,
        ),
        # A pair with its marks.
        dict(segment_tokens=4, num_mem_tokens=4, d_mem=16),
        128,
    ),
}


def build(shape: Shape) -> ARMTForCausalLM:
    """A model whose memory is in use: W_mv is not zero. Gradients are allocated."""
    torch.manual_seed(0)
    model = ARMTForCausalLM(ARMTConfig(base_config=shape.base, **shape.memory))
    for layer in model.layers:
        torch.nn.init.normal_(layer.memory.W_mv.weight, std=0.02)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def variants(model: ARMTForCausalLM, shape: Shape, segments: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Variant -> loss and backward on sequences of `segments`, returning the loss."""
    torch.manual_seed(1)
    tokens = segments * model.config.segment_tokens
    ids = torch.randint(0, model.config.vocab_size, (shape.rows, tokens))
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
    piece = cut_piece(ids, labels, None, model.config, Grid(1, model.config.num_hidden_layers))

    def plain() -> torch.Tensor:
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    def scheduled(keep: Keep, states: str = "store") -> Callable[[], torch.Tensor]:
        runner = ScheduledLM(model, keep=keep, states=states)

        def step() -> torch.Tensor:
            totals = runner(piece)
            loss = totals.nll / totals.scored
            loss.backward()
            return loss.detach()

        return step

    def whole_again() -> torch.Tensor:
        known = [layer.last_product for layer in model.layers]
        for layer in model.layers:
            layer.last_product = ""
        loss = nothing()
        for layer, name in zip(model.layers, known, strict=True):
            layer.last_product = name
        return loss

    nothing = scheduled(Keep())
    shares = {f"keep {share:g}": scheduled(Keep(share)) for share in (0, 0.25, 0.5, 0.75, 1)}
    others = {f"keep 0, {states}": scheduled(Keep(), states) for states in ("rebuild", "recompute")}
    steps = {PLAIN: plain, **shares, "keep 0, all computed again": whole_again, **others}
    # A budget in bytes: half of what keeping everything adds.
    most = (peak_mb(model, shares["keep 1"]) - peak_mb(model, shares["keep 0"])) / 2
    return steps | {f"keep {most:.0f} MB": scheduled(Keep(1.0, most * 1e6))}


def peak_mb(model: ARMTForCausalLM, step: Callable[[], torch.Tensor]) -> float:
    """Peak in tensors made by one step."""
    with LiveBytes(t for p in model.parameters() for t in (p, p.grad)) as live:
        step()
    return live.peak_bytes / 1e6


def measured(shape: Shape, segments: int, repeats: int) -> list[dict]:
    """A row for each variant."""
    model = build(shape)
    steps = variants(model, shape, segments)
    losses = {name: step() for name, step in steps.items()}
    assert all(torch.isclose(loss, losses[PLAIN], atol=1e-5) for loss in losses.values()), f"not the same: {losses}"
    peaks = {name: peak_mb(model, step) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {each: [] for each in steps}
    for _ in range(repeats):
        for each, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[each].append(time.perf_counter() - start)
    tokens = shape.rows * segments * model.config.segment_tokens
    return [
        {
            "variant": each,
            "segments": segments,
            "tokens/s": round(tokens / median(times)),
            "of the plain loop": round(median(p / o for p, o in zip(seconds[PLAIN], times, strict=True)), 3),
            "peak MB": round(peaks[each], 1),
            "above keep 0": round(peaks[each] - peaks["keep 0"], 1),
        }
        for each, times in seconds.items()
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--shape", choices=SHAPES, default="wide")
    parser.add_argument("--out", type=Path, help="a file for the JSON line")
    args = parser.parse_args()
    rows = [row for n in args.segments for row in measured(SHAPES[args.shape], n, args.repeats)]
    columns = list(rows[0])
    print(table(columns, [[row[column] for column in columns] for row in rows]))
    line = json.dumps({"shape": args.shape, "torch": torch.__version__, "rows": rows})
    print(line)
    if args.out:
        args.out.write_text(line + "\n")


if __name__ == "__main__":
    main()
