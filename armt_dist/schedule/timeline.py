"""Draw timelines of all ranks, simulated or measured, as text and as PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .program import Instruction, Op

FORWARD_LAYERS = "0123456789"
BACKWARD_LAYERS = "abcdefghij"
WEIGHT_LAYERS = "ABCDEFGHIJ"
LAYERS = {Op.RUN: FORWARD_LAYERS, Op.WEIGHT: WEIGHT_LAYERS}
WAITS = {Op.GATHER: "-", Op.REDUCE: "-", Op.RECV: ".", Op.RECV_GRAD: "."}
LEGEND = (
    "0-9 forward of layer (mod 10), a-j backward, A-J weight gradients, . waiting for a state, - waiting for a "
    "collective, blank: done"
)
COLOURS = {Op.GATHER: "tab:red", Op.REDUCE: "tab:purple", Op.RECV: "0.85", Op.RECV_GRAD: "0.85"}
NAMES = {
    Op.RUN: "forward (darker: higher layer)",
    Op.BACK: "backward",
    Op.WEIGHT: "weight gradients",
    Op.GATHER: "wait for gather",
    Op.REDUCE: "wait for reduce",
    Op.RECV: "wait for state",
}


class Event(NamedTuple):
    """A span of one rank's time: computing, or waiting in GATHER, RECV, RECV_GRAD or REDUCE."""

    rank: int
    instruction: Instruction
    start_s: float
    end_s: float


def symbol(instruction: Instruction) -> str:
    """Return one character for what a rank does."""
    if instruction.op in WAITS:
        return WAITS[instruction.op]
    return LAYERS.get(instruction.op, BACKWARD_LAYERS)[instruction.layer % 10]


def show(events: Sequence[Event], width: int = 100) -> str:
    """Draw one row per rank, `width` columns for the whole time; a column shows what the rank does in its middle."""
    start_s, end_s = min(event.start_s for event in events), max(event.end_s for event in events)
    column_s = (end_s - start_s) / width
    rows = {rank: [" "] * width for rank in sorted({event.rank for event in events})}
    for event in events:
        first, end = (round((t - start_s) / column_s) for t in (event.start_s, event.end_s))
        rows[event.rank][first:end] = symbol(event.instruction) * (end - first)
    lines = [f"rank {rank:>3} |{''.join(row)}|" for rank, row in rows.items()]
    return "\n".join([*lines, f"{end_s - start_s:.4g} s; {LEGEND}"])


def plot_timeline(events: Sequence[Event], path: str | Path, title: str = "") -> None:
    """Draw a PNG at `path`: blue forward, orange backward, green weight gradients, darker for higher layers; waits grey
    and red."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ranks = sorted({event.rank for event in events})
    start_s = min(event.start_s for event in events)
    figure = Figure(figsize=(14, min(1.5 + 0.35 * len(ranks), 12)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(title=title, xlabel="seconds", ylabel="rank")
    shades = colours(events)
    for rank in ranks:
        own = [event for event in events if event.rank == rank]
        spans = [(event.start_s - start_s, event.end_s - event.start_s) for event in own]
        axes.broken_barh(spans, (rank - 0.45, 0.9), facecolors=[shades[event.instruction[:2]] for event in own])
    axes.set_ylim(max(ranks) + 0.6, min(ranks) - 0.6)
    top = {op: max((key for key in shades if key[0] is op), default=None) for op in NAMES}
    handles = [Patch(color=shades[key], label=NAMES[op]) for op, key in top.items() if key]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=120)


def colours(events: Sequence[Event]) -> dict:
    """Return a colour for each (op, layer) that occurs."""
    from matplotlib import colormaps

    highest = max(event.instruction.layer for event in events) or 1
    names = {Op.RUN: "Blues", Op.BACK: "Oranges", Op.RERUN: "Oranges", Op.WEIGHT: "Greens"}
    maps = {op: colormaps[name] for op, name in names.items()}
    found = {event.instruction[:2] for event in events}
    return {(op, layer): maps[op](0.25 + 0.6 * layer / highest) if op in maps else COLOURS[op] for op, layer in found}


SENDER = {Op.RECV: -1, Op.RECV_GRAD: 1}
"""From which block (and rank) a message comes, relative to the receiver."""


def waits_s(events: Sequence[Event], ranks: int) -> tuple[list[float], list[float], list[float]]:
    """Return for each rank the exposed hand-off waits, the skew (first wait of each direction) and the waits for
    gathers, in seconds."""
    exposed, skew, gather = ([0.0] * ranks for _ in range(3))
    filled: set[tuple[int, Op]] = set()
    for rank, instruction, start_s, end_s in events:
        if instruction.op is Op.GATHER:
            gather[rank] += end_s - start_s
        elif instruction.op in SENDER:
            first = (rank, instruction.op) not in filled
            filled.add((rank, instruction.op))
            (skew if first else exposed)[rank] += end_s - start_s
    return exposed, skew, gather
