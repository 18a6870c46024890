"""What ZeRO-3 moves in a step, by the number of segments: layer-major against the plain loop over segments.

    OMP_NUM_THREADS=1 python benchmarks/zero_traffic.py [--segments 4 8 16 32]

Real engine, 2 ranks, parameters released after use. Counted are the bytes of whole parameters gathered and of whole
gradients reduced, over the model's bytes, in a step after the order of gathers is known. The plain loop runs segment
by segment through all layers, each cell under non-reentrant checkpointing, with its gradients reduced once
(`coalesce_grad_reduction`; without it they would be reduced once for each segment). Writes results/zero_traffic.md
and prints one JSON line last.
"""

import argparse
import json
from contextlib import nullcontext
from functools import partial

import torch
from ranks import RESULTS, heading, model_bytes, spawn, tiny_engine
from torch import nn
from torch.utils.checkpoint import checkpoint

LAYERS, SEGMENT_TOKENS, WIDTH, WORLD, STEPS = 8, 16, 128, 2, 3
RELEASED = {"stage3_max_reuse_distance": 1}
GATHER_LIMIT, REDUCE_LIMIT = 2.2, 1.1


class SegmentMajor(nn.Module):
    """The authors' loop in place of the schedule: a whole segment through all layers, then the next."""

    def __init__(self, model, loss_head):
        super().__init__()
        self.model, self.loss_head = model, loss_head

    def forward(self, tokens):
        """The summed loss of tokens [B, S·T]."""
        from armt_dist.model.modeling_armt import one_cell

        states, hidden = self.model.initial_states(len(tokens)), []
        for ids in tokens.split(SEGMENT_TOKENS, dim=1):
            x = self.model.embed_segments(ids, [ids.shape[1]])
            context = self.model.context(x, None)
            for i, layer in enumerate(self.model.backbone.layers):
                run = partial(one_cell, state=states[i], context=context)
                x, states[i] = checkpoint(layer, x, run=run, use_reentrant=False)
            hidden.append(x[:, : ids.shape[1]])
        nll, _ = self.loss_head(torch.cat(hidden, 1).flatten(0, 1), tokens.flatten(), False)
        return nll.sum()


def measure(ranks, plain: bool, segments: list[int]) -> list[tuple]:
    """(S, gathered, reduced, loss) for each number of segments S."""
    from armt_dist.runtime.piece import cut_piece
    from armt_dist.runtime.sections import ParallelConfig
    from armt_dist.zero3.collective_bytes import CollectiveBytes

    wrap = (lambda runner: SegmentMajor(runner.model, runner.loss_head)) if plain else None
    runner, engine, armt, grid, _ = tiny_engine(
        ranks, ParallelConfig(), LAYERS, SEGMENT_TOKENS, width=WIDTH, zero=RELEASED, wrap=wrap
    )
    traffic, found = CollectiveBytes(), []
    for count in segments:
        torch.manual_seed(ranks.rank)
        tokens = torch.randint(0, 64, (1, SEGMENT_TOKENS * count))
        for _ in range(STEPS):
            before = traffic.gathered_bytes, traffic.reduced_bytes
            loss = engine(tokens) if plain else engine(cut_piece(tokens, tokens, None, armt, grid)).nll
            with engine.coalesce_grad_reduction() if plain else nullcontext():
                engine.backward(loss / tokens.numel())
            after = traffic.gathered_bytes, traffic.reduced_bytes
            engine.step()
        moved = ((b - a) / model_bytes(runner) for a, b in zip(before, after, strict=True))
        found.append((count, *moved, loss.item() / tokens.numel()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=int, nargs="+", default=[4, 8, 16, 32])
    args = parser.parse_args()
    ours, plain = (spawn(WORLD, measure, loop, args.segments, timeout_s=500)[0] for loop in (False, True))
    lines, rows = [], []
    for (count, gathered, reduced, _), (_, plain_gathered, plain_reduced, _) in zip(ours, plain, strict=True):
        rows.append({"segments": count, "gathered": gathered, "reduced": reduced})
        rows[-1] |= {"plain_gathered": plain_gathered, "plain_reduced": plain_reduced}
        lines.append(f"| {count} | {gathered:.2f} | {reduced:.2f} | {plain_gathered:.2f} | {plain_reduced:.2f} |")
    table = "| S | gathered / model | reduced / model | plain loop: gathered | reduced |\n" + "|---" * 5 + "|\n"
    table += "\n".join(lines)
    print(table)
    text = f"# What ZeRO-3 moves in a step, over the model's bytes\n\n{heading('zero_traffic.py')}\n\n{table}\n"
    (RESULTS / "zero_traffic.md").write_text(text)
    met = all(r["gathered"] <= GATHER_LIMIT and r["reduced"] <= REDUCE_LIMIT for r in rows)
    print(json.dumps({"benchmark": "zero_traffic", "met": met, "rows": rows}))


if __name__ == "__main__":
    main()
