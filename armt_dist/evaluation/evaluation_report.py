"""An evaluation for people: a table and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .evaluate import Row

# Columns of the table by the task's measure, beside length and speed.
SHOWN = {
    "accuracy": ("samples", "tokens", "accuracy", "token_accuracy", "loss"),
    "perplexity": ("samples", "tokens", "perplexity", "bits_per_byte", "token_accuracy", "loss"),
}


class Curve(NamedTuple):
    """One line: y over x."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


class Panel(NamedTuple):
    """One pair of axes. `log_x`: lengths double from point to point; `limits` of y, None for those of the data."""

    x_label: str
    y_label: str
    curves: Sequence[Curve]
    log_x: bool = True
    limits: tuple[float, float] | None = None


def draw(panels: Sequence[Panel], path: Path, title: str) -> None:
    """A PNG at `path`, the panels side by side. Raises OSError where it cannot be written."""
    # Slow to import; without pyplot there is no display to choose.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, ScalarFormatter

    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        for curve in panel.curves:
            axes.plot(curve.x, curve.y, marker="o" if len(curve.x) < 40 else None, label=curve.label)
        if panel.log_x:
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted({x for curve in panel.curves for x in curve.x}))
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.xaxis.set_minor_locator(NullLocator())
        if panel.limits:
            axes.set_ylim(*panel.limits)
        axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120, format="png")


def heat_map(found: Mapping[str, Sequence[Row]], path: Path, title: str) -> None:
    """Accuracy by task (down) and length (across), written into its cells, as a PNG. Raises OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = next(iter(found.values()))
    figure = Figure(figsize=(2 + 0.9 * len(rows), 1.6 + 0.6 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    values = [[row.accuracy for row in part] for part in found.values()]
    axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            axes.text(x, y, f"{value:.0%}", ha="center", va="center")
    axes.set_xticks(range(len(rows)), [f"{row.length}\n{row.tokens:,}" for row in rows])
    axes.set_yticks(range(len(found)), list(found))
    axes.set(xlabel=f"{rows[0].unit} and tokens", title=title)
    figure.savefig(path, dpi=120, format="png")


def evaluation_table(rows: Sequence[Row], measure: str) -> str:
    """One line for each length."""
    names = SHOWN[measure]
    head = [rows[0].unit, *names, "tokens/s", "peak MB"]
    lines = []
    for row in rows:
        values = [getattr(row, name) for name in names]
        cells = [f"{v:.4f}" if isinstance(v, float) else "" if v is None else str(v) for v in values]
        lines.append([str(row.length), *cells, f"{row.tokens_per_s:,.0f}", f"{row.peak_bytes / 1e6:,.0f}"])
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in (head, *lines)
    )


def plot_evaluation(rows: Sequence[Row], measure: str, path: Path, title: str) -> None:
    """Accuracy by length, or perplexity by length and loss by position, as a PNG."""
    lengths = [row.length for row in rows]
    if measure == "accuracy":
        curves = [Curve("samples", lengths, [row.accuracy for row in rows])]
        curves.append(Curve("tokens", lengths, [row.token_accuracy for row in rows]))
        draw([Panel(rows[0].unit, "accuracy", curves, limits=(-0.03, 1.03))], path, title)
        return
    longest = max(rows, key=lambda row: row.length)
    points = [(s, loss) for s, loss in enumerate(longest.by_segment, start=1) if loss is not None]
    by_position = Curve(f"of {longest.length} segments", *zip(*points, strict=True))
    draw(
        [
            Panel(longest.unit, "perplexity", [Curve("whole text", lengths, [row.perplexity for row in rows])]),
            Panel("segment", "nats a token", [by_position], log_x=False),
        ],
        path,
        title,
    )
