"""On a CUDA device: parity of the fast path with the plain loop, and tokens/s of both for a Llama-3.2-1B-shaped ARMT.

    python benchmarks/device.py [--tokens 32768 65536 131072 262144] [--states store rebuild] [--repeats 3]
    python benchmarks/device.py --device cpu --shape tiny --tokens 256 512            # the script itself, without one

Parity: float32 with TF32 off, loss and the largest relative error of any gradient, segment by segment autograd against
layer-major segment BPTT on the same device. Speed: bfloat16, batch 1, forward and backward without the optimizer; the
plain loop keeps the whole graph, so it may run out of memory, which is a result. Prints a table and one JSON line last.
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch

from armt_dist.model.configuration_armt import ARMTConfig
from armt_dist.model.modeling_armt import ARMTForCausalLM
from armt_dist.runtime.executor import ScheduledLM
from armt_dist.runtime.loss import token_nll
from armt_dist.runtime.piece import Piece, Totals, cut_piece
from armt_dist.schedule.grid import Grid

LLAMA_1B = dict(
    model_type="llama",
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    vocab_size=128256,
    max_position_embeddings=4096,
    rope_theta=500000.0,
    tie_word_embeddings=True,
)
SMALL = LLAMA_1B | dict(
    hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=1024,
)  # fmt: skip
SHAPES = {
    "1b": (LLAMA_1B, dict(segment_tokens=1024, num_mem_tokens=16, d_mem=64)),
    "tiny": (SMALL, dict(segment_tokens=64, num_mem_tokens=8, d_mem=32)),
}
PLAIN = "plain"


def build(shape: str, device: torch.device, dtype: torch.dtype) -> ARMTForCausalLM:
    """Random weights; W_mv is not zero, so that the memory is in use."""
    base, memory = SHAPES[shape]
    torch.manual_seed(0)
    with device:
        model = ARMTForCausalLM(ARMTConfig(base_config=base, **memory)).to(dtype)
    for layer in model.backbone.layers:
        torch.nn.init.normal_(layer.memory.W_mv.weight, std=0.02)
    return model


def mean_loss(totals: Totals) -> torch.Tensor:
    return totals.nll / totals.scored


def plain_loss(model: ARMTForCausalLM, piece: Piece) -> torch.Tensor:
    """The loop that anyone would write: segment after segment in one graph, the loss chunked like the fast path's."""
    states, nll, targets = model.initial_states(1), 0.0, piece.labels.to(model.device)
    for ids, wanted in zip(piece.input_ids.split(piece.lengths[0], 1), targets.split(piece.lengths[0], 1), strict=True):
        hidden, states = model.segment(ids, states)
        nll = nll + token_nll(hidden.flatten(0, 1), model.backbone.head, wanted.flatten()).sum()
    return nll / (targets >= 0).sum()


def loss_step(model: ARMTForCausalLM, tokens: int, variant: str) -> Callable[[], torch.Tensor]:
    """Forward and backward of one sequence; the mean loss."""
    torch.manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens))
    labels = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], dim=1)
    grid = Grid(segments=1, layers=model.config.num_hidden_layers)
    piece = cut_piece(ids.to(model.device), labels, None, model.config, grid)
    runner = None if variant == PLAIN else ScheduledLM(model, states=variant)

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss = plain_loss(model, piece) if runner is None else mean_loss(runner(piece))
        loss.backward()
        return loss.detach()

    return step


def parity(device: torch.device, states: list[str]) -> dict[str, dict[str, float]]:
    """Largest relative errors of the fast path, float32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model, found = build("tiny", device, torch.float32), {}
    expected_loss = loss_step(model, 64 * 7 - 5, PLAIN)()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    for variant in states:
        loss = loss_step(model, 64 * 7 - 5, variant)()
        worst = max(
            ((p.grad - expected[name]).norm() / expected[name].norm().clamp_min(1e-12)).item()
            for name, p in model.named_parameters()
        )
        found[variant] = {"loss": abs((loss - expected_loss) / expected_loss).item(), "gradients": worst}
    return found


def speed(step: Callable[[], torch.Tensor], tokens: int, repeats: int, device: torch.device) -> dict | None:
    """Tokens/s and peak GB of a step, or None where the device is too small for it."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    try:
        step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(repeats):
            wait()
            start = time.perf_counter()
            step()
            wait()
            seconds.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    return {"tokens_per_s": tokens / median(seconds), "peak_gb": peak}


def cell(point: dict[str, float] | None) -> str:
    return "out of memory" if point is None else f"{point['tokens_per_s']:,.0f} ({point['peak_gb'] or 0:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 65536, 131072, 262144])
    parser.add_argument("--states", nargs="+", default=["store", "rebuild"])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    result = {"device": name, "torch": torch.__version__, "parity": parity(device, args.states), "speed": {}}
    for variant, errors in result["parity"].items():
        print(f"parity {variant}: loss {errors['loss']:.1e}, worst gradient {errors['gradients']:.1e}", flush=True)
    model = build(args.shape, device, torch.bfloat16)
    print(f"{name}\n| tokens | " + " | ".join(f"{v} tokens/s (peak GB)" for v in (PLAIN, *args.states)) + " |")
    print("|---" * (len(args.states) + 2) + "|", flush=True)
    for tokens in args.tokens:
        points = {v: speed(loss_step(model, tokens, v), tokens, args.repeats, device) for v in (PLAIN, *args.states)}
        result["speed"][tokens] = points
        cells = (
            "out of memory" if p is None else f"{p['tokens_per_s']:,.0f} ({p['peak_gb']:.1f})" for p in points.values()
        )
        print(f"| {tokens} | " + " | ".join(cells) + " |", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
