"""Experiments of learn.py beside each other: one leg of each by length, and its training.

    python benchmarks/compare.py capacity remember_d_mem_16 remember_d_mem_32 remember_d_mem_64
    python benchmarks/compare.py rmt rewrite_two_symbols:10 rmt_two_symbols     # the leg 10; left out: the last one

Reads results/learn_EXPERIMENT.json, writes results/NAME.md and NAME.png, and prints the table.
"""

import argparse
import json
from statistics import fmean, stdev

from experiments import EXPERIMENTS
from ranks import RESULTS, heading

from armt_dist.plots import Curve, Panel, draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the comparison")
    parser.add_argument("experiments", nargs="+", metavar="EXPERIMENT[:LEG]")
    args = parser.parse_args()
    first = EXPERIMENTS[args.experiments[0].partition(":")[0]]
    metric = first.metric
    lengths, table, scores, training = None, [], [], []
    for word in args.experiments:
        name, _, leg = word.partition(":")
        rows = json.loads((RESULTS / f"learn_{name}.json").read_text())
        rows = [row for row in rows if row["leg"] == (leg or rows[-1]["leg"])]
        lengths = lengths or list(rows[0]["score"])
        columns = [[row["score"][n] for row in rows if n in row["score"]] for n in lengths]
        cells = [(f"{fmean(c):.3f}" + (f" ± {stdev(c):.3f}" if len(c) > 1 else "")) if c else "" for c in columns]
        seeds, steps = (", ".join(str(row[key]) for row in rows) for key in ("seed", "steps"))
        table.append(
            f"| [{name}](learn_{name}.md), leg {rows[0]['leg']} | {seeds} | {steps} | " + " | ".join(cells) + " |"
        )
        known = [(int(n), fmean(c)) for n, c in zip(lengths, columns, strict=True) if c]
        scores.append(Curve(name, *zip(*known, strict=True)))
        curve = rows[0]["curve"]
        training.append(Curve(name, curve["step"], curve["accuracy" if metric == "accuracy" else "loss"]))
    header = ["experiment", "seeds", "steps of the leg", *lengths]
    text = "\n".join(["| " + " | ".join(header) + " |", "|---" * len(header) + "|", *table])
    panels = [
        Panel(first.unit, metric, scores),
        Panel("step of the leg", f"training {'accuracy' if metric == 'accuracy' else 'loss'}", training, log_x=False),
    ]
    draw(panels, RESULTS / f"{args.name}.png", args.name)
    lines = [f"# {args.name}: {metric} by length", heading("compare.py"), text, f"![curves]({args.name}.png)"]
    (RESULTS / f"{args.name}.md").write_text("\n\n".join(lines) + "\n")
    print(text)


if __name__ == "__main__":
    main()
