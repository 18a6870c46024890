"""Shows an evaluation: as a table in the terminal, and as a chart or heat map."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..records import text_table
from .charts import Curve, Panel, draw, new_figure, plain
from .evaluate import Row

# Columns of the table for each measure, besides length and speed.
SHOWN = {
    "accuracy": ("samples", "tokens", "accuracy", "token_accuracy", "loss"),
    "perplexity": ("samples", "tokens", "perplexity", "bits_per_byte", "token_accuracy", "loss"),
}


def heat_map(found: Mapping[str, Sequence[Row]], path: Path, title: str) -> None:
    """Draw accuracy by task (rows) and length (columns) as a PNG. Raises OSError."""
    rows = next(iter(found.values()))
    figure = new_figure(2 + 0.9 * len(rows), 1.6 + 0.6 * len(found))
    axes = figure.subplots()
    values = [[row.accuracy for row in part] for part in found.values()]
    axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            axes.text(x, y, f"{value:.0%}", ha="center", va="center")
    axes.set_xticks(range(len(rows)), [f"{row.length}\n{row.tokens:,}" for row in rows])
    axes.set_yticks(range(len(found)), [plain(name) for name in found], parse_math=False)
    axes.set(xlabel=f"{rows[0].unit} and tokens")
    axes.set_title(plain(title), parse_math=False)
    figure.savefig(path, dpi=120, format="png")


def evaluation_table(rows: Sequence[Row], measure: str) -> str:
    """Format one line for each length."""
    names = SHOWN[measure]
    head = [rows[0].unit, *names, "tokens/s", "peak MB"]
    lines = [head]
    for row in rows:
        values = [getattr(row, name) for name in names]
        cells = [f"{v:.4f}" if isinstance(v, float) else "" if v is None else str(v) for v in values]
        lines.append([str(row.length), *cells, f"{row.tokens_per_s:,.0f}", f"{row.peak_bytes / 1e6:,.0f}"])
    return text_table(lines)


def plot_evaluation(rows: Sequence[Row], measure: str, path: Path, title: str) -> None:
    """Draw accuracy by length, or perplexity by length and loss by segment, as a PNG. Raises OSError."""
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
            Panel("segment", "nats per token", [by_position], log_x=False),
        ],
        path,
        title,
    )
