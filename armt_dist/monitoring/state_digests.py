"""Digests of every memory state, and where those of two runs begin to differ.

    python -m armt_dist.digest RUN_A RUN_B

names the first (step, segment, layer) where the memory states of two runs written with digests=true differ. The cell
that went wrong is this one: a state depends only on cells with no later segment and no higher layer. Exit codes: 0 no
difference, 1 a difference, 2 a mistake.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from ..config import ConfigError
from ..model.memory import State
from ..runtime.segment_bptt import CellView
from ..schedule.grid import Grid, block_segments

FOLDER = "digests"


class Key(NamedTuple):
    """Which state: after this segment, in this layer. Independent of the rank that held it."""

    step: int
    segment: int
    layer: int
    row: int  # of the global batch: the first of those that the state covers


class Digests:
    """The writer of one rank: OUT/digests/rank_R.jsonl. Copies every state to the host, so it is slow."""

    def __init__(self, out: Path, rank: int):
        (out / FOLDER).mkdir(exist_ok=True)
        self.file = (out / FOLDER / f"rank_{rank}.jsonl").open("a", encoding="utf-8")

    def of(self, step: int, row: int, grid: Grid):
        """The observer of one micro-batch, which begins at `row` of the global batch of step `step`."""
        starts = [block.start for block in block_segments(grid)]

        def observe(seen: CellView) -> None:
            at = seen.instruction
            key = Key(step, starts[at.block] + seen.segment, at.layer, row + seen.row)
            self.file.write(json.dumps({**key._asdict(), "digest": state_digest(seen.after)}) + "\n")

        return observe

    def flush(self) -> None:
        """Let others read what was written."""
        self.file.flush()


def state_digest(state: State) -> str:
    """SHA-256 of the bytes of a state's tensors, shortened to 64 bits."""
    total = hashlib.sha256()
    for tensor in state:
        total.update(tensor.detach().contiguous().cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def read_digests(run: Path) -> dict[Key, str]:
    """All digests of a run; where a resumed run made a step again, the later ones. Raises ConfigError."""
    files = sorted((run / FOLDER).glob("rank_*.jsonl"))
    if not files:
        raise ConfigError(f"run={run}: no {FOLDER}/rank_*.jsonl; train it with digests=true")
    found = {}
    for path in files:
        for line in path.read_text(encoding="utf-8").splitlines():
            # A killed run may have left half a line.
            if line.endswith("}"):
                record = json.loads(line)
                value = record.pop("digest")
                found[Key(**record)] = value
    return found


def first_difference(a: dict[Key, str], b: dict[Key, str]) -> Key | None:
    """The first state that both runs have and that differs."""
    return next((key for key in sorted(a.keys() & b.keys()) if a[key] != b[key]), None)


def main() -> int:
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
        alone = f"{len(a) - len(shared)} and {len(b) - len(shared)} in one run only"
        print(f"no difference in {len(shared)} states; {alone}")
        return 0
    print(
        f"first difference: step {key.step}, segment {key.segment}, layer {key.layer} "
        f"(rows from {key.row} of the global batch): {a[key]} and {b[key]}"
    )
    return 1
