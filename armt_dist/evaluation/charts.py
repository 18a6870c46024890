"""Line charts with several panels, as PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..config import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of this many inches."""
    # Slow to import. pyplot is avoided: it looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(title: str) -> str:
    """Return a title, for example a folder's name, without characters that cannot be drawn.

    To be passed with parse_math=False: matplotlib fails where a dollar sign begins no formula.
    """
    return one_line("".join(c if c.isprintable() else "?" for c in title))


def draw(panels: Sequence[Panel], path: Path, title: str) -> None:
    """Draw the panels side by side into a PNG at `path`. Raises OSError."""
    # Slow to import.
    from matplotlib.ticker import NullLocator, ScalarFormatter

    figure = new_figure(6 * len(panels), 4)
    figure.suptitle(plain(title), parse_math=False)
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
