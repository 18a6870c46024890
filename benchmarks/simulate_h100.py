"""Simulated efficiency of the wavefront on H100 clusters: 8 to 4096 GPUs, 128k to 16M tokens, 1B and 8B models.

For each size the planner chooses sp, rounds R, chunks M_c and micro-batch, with and without a cap on the global batch,
taking the cheapest memory options that fit; the simulator then runs that schedule (programs too long for it use the
closed form, marked ~). Nothing here is measured: the assumptions are the fields of `hardware.Hardware`, printed above
the table. Writes results/simulate_h100.{md,png,json} beside this file and prints one JSON line last.
"""

import argparse
import json
import math
from pathlib import Path

from armt_dist.config import ConfigError
from armt_dist.schedule.hardware import H100
from armt_dist.schedule.model_sizes import MODELS, StepWork
from armt_dist.schedule.planner import choose, plan
from armt_dist.schedule.simulator import simulate_step

GPUS = (8, 64, 512, 4096)
TOKENS = tuple(2**n for n in range(17, 25))
CAPS = {"64M tokens": 2**26, "unlimited": math.inf}
OPTIONS = {
    "store": {},
    "rebuild": {"states": "rebuild"},
    "rebuild, H on host": {"states": "rebuild", "offload_activations": True},
}
SIMULATED_UNITS = 1_000_000
HEADER = (
    "| GPUs | sequence | dp × sp | R | M_c | micro-batch | memory options | GB per GPU | window | bound | efficiency "
    "| exposed hand-off | MFU | step s | tokens/s per GPU |\n" + "|---" * 15 + "|"
)


def short(tokens: int) -> str:
    return f"{tokens >> 20}M" if tokens >= 2**20 else f"{tokens >> 10}k"


def best(model: str, gpus: int, tokens: int, cap: float) -> dict:
    """The fastest layout over the memory options, simulated; {"fits": False} where none fits."""
    found = []
    for name, options in OPTIONS.items():
        try:
            work, layout = choose(MODELS[model], StepWork(tokens, **options), gpus, max_step_tokens=cap)
        except ConfigError:
            continue
        found.append((plan(MODELS[model], work, layout), work, layout, name))
    row = {"model": model, "gpus": gpus, "sequence_tokens": tokens, "fits": bool(found)}
    if not found:
        return row
    fastest = max(each[0].tokens_per_s for each in found)
    # Prefer plainer memory options that are as fast within a percent.
    result, work, layout, name = next(each for each in found if each[0].tokens_per_s >= 0.99 * fastest)
    exposed = None
    if 8 * result.grid.sp * result.grid.units <= SIMULATED_UNITS:
        report = simulate_step("wavefront", result.grid, result.costs)
        exposed = sum(report.exposed_s) / len(report.exposed_s) / report.makespan_s
        result = plan(MODELS[model], work, layout, pipeline_s=report.makespan_s)
    return row | layout._asdict() | {
        "micro_batch": work.micro_batch,
        "options": name,
        "gpu_bytes": sum(result.gpu_bytes.values()),
        "window": result.window,
        "bound": result.bound,
        "efficiency": result.efficiency,
        "exposed_handoff": exposed,
        "simulated": exposed is not None,
        "mfu": result.mfu,
        "step_s": result.step_s,
        "tokens_per_s_gpu": result.tokens_per_s / gpus,
    }  # fmt: skip


def markdown_row(row: dict) -> str:
    start = f"| {row['gpus']} | {short(row['sequence_tokens'])} |"
    if not row["fits"]:
        return start + " does not fit |" + " |" * 12
    about = "" if row["simulated"] else "~"
    exposed = f"{row['exposed_handoff']:.1%}" if row["simulated"] else "–"
    cells = [
        f"{row['dp']} × {row['sp']}",
        row["rounds"],
        row["chunks"],
        row["micro_batch"],
        row["options"],
        f"{row['gpu_bytes'] / 1e9:.0f}",
        row["window"],
        f"{row['bound']:.1%}",
        f"{about}{row['efficiency']:.1%}",
        exposed,
        f"{row['mfu']:.1%}",
        f"{row['step_s']:.3g}",
        f"{row['tokens_per_s_gpu']:,.0f}",
    ]
    return f"{start} {' | '.join(map(str, cells))} |"


def markdown(rows: list[dict]) -> str:
    """Title, assumptions, and one table per model and cap."""
    given = {name: value for name, value in H100._asdict().items() if isinstance(value, float)}
    assumed = "\n".join(f"- `{name}` = {value:g}" for name, value in given.items())
    text = (
        "# Simulated: the wavefront on H100 clusters\n\n"
        "Simulated, not measured. Command: `python benchmarks/simulate_h100.py`. Efficiency is the share of all GPUs' "
        "time spent computing, the re-run counted; MFU leaves the re-run out. Efficiency can exceed the bound, which "
        "is for a backward without a re-run: the first re-run fills the wait for dState. Segments of 1024 tokens, 16 "
        "memory tokens, d_mem 64, AdamW, bf16. `~`: closed form, too long to simulate.\n\n"
        "A global batch without limit hides every bubble behind more sequences; with one of 64M tokens the "
        "long rows of 512 and 4096 GPUs "
        "show where one sequence no longer feeds the cluster (sp far above R × L × M_c).\n\n"
        f"Assumptions (`armt_dist/schedule/hardware.py`):\n{assumed}\n"
    )
    for model in dict.fromkeys(row["model"] for row in rows):
        for cap in CAPS:
            own = [row for row in rows if (row["model"], row["cap"]) == (model, cap)]
            text += f"\n## {model}, global batch {cap}\n\n{HEADER}\n" + "\n".join(map(markdown_row, own)) + "\n"
    return text


def draw(rows: list[dict], path: Path) -> None:
    """Efficiency over sequence length, a line per number of GPUs, a panel per model and cap."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(11, 4 * len(models)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(models), len(CAPS), squeeze=False, sharex=True, sharey=True)
    for model, line in zip(models, panels, strict=True):
        for cap, axes in zip(CAPS, line, strict=True):
            for gpus in GPUS:
                own = [row for row in rows if (row["model"], row["cap"], row["gpus"]) == (model, cap, gpus)]
                points = [(row["sequence_tokens"], 100 * row["efficiency"]) for row in own if row["fits"]]
                axes.plot(*zip(*points, strict=True), marker="o", label=f"{gpus} GPUs")
            axes.set(title=f"{model}, global batch {cap}", xscale="log", ylim=(0, 103), ylabel="% of time computing")
            axes.set_xticks(TOKENS, [short(tokens) for tokens in TOKENS], minor=False)
            axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
            axes.grid(alpha=0.3)
    panels[0][0].legend()
    figure.suptitle("Simulated efficiency of the wavefront on H100 clusters")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["llama-1b", "llama-8b"])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    options = parser.parse_args()
    rows = [
        best(model, gpus, tokens, limit) | {"cap": cap}
        for model in options.models
        for cap, limit in CAPS.items()
        for gpus in GPUS
        for tokens in TOKENS
    ]
    options.results.mkdir(parents=True, exist_ok=True)
    target = options.results / "simulate_h100"
    target.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    target.with_suffix(".json").write_text(json.dumps({"hardware": H100._asdict(), "rows": rows}, indent=1) + "\n")
    draw(rows, target.with_suffix(".png"))
    print(markdown(rows))
    simulated = [row for row in rows if row["fits"] and row["simulated"]]
    filled = [row for row in simulated if row["sp"] <= MODELS[row["model"]].num_hidden_layers * row["chunks"]]
    summary = {
        "benchmark": "simulate_h100",
        "rows": len(rows),
        "simulated": len(simulated),
        "worst_exposed_handoff_where_the_pipeline_fills": round(max(row["exposed_handoff"] for row in filled), 4),
        "efficiency": {
            f"{row['model']} {row['gpus']} GPUs {short(row['sequence_tokens'])} cap {row['cap']}": round(
                row["efficiency"], 3
            )
            for row in rows
            if row["fits"] and row["sequence_tokens"] in (2**17, 2**20, 2**24)
        },
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
