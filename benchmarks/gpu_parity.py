"""Every path against the plain loop: losses and gradients, in float32 and bfloat16, on the device.

    python benchmarks/gpu_parity.py [--device cpu]

The reference is the plain loop in float64 on the CPU. Both the plain loop and the fast path on the device are compared
with it, by the largest relative error of any gradient, ||g - ref|| / ||ref||, and that of the loss: the fast path may
be no further off than the plain loop is, up to a factor. Then whether a second run, without CUDA graphs, agrees to the
bit, and whether generation from the cache agrees with the whole forward. Prints a table and one JSON line last; exit
code 1 if anything is off.
"""

import argparse
import json
import sys
from typing import NamedTuple

import torch
from shapes import build, random_ids

from armt_dist.runtime.executor import ScheduledLM
from armt_dist.runtime.piece import cut_piece
from armt_dist.schedule.grid import Grid

BATCH, TOKENS = 2, 32 * 7 - 5
# Of the plain loop's own error, and least errors below which nothing is said: rounding differs between kernels.
FACTOR, LEAST = 3.0, {torch.float32: 2e-5, torch.bfloat16: 5e-3}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Path(NamedTuple):
    """One way through the fast path: fields of the model, of the runner, chunks, and the schedule."""

    model: dict = {}
    runner: dict = {}
    chunks: int = 1
    schedule: str | None = None
    padded: bool = False
    base: dict = {}


PATHS = {
    "store": Path(runner=dict(states="store")),
    "rebuild": Path(runner=dict(states="rebuild")),
    "recompute": Path(runner=dict(states="recompute")),
    "host offload": Path(runner=dict(states="store", offload=True)),
    "2 chunks": Path(chunks=2),
    "padding": Path(padded=True),
    "window": Path(model=dict(sliding_window=16)),
    "window, restart, detached": Path(
        model=dict(sliding_window=32, window_positions="restart", detach_window=True, sink=2)
    ),
    "4 heads, gating": Path(model=dict(n_heads=4, gating=True)),
    "decay": Path(model=dict(state_decay=0.9), runner=dict(states="rebuild")),
    "learned decay": Path(model=dict(state_decay="learned")),
    "rmt": Path(model=dict(memory_kind="rmt")),
    "rmt, window": Path(model=dict(memory_kind="rmt", sliding_window=16)),
    "transformer_xl": Path(model=dict(memory_kind="transformer_xl")),
    "segment by segment": Path(schedule="segment_major"),
    "graphs": Path(runner=dict(graphs=True)),
    "graphs, rebuild": Path(runner=dict(states="rebuild", graphs=True)),
    "graphs, recompute": Path(runner=dict(states="recompute", graphs=True)),
    "graphs, host offload": Path(runner=dict(graphs=True, offload=True)),
    "graphs, 2 chunks": Path(chunks=2, runner=dict(graphs=True)),
    "graphs, padding": Path(padded=True, runner=dict(graphs=True)),
    "graphs, window": Path(model=dict(sliding_window=16), runner=dict(graphs=True)),
    "graphs, learned decay": Path(model=dict(state_decay="learned"), runner=dict(graphs=True)),
    "graphs, rmt, window": Path(model=dict(memory_kind="rmt", sliding_window=16), runner=dict(graphs=True)),
    "graphs, segment by segment": Path(schedule="segment_major", runner=dict(graphs=True)),
    "gpt2": Path(
        base=dict(
            model_type="gpt2",
            n_embd=64,
            n_head=4,
            n_layer=3,
            n_positions=64,
            resid_pdrop=0.0,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    ),
}


def model_of(path: Path, device: torch.device, dtype: torch.dtype, weights: torch.dtype):
    """The path's model, with weights as one of type `weights` on the CPU has them."""
    fields = path.model
    if path.model.get("memory_kind") == "transformer_xl":
        fields = fields | {"num_mem_tokens": None, "d_mem": 64}
    return build("tiny", torch.device("cpu"), weights, path.base, **fields).to(device, dtype)


def gradients(model, loss: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients in float64 on the host."""
    loss.backward()
    found = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.item(), found


def inputs(path: Path, model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Tokens, labels at the predicting positions, and a mask if the path is padded; on the host."""
    ids, labels = random_ids(model, BATCH, TOKENS)
    if not path.padded:
        return ids, labels, None
    mask = torch.ones_like(ids)
    mask[-1, TOKENS - 50 :] = 0
    return ids, labels.masked_fill(torch.cat([mask[:, 1:], mask[:, :1] * 0], 1) == 0, -100), mask


def plain(path: Path, device: torch.device, dtype: torch.dtype, weights: torch.dtype) -> tuple[float, dict]:
    """The model's own forward, by autograd."""
    model = model_of(path, device, dtype, weights)
    ids, labels, mask = inputs(path, model)
    unshifted = torch.cat([torch.full((BATCH, 1), -100), labels[:, :-1]], 1)
    mask = None if mask is None else mask.to(device)
    return gradients(model, model(ids.to(device), attention_mask=mask, labels=unshifted.to(device)).loss)


def fast(path: Path, device: torch.device, dtype: torch.dtype) -> tuple[float, dict]:
    """The scheduled executor."""
    model = model_of(path, device, dtype, dtype)
    ids, labels, mask = inputs(path, model)
    grid = Grid(1, model.config.num_hidden_layers, chunks=path.chunks)
    piece = cut_piece(ids.to(device), labels, mask, model.config, grid, schedule_name=path.schedule)
    totals = ScheduledLM(model, **path.runner)(piece)
    return gradients(model, totals.nll / totals.scored)


def error(found: tuple, expected: tuple) -> tuple[float, float, str]:
    """Relative errors of the loss and of the worst gradient, and its name."""
    largest = max(g.norm() for g in expected[1].values())
    # A gradient that is all but zero beside the others is rounding alone.
    errors = {
        name: ((found[1][name] - g).norm() / g.norm().clamp_min(1e-6 * largest)).item()
        for name, g in expected[1].items()
    }
    worst = max(errors, key=errors.__getitem__)
    return abs(found[0] - expected[0]) / abs(expected[0]), errors[worst], worst


def compare(name: str, kind: str, device: torch.device) -> dict:
    """One path in one dtype."""
    path, dtype = PATHS[name], DTYPES[kind]
    expected = plain(path, torch.device("cpu"), torch.float64, dtype)
    own = plain(path, device, dtype, dtype)
    first = fast(path, device, dtype)
    # Recorded or not, the same kernels are to run.
    again = fast(path._replace(runner=path.runner | {"graphs": False}), device, dtype)
    of_plain, of_fast = error(own, expected), error(first, expected)
    same = first[0] == again[0] and all(torch.equal(g, again[1][n]) for n, g in first[1].items())
    allowed = max(LEAST[dtype], FACTOR * of_plain[1])
    right = of_fast[1] <= allowed and of_fast[0] <= max(LEAST[dtype], FACTOR * of_plain[0])
    # NaN compares false, so it never passes.
    return {"path": name, "dtype": kind, "plain": of_plain[:2], "fast": of_fast, "bits": same, "right": right}


def generation(device: torch.device) -> dict:
    """Logits from the cache, token by token, against those of the whole forward, float32."""
    model = build("tiny", device, torch.float32).eval()
    ids = random_ids(model, 2, 80)[0].to(device)
    with torch.inference_mode():
        whole = model(ids).logits
        output = model(ids[:, :70], use_cache=True)
        steps = [output.logits[:, -1]]
        for t in range(70, 79):
            output = model(ids[:, t : t + 1], cache=output.cache, use_cache=True)
            steps.append(output.logits[:, -1])
        off = ((torch.stack(steps, 1) - whole[:, 69:79]).norm() / whole[:, 69:79].norm()).item()
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    return {"path": "generation", "dtype": "float32", "off": off, "made": made.shape[1], "right": off < 1e-4}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="paths with this in their names")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    found = []
    print(f"{'path':<28}{'dtype':<10}{'loss: plain':>12}{'fast':>9}{'gradients: plain':>18}{'fast':>9}  worst")
    for kind in DTYPES:
        for name in (name for name in PATHS if args.only in name):
            try:
                row = compare(name, kind, device)
            except Exception as problem:
                # The other paths are still to be tried.
                row = {
                    "path": name,
                    "dtype": kind,
                    "error": f"{type(problem).__name__}: {problem}"[:300],
                    "right": False,
                }
                print(f"{name:<28}{kind:<10}FAILED {row['error']}", flush=True)
                found.append(row)
                continue
            found.append(row)
            p, f = row["plain"], row["fast"]
            marks = ("" if row["right"] else "  OFF") + ("" if row["bits"] else "  other bits on the second run")
            print(f"{name:<28}{kind:<10}{p[0]:>12.1e}{f[0]:>9.1e}{p[1]:>18.1e}{f[1]:>9.1e}  {f[2]}{marks}", flush=True)
    found.append(generation(device))
    print(found[-1])
    print(json.dumps({"right": sum(row["right"] for row in found), "paths": len(found),
                      "wrong": [row for row in found if not row["right"]]}))  # fmt: skip
    return 0 if all(row["right"] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
