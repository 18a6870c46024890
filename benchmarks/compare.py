"""Experiments of learn.py beside each other: one leg of each by length, and its training.

    python benchmarks/compare.py capacity remember_d_mem_16 remember_d_mem_32 remember_d_mem_64
    python benchmarks/compare.py rmt rewrite_two_symbols:10 rmt_two_symbols     # leg 10; left out: the last leg

Reads results/learn_EXPERIMENT.json, writes results/NAME.md and NAME.png, and prints the table.
"""

import argparse
import json
from statistics import fmean

from experiments import EXPERIMENTS
from learn import held
from ranks import RESULTS, heading, mean, table

from armt_dist.evaluation.charts import Curve, Panel, draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the comparison")
    parser.add_argument("experiments", nargs="+", metavar="EXPERIMENT[:LEG]")
    args = parser.parse_args()
    first = EXPERIMENTS[args.experiments[0].partition(":")[0]]
    metric = first.metric
    lengths, cells, scores, training = None, [], [], []
    for word in args.experiments:
        name, _, leg = word.partition(":")
        rows = json.loads((RESULTS / f"learn_{name}.json").read_text())
        rows = [row for row in rows if row["leg"] == (leg or rows[-1]["leg"])]
        lengths = lengths or list(rows[0]["score"])
        columns = [[row["score"][n] for row in rows if n in row["score"]] for n in lengths]
        seeds, steps = (", ".join(str(row[key]) for row in rows) for key in ("seed", "steps"))
        label = f"{name}, leg {rows[0]['leg']}"
        cells.append([f"[{label}](learn_{name}.md)", seeds, steps, *map(mean, columns)])
        if first.values and all(columns):
            estimates = held([int(n) for n in lengths], columns, first.values)
            cells.append(["pairs held: n (vα - 1) / (v - 1)", "", "", *estimates])
        known = [(int(n), fmean(c)) for n, c in zip(lengths, columns, strict=True) if c]
        scores.append(Curve(label, *zip(*known, strict=True)))
        curve = rows[0]["curve"]
        training.append(Curve(label, curve["step"], curve["accuracy" if metric == "accuracy" else "loss"]))
    text = table(["experiment", "seeds", "steps of the leg", *lengths], cells)
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
