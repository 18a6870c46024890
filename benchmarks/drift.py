"""What becomes of the memory far beyond training: what is read and written, and what each layer's memory is worth.

    python benchmarks/drift.py NAME=HF_FOLDER [NAME=HF_FOLDER ...] [--pairs 500] [--samples 128]

For each exported retrieval model and layer: the norm of what the tokens of a key read, and the others (they need
nothing there), gamma of the keys written (1: all new to z, 0: z is full), the norm of A, and the accuracy by pairs when
that layer's memory holds nothing. Writes results/drift.md and drift.png, prints one JSON line last.
"""

import argparse
import json
from pathlib import Path

import torch
from ranks import RESULTS, heading, table

from armt_dist.data.lengths import Difficulty
from armt_dist.data.tasks import make_task
from armt_dist.evaluation.charts import Curve, Panel, draw
from armt_dist.evaluation.evaluate import evaluate
from armt_dist.evaluation.exported import load_model, read_task

MEASURES = ("reads at the key", "reads elsewhere", "gamma", "norm of A")


@torch.inference_mode()
def drift(model, task, pairs: int, samples: int) -> list[list[dict[str, float]]]:
    """[layer][segment] -> measure -> mean over samples."""
    batch = task.batch("validation", 0, range(samples), Difficulty.fixed(pairs))
    states, found = model.initial_states(samples), [[] for _ in model.backbone.layers]
    for layer, of_layer in zip(model.backbone.layers, found, strict=True):
        watch(layer.memory, of_layer, task.config.key_length)
    for ids in batch.input_ids.split(model.config.segment_tokens, dim=1):
        _, states = model.segment(ids.to(model.device), states)
        for state, of_layer in zip(states[:-1], found, strict=True):
            of_layer[-1]["norm of A"] = state.A.flatten(1).norm(dim=1).mean().item()
    return found


def watch(memory, found: list[dict[str, float]], key: int) -> None:
    """Keep what the layer's memory reads and writes; the first `key` tokens of a segment are its key."""
    read, write = memory.read, memory.write

    def reads(x, state):
        y = read(x, state)
        norm = (y - x).norm(dim=-1).mean(0)
        found.append({"reads at the key": norm[:key].mean().item(), "reads elsewhere": norm[key:].mean().item()})
        return y

    def writes(m, state, context=None):
        update = write(m, state, context)
        found[-1]["gamma"] = update.gamma.mean().item()
        return update

    memory.read, memory.write = reads, writes


def without(model, task, layer: int | None, pairs: list[int], samples: int) -> list[float]:
    """Accuracy by pairs with one layer's memory empty: its values are zero. None: all layers as they are."""
    emptied = [] if layer is None else [model.backbone.layers[layer].memory.W_mv.weight]
    kept = [weight.detach().clone() for weight in emptied]
    for weight in emptied:
        weight.data.zero_()
    found = [row.accuracy for row in evaluate(model, task, pairs, samples, 64)]
    for weight, values in zip(emptied, kept, strict=True):
        weight.data.copy_(values)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--samples", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(1)
    curves, measured, worth = {measure: [] for measure in MEASURES}, [], []
    shown = [s for s in (5, 20, 50, 100, 200, 500) if s <= args.pairs]
    for word in args.models:
        name, folder = word.split("=", 1)
        model = load_model(Path(folder), None)
        task = make_task(read_task(Path(folder), None, []), model.config.segment_tokens, model.config.vocab_size, 1)
        for layer in (None, *range(len(model.backbone.layers))):
            accuracy = without(model, task, layer, shown, args.samples)
            worth.append([name, "none" if layer is None else layer, *(f"{a:.3f}" for a in accuracy)])
        for number, segments in enumerate(drift(model, task, args.pairs, args.samples)):
            for measure in MEASURES:
                values = [segment[measure] for segment in segments]
                curves[measure].append(Curve(f"{name}, layer {number}", range(1, len(values) + 1), values))
                measured.append([name, number, measure, *(f"{values[s - 1]:.3f}" for s in shown)])
    panels = [Panel("segment", measure, of_measure, log_x=False) for measure, of_measure in curves.items()]
    draw(panels, RESULTS / "drift.png", f"{args.pairs} pairs")
    text = [
        "# The memory far beyond training",
        heading("drift.py"),
        f"Accuracy by pairs with one layer's memory empty, {args.samples} samples:",
        table(["model", "empty layer", *shown], worth),
        f"Means while {args.pairs} pairs are read, by segment:",
        table(["model", "layer", "", *shown], measured),
        "![by segment](drift.png)",
    ]
    (RESULTS / "drift.md").write_text("\n\n".join(text) + "\n")
    print("\n\n".join(text))
    print(json.dumps({"benchmark": "drift", "accuracy": worth, "measured": measured}))


if __name__ == "__main__":
    main()
