"""Which rank a run that hangs waits for: groups the ranks by where they stand, and shows the smallest group first.

    python -m armt_dist.stuck runs/NAME

Ranks that wait for another one stand where it has not come yet: in the same call, since the same time. Reads what every
rank leaves behind, its heartbeat and its newest Python stacks. A rank that was killed or stopped has no stacks, and is
shown before any other. The job scripts call it when a run fails; it can be called while the run hangs as well.
"""

import argparse
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from ..config import ConfigError, Section, read_yaml
from ..files import read_json, read_text
from ..records import RUN_CONFIG

# Beats that a rank may miss before it counts as silent.
MISSED = 3
# Groups that are shown; beyond them a run does not hang in one place.
GROUPS = 20
STACKS_BYTES = 2**24
FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)$')


class Beat(Section):
    """What a rank writes every few seconds; see `Watchdog.beat`."""

    rank: int
    host: str
    pid: int
    section: str
    step: int
    seconds: float  # in this section
    instruction: str | None
    time: float  # of the system's clock


class Place(NamedTuple):
    """Where a rank stands, as far as others may stand there too."""

    gone: bool  # without a heartbeat, or without stacks where others have some
    section: str
    step: int
    instruction: str | None
    stands_in: str  # innermost frame, and the innermost of ours; empty without stacks


def read_beats(run: Path) -> list[Beat]:
    """Return the heartbeats of all ranks, in order. Raises ConfigError if there is none."""
    beats = []
    for path in (run / "heartbeat").glob("rank_*.json"):
        # One that is being written for the first time, or is damaged, says nothing.
        with suppress(OSError, ValueError, ValidationError):
            beats.append(Beat.model_validate(read_json(path)))
    if not beats:
        raise ConfigError(f"run={run}: no heartbeat/rank_*.json; give the folder of a run that has begun to train")
    return sorted(beats, key=lambda beat: beat.rank)


def newest_stack(run: Path, beat: Beat) -> str:
    """Return where this process's newest stacks show its main thread; empty if it has left none."""
    try:
        text = read_text(run / "stacks" / f"rank_{beat.rank}.txt", most=STACKS_BYTES)
    except (OSError, ValueError):
        return ""
    _, found, newest = text.rpartition(f" pid {beat.pid}: ")
    if not found:
        return ""
    # faulthandler writes the main thread last.
    frames = [match for line in newest.rpartition("hread 0x")[2].splitlines() if (match := FRAME.match(line))]
    ours = next((frame for frame in frames if "/armt_dist/" in frame["file"]), None)
    named = [frame for frame in (frames[0] if frames else None, ours) if frame]
    return ", called by ".join(dict.fromkeys(map(describe_frame, named)))


def describe_frame(frame: re.Match) -> str:
    """Return function, file and line of a frame, without the folders above the package."""
    parts = Path(frame["file"]).parts
    return f"{frame['function']} ({'/'.join(parts[-3:])}:{frame['line']})"


def group(run: Path, beats: Sequence[Beat]) -> dict[Place, list[Beat]]:
    """Return the ranks by where they stand, the smallest group first."""
    settings = read_yaml(run / RUN_CONFIG).get("watchdog") or {}
    limit_s = MISSED * settings.get("heartbeat_s", 10)
    newest = max(beat.time for beat in beats)
    stacks = [newest_stack(run, beat) for beat in beats]
    groups = defaultdict[Place, list[Beat]](list)
    for beat, stack in zip(beats, stacks, strict=True):
        gone = newest - beat.time > limit_s or (any(stacks) and not stack)
        groups[Place(gone, beat.section, beat.step, beat.instruction, stack)].append(beat)
    # Of groups alike in size, the ones that are behind.
    return dict(sorted(groups.items(), key=lambda item: (not item[0].gone, len(item[1]), item[0].step)))


def describe(run: Path) -> Iterator[str]:
    """Yield a line for each group. Raises ConfigError."""
    beats = read_beats(run)
    groups = group(run, beats)
    several = f"{len(groups)} places, the odd ones first" if len(groups) > 1 else "one place"
    yield f"{run}: {len(beats)} ranks stand in {several}"
    for place, members in list(groups.items())[:GROUPS]:
        yield f"  {who(members)}: {where(place, members)}"
    if len(groups) > GROUPS:
        yield f"  and {len(groups) - GROUPS} more"
    place, smallest = next(iter(groups.items()))
    if len(groups) > 1 and (place.gone or 2 * len(smallest) < len(beats)):
        yield f"apart from the others: {who(smallest)}"


def who(members: Sequence[Beat]) -> str:
    """Name ranks; one alone with its host and process."""
    if len(members) == 1:
        (only,) = members
        return f"rank {only.rank} on {only.host} (pid {only.pid})"
    return f"{len(members)} ranks ({', '.join(ranges([member.rank for member in members]))})"


def ranges(numbers: Iterable[int]) -> Iterator[str]:
    """Yield ascending numbers as 3 or 5-9."""
    begin = end = None
    for number in [*numbers, None]:
        if end is not None and number == end + 1:
            end = number
            continue
        if begin is not None:
            yield f"{begin}" if begin == end else f"{begin}-{end}"
        begin = end = number


def where(place: Place, members: Sequence[Beat]) -> str:
    """Say where they stand, and since when."""
    since = sorted({clock(member.time - member.seconds) for member in members})
    said = f"in {place.section} after step {place.step} since {' to '.join(dict.fromkeys((since[0], since[-1])))}"
    said += f", last instruction {place.instruction}" if place.instruction else ", before any instruction"
    if place.gone:
        said = f"no sign of life since {clock(max(member.time for member in members))}; {said}"
    return f"{said}; {'stands in ' + place.stands_in if place.stands_in else 'no stacks'}"


def clock(seconds: float) -> str:
    """Return the time of day, of the system's clock."""
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def main() -> None:
    """Read the arguments and print. Raises ConfigError."""
    parser = argparse.ArgumentParser(
        prog="python -m armt_dist.stuck",
        description=__doc__.partition("\n\n")[0],
        epilog="example: python -m armt_dist.stuck runs/NAME",
    )
    parser.add_argument("run", type=Path, help="folder of a run that hangs, or has hung")
    for line in describe(parser.parse_args().run):
        print(line)
