"""Shows a control of a memory: a sentence that says whether it carries content, a table by position, and a chart."""

from pathlib import Path

from ..records import text_table
from .charts import Curve, Panel, draw
from .control import FULL, NONE, OTHER, OWN, Control, Estimate, Position

LABELS = {OWN: "own memory", OTHER: "another text's memory", NONE: "no memory", FULL: "full attention"}


def sentence(control: Control) -> str:
    """Say whether the memory carries content, and how much that is worth."""
    other, none = control.after.worse[OTHER], control.after.worse[NONE]
    basis = f"bits per byte after the first segment ({control.samples} samples of {plural(control.texts, 'text')})"
    if not other.is_clear:
        verdict = (
            f"The memory carries no content that can be told: another text's in its place costs {show(other)} {basis}"
        )
    elif other.value > 0:
        verdict = f"The memory carries content: another text's in its place costs {show(other)} {basis}"
    else:
        verdict = f"The memory misleads: another text's in its place costs {show(other)} {basis}"
    rest = f"; no memory costs {show(none)}"
    if none.is_clear and none.value > 0 and not other.is_clear:
        rest += ", which is what any memory gives to text that is cut up"
    if control.share is not None:
        rest += f"; that is {control.share:.0%} of what the base with full attention has over another text's memory"
    elif FULL in control.positions[0].bits_per_byte:
        rest += "; the base with full attention is no better than another text's memory"
    if control.same_text:
        rest += f". Of the other memories {control.same_text} are of another part of the same text"
    return f"{verdict}{rest}."


def show(found: Estimate) -> str:
    """Format a number with its standard error."""
    return f"{found.value:.4f} ± {found.error:.4f}"


def plural(count: int, name: str) -> str:
    """Format a number of things."""
    return f"{count} {name}" if count == 1 else f"{count} {name}s"


def segments_of(position: Position) -> str:
    """Name the segments of a position."""
    return str(position.last) if position.first == position.last else f"{position.first}-{position.last}"


def control_table(control: Control) -> str:
    """Format one line for each group of segments, and one for all after the first."""
    names = list(control.positions[0].bits_per_byte)
    lines = [["segments", *names, "other - own", "none - own", *(f"{name}/token" for name in names)]]
    for position in (*control.positions, control.after):
        bits = [position.bits_per_byte, position.bits_per_token]
        per_byte, per_token = ([f"{b[name]:.4f}" if name in b else "" for name in names] for b in bits)
        worse = [show(position.worse[name]) for name in (OTHER, NONE)]
        lines.append([segments_of(position), *per_byte, *worse, *per_token])
    return "bits per byte, and per token\n" + text_table(lines)


def plot_control(control: Control, path: Path, title: str) -> None:
    """Draw bits per byte with each memory, and what the other ones cost, by position, as a PNG. Raises OSError."""
    levels, costs = [], []
    for name, label in LABELS.items():
        reached = [position for position in control.positions if name in position.bits_per_byte]
        if reached:
            ends = [position.last for position in reached]
            levels.append(Curve(label, ends, [position.bits_per_byte[name] for position in reached]))
    for name in (OTHER, NONE):
        ends = [position.last for position in control.positions]
        found = [position.worse[name] for position in control.positions]
        costs.append(Curve(LABELS[name], ends, [each.value for each in found]))
        for sign, side in ((1, "+"), (-1, "-")):
            bound = [each.value + 2 * sign * each.error for each in found]
            costs.append(Curve(f"{LABELS[name]}, {side} 2 standard errors", ends, bound))
    draw(
        [Panel("up to segment", "bits per byte", levels), Panel("up to segment", "cost in bits per byte", costs)],
        path,
        title,
    )


def as_json(control: Control) -> dict:
    """Return a control as nested dicts and lists, with its sentence."""

    def of(position: Position) -> dict:
        """Return a position."""
        worse = {name: found._asdict() for name, found in position.worse.items()}
        return {**position._asdict(), "worse": worse}

    positions = [of(position) for position in control.positions]
    return {**control._asdict(), "positions": positions, "after": of(control.after), "says": sentence(control)}
