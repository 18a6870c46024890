"""Line charts with several panels, as PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Curve(NamedTuple):
    """One line: y over x."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


class Panel(NamedTuple):
    """One pair of axes with curves."""

    x_label: str
    y_label: str
    curves: Sequence[Curve]
    log_x: bool = True
    limits: tuple[float, float] | None = None
    """Limits of y; None: those of the data."""


def draw(panels: Sequence[Panel], path: Path, title: str) -> None:
    """Draw the panels side by side into a PNG at `path`. Raises OSError."""
    # Slow to import. pyplot is avoided: it looks for a display.
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
