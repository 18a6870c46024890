"""Shows an audit: a sentence that names the layer at fault, a table by layer, and a chart."""

import math
from pathlib import Path

from ..records import text_table
from .audit import GATES, Audit
from .charts import Curve, Panel, draw

# A layer is at fault where its recent state alone is better by this much.
LEAST = {"accuracy": 0.02, "loss": 0.01}


def sentence(audit: Audit) -> str:
    """Name the layer whose state does harm at this length, if one does."""
    sign = 1 if audit.measure == "accuracy" else -1
    gains = [sign * (layer.with_recent - audit.value) for layer in audit.layers]
    if not audit.samples:
        return f"No sample needs only its last {audit.recent} segments, so no layer was tried; audit a longer input."
    worst = max(range(len(gains)), key=gains.__getitem__)
    short = f"of the last {audit.recent} segments alone"
    if gains[worst] < LEAST[audit.measure]:
        return (
            f"No layer's memory does harm at {audit.segments} segments: {audit.measure} is {audit.value:.3f}, and at "
            f"best {audit.layers[worst].with_recent:.3f} with one layer's memory {short}."
        )
    layer = audit.layers[worst]
    mean, deviation = (grown(values, audit.recent) for values in (layer.mean, layer.deviation))
    return (
        f"Layer {worst} is at fault: with its memory {short}, {audit.measure} is {layer.with_recent:.3f} instead of "
        f"{audit.value:.3f}. From segment {audit.recent} to {len(layer.mean)} the mean of its states grows {mean:.1f} "
        f"times, the deviation from it {deviation:.1f} times."
    )


def grown(values: list[float], start: int) -> float:
    """Return the last value over that after `start` segments."""
    return values[-1] / values[start - 1] if values[start - 1] else math.inf


def audit_table(audit: Audit) -> str:
    """Format one line for each layer."""
    head = ["layer", "mean of A", "deviation", "signal", "residual", f"{audit.measure}, recent state", "open gates"]
    lines = [head]
    for i, layer in enumerate(audit.layers):
        read = ["" if value is None else f"{value:.3f}" for value in (layer.signal, layer.residual)]
        gates = f"{sum(layer.gates[2:]):.1%}"
        lines.append([str(i), f"{layer.mean[-1]:.2f}", f"{layer.deviation[-1]:.2f}", *read, f"{layer.with_recent:.3f}",
                      gates])  # fmt: skip
    return text_table(lines)


def plot_audit(audit: Audit, path: Path, title: str) -> None:
    """Draw the states by segment, the gates, the credit by lag and, where it is known, the accuracy by age, as a PNG.

    Raises OSError.
    """
    norms, gates, credits = [], [], []
    for i, layer in enumerate(audit.layers):
        segments = range(1, len(layer.mean) + 1)
        norms += [Curve(f"layer {i}, mean", segments, layer.mean)]
        norms += [Curve(f"layer {i}, deviation", segments, layer.deviation)]
        gates.append(Curve(f"layer {i}", range(len(GATES)), layer.gates))
        credits.append(Curve(f"layer {i}", range(1, len(layer.credit) + 1), layer.credit))
    bins = ", ".join(f"{end:g}" for end in GATES)
    panels = [
        Panel("segment", "norm of A over samples", norms, log_x=False),
        Panel(f"gate up to {bins}", "share of writes", gates, log_x=False),
        Panel("lag in segments", "norm of the gradient of the last loss to the state", credits, log_x=False),
    ]
    if audit.ages:
        ages = Curve("samples", [age.most for age in audit.ages], [age.accuracy for age in audit.ages])
        panels.append(Panel("segments since the last needed fact, up to", "accuracy", [ages], limits=(-0.03, 1.03)))
    draw(panels, path, title)
