"""Segment BPTT against a plain loop: peak memory added by each further segment, and tokens per second.

    python benchmarks/bptt_memory.py [--segments 4 8 16 32] [--repeats 5] [--skip speed]

The plain loop is the oracle, `ARMTForCausalLM.forward` segment by segment in one graph, and its backward. Llama shape
of width 256, 8 layers, MLP 1024, vocabulary 1024; segments of 128 tokens, 8 memory tokens, d_mem 32; batch 1, float32.

Memory, each point in a process of its own: `rss` is the peak of the process, with every large tensor mapped and
unmapped by itself so that the allocator hides nothing; `live` is the peak of bytes in the tensors that the step has
made and that are alive. Gradients exist beforehand, as they do in training; otherwise they, being made last, would
hide what segments cost.
Speed: all variants take turns in one process, with torch's default number of threads; a variant's figure is the median
over turns of the plain loop's time over its own, so noise common to a turn cancels.
Prints a table each and one JSON line last.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from statistics import median

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from armt_dist.model.configuration_armt import ARMTConfig
from armt_dist.model.modeling_armt import ARMTForCausalLM
from armt_dist.runtime.executor import ScheduledLM
from armt_dist.runtime.piece import cut_piece
from armt_dist.schedule.grid import Grid

PLAIN, VARIANTS = "plain", ("store", "rebuild", "recompute")
SEGMENT_TOKENS, VOCABULARY, LAYERS = 128, 1024, 8
BASE = dict(
    model_type="llama",
    hidden_size=256,
    num_attention_heads=4,
    num_hidden_layers=LAYERS,
    intermediate_size=1024,
    vocab_size=VOCABULARY,
    max_position_embeddings=256,
)
# glibc then maps every tensor of a segment's size by itself, and gives it back when it is freed.
EXACT_RSS = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
FIGURES = {"rss": EXACT_RSS | ONE_THREAD, "live": ONE_THREAD}


def build() -> ARMTForCausalLM:
    """A model whose memory is in use: W_mv is not zero. Gradients are allocated."""
    torch.manual_seed(0)
    config = ARMTConfig(base_config=BASE, segment_tokens=SEGMENT_TOKENS, num_mem_tokens=8, d_mem=32)
    model = ARMTForCausalLM(config)
    for layer in model.backbone.layers:
        torch.nn.init.normal_(layer.memory.W_mv.weight, std=0.02)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def steps(model: ARMTForCausalLM, segments: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Variant -> loss and backward on one sequence of `segments`, returning the loss."""
    torch.manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (1, SEGMENT_TOKENS * segments))
    shifted = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], dim=1)
    piece = cut_piece(ids, shifted, None, model.config, Grid(segments=1, layers=LAYERS))

    def plain() -> torch.Tensor:
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    def scheduled(states: str) -> Callable[[], torch.Tensor]:
        runner = ScheduledLM(model, states=states)

        def step() -> torch.Tensor:
            totals = runner(piece)
            loss = totals.nll / totals.scored
            loss.backward()
            return loss.detach()

        return step

    return {PLAIN: plain} | {states: scheduled(states) for states in VARIANTS}


def rss_point(variant: str, segments: int) -> float:
    """Peak MB of a process that takes one step."""
    steps(build(), segments)[variant]()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors alive that were made within, backward included, and keeps the peak.

    `known`: tensors from before, which in-place operations return.
    """

    def __init__(self, known: Iterable[torch.Tensor]):
        super().__init__()
        self.known = [tensor.untyped_storage() for tensor in known]
        self.alive = {id(storage) for storage in self.known}
        self.bytes = self.peak_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        """A view's storage is known already."""
        if id(storage) not in self.alive:
            self.alive.add(id(storage))
            self.bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.bytes)
            weakref.finalize(storage, self.freed, id(storage), storage.nbytes())

    def freed(self, key: int, size: int) -> None:
        self.alive.remove(key)
        self.bytes -= size


def live_point(variant: str, segments: int) -> float:
    """Peak MB in tensors made by one step."""
    model = build()
    step = steps(model, segments)[variant]
    with LiveBytes(t for p in model.parameters() for t in (p, p.grad)) as live:
        step()
    return live.peak_bytes / 1e6


def speed_point(_: str, segments: int, repeats: int) -> dict[str, dict[str, float]]:
    """Tokens/s and speed relative to the plain loop, by variant; for a process of its own."""
    taken = steps(build(), segments)
    losses = {name: step() for name, step in taken.items()}
    assert all(torch.isclose(loss, losses[PLAIN], atol=1e-5) for loss in losses.values()), f"not the same: {losses}"
    seconds: dict[str, list[float]] = {name: [] for name in taken}
    for _ in range(repeats):
        for name, step in taken.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "tokens_per_s": segments * SEGMENT_TOKENS / median(times),
            "of_plain": median(plain / own for plain, own in zip(seconds[PLAIN], times, strict=True)),
        }
        for name, times in seconds.items()
    }


def child(*arguments: object, **environment: str):
    """What this script's `--point` finds, in a fresh process."""
    command = [sys.executable, __file__, "--point", *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def per_segment(segments: list[int], peaks: list[float]) -> float:
    """The largest MB per further segment between neighbouring lengths."""
    pairs = list(zip(segments, peaks, strict=True))
    return max((b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(pairs, pairs[1:], strict=False))


def memory_table(segments: list[int]) -> dict[str, dict[str, float]]:
    """Measures and prints; MB per further segment by variant."""
    print("| states | figure | " + " | ".join(f"S {n}" for n in segments) + " | MB per further segment, at most |")
    print("|---" * (len(segments) + 3) + "|", flush=True)
    slopes: dict[str, dict[str, float]] = {}
    for variant in (PLAIN, *VARIANTS):
        slopes[variant] = {}
        for figure, environment in FIGURES.items():
            peaks = [child(figure, variant, n, **environment) for n in segments]
            slopes[variant][figure] = round(per_segment(segments, peaks), 2)
            row = " | ".join(f"{peak:.0f}" for peak in peaks)
            print(f"| {variant} | {figure} MB | {row} | {slopes[variant][figure]:.2f} |", flush=True)
    return slopes


def speed_table(segments: list[int], repeats: int) -> dict[str, dict[int, float]]:
    """Measures and prints; speed relative to the plain loop by variant and length."""
    print("| S | " + " | ".join(f"{name} tokens/s (of plain)" for name in (PLAIN, *VARIANTS)) + " |")
    print("|---" * (len(VARIANTS) + 2) + "|", flush=True)
    relative: dict[str, dict[int, float]] = {name: {} for name in (PLAIN, *VARIANTS)}
    for n in segments:
        point = child("speed", "all", n, "--repeats", repeats)
        for name, figures in point.items():
            relative[name][n] = round(figures["of_plain"], 3)
        row = " | ".join(f"{f['tokens_per_s']:,.0f} ({f['of_plain']:.2f})" for f in point.values())
        print(f"| {n} | {row} |", flush=True)
    return relative


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip", choices=("memory", "speed"))
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        kind, variant, segments = args.point
        points = {"rss": rss_point, "live": live_point, "speed": partial(speed_point, repeats=args.repeats)}
        print(json.dumps(points[kind](variant, int(segments))))
        return
    result: dict[str, object] = {"threads": torch.get_num_threads()}
    if args.skip != "memory":
        result["mb_per_segment"] = memory_table(args.segments)
    if args.skip != "speed":
        result["speed_of_plain"] = speed_table(args.segments, args.repeats)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
