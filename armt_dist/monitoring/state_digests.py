"""Digests of every memory state, and the first one that differs between two runs.

    python -m armt_dist.digest RUN_A RUN_B

prints the first (step, segment, layer) at which the memory states of two runs with digests=true differ. That cell
computed something else: a state depends only on cells of no later segment and no higher layer.
Exit codes: 0 no difference, 1 a difference, 2 an error in the arguments.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..config import ConfigError, one_line
from ..records import read_json_lines
from ..runtime.segment_bptt import CellView
from ..schedule.grid import Grid, block_segments

FOLDER = "digests"


class Key(NamedTuple):
    """The place of a state in a run: after this segment, in this layer. Independent of the rank that held it."""

    step: int
    segment: int
    layer: int
    row: int  # first row of the global batch that the state covers


class Digests:
    """Writes the digests of one rank to OUT/digests/rank_R.jsonl. Slow: every state is copied to the host."""

    def __init__(self, out: Path, rank: int):
        (out / FOLDER).mkdir(exist_ok=True)
        self.file = (out / FOLDER / f"rank_{rank}.jsonl").open("a", encoding="utf-8")

    def of(self, step: int, row: int, grid: Grid) -> Callable[[CellView], None]:
        """Return the observer of a micro-batch that begins at `row` of the global batch of step `step`."""
        starts = [block.start for block in block_segments(grid)]

        def observe(seen: CellView) -> None:
            at = seen.instruction
            key = Key(step, starts[at.block] + seen.segment, at.layer, row + seen.row)
            self.file.write(json.dumps({**key._asdict(), "digest": state_digest(seen.after)}) + "\n")

        return observe

    def flush(self) -> None:
        """Make what was written readable for other processes."""
        self.file.flush()


def state_digest(state: Iterable[Tensor]) -> str:
    """Return the SHA-256 of the bytes of a state's tensors, shortened to 64 bits."""
    total = hashlib.sha256()
    for tensor in state:
        total.update(tensor.detach().contiguous().cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def read_digests(run: Path) -> dict[Key, str]:
    """Return all digests of a run; where a resumed run repeated a step, the later ones. Raises ConfigError."""
    files = sorted((run / FOLDER).glob("rank_*.jsonl"))
    if not files:
        raise ConfigError(f"run={run}: no {FOLDER}/rank_*.jsonl; train it with digests=true")
    found = {}
    for path in files:
        try:
            for record in read_json_lines(path):
                value = record.pop("digest")
                found[Key(**record)] = value
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"run={run}: {path.name} is not readable ({one_line(error)})") from None
    return found


def first_difference(a: dict[Key, str], b: dict[Key, str]) -> Key | None:
    """Return the first state that both runs have and that differs."""
    return next((key for key in sorted(a.keys() & b.keys()) if a[key] != b[key]), None)


def main() -> int:
    """Compare two runs and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_a", type=Path)
    parser.add_argument("run_b", type=Path)
    args = parser.parse_args()
    a, b = read_digests(args.run_a), read_digests(args.run_b)
    shared = a.keys() & b.keys()
    if not shared:
        raise ConfigError(f"run={args.run_b}: no state in common with {args.run_a}; compare runs of one configuration")
    key = first_difference(a, b)
    if key is None:
        print(
            f"no difference in {len(shared)} states; {len(a) - len(shared)} states in {args.run_a} only, "
            f"{len(b) - len(shared)} in {args.run_b} only"
        )
        return 0
    print(
        f"first difference: step {key.step}, segment {key.segment}, layer {key.layer} "
        f"(rows from {key.row} of the global batch on): {a[key]} and {b[key]}"
    )
    return 1
