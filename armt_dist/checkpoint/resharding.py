"""Loads a ZeRO-3 checkpoint on another number of ranks, or with other groups of the optimizer: each rank reads the
values that it will own, and no others.

ZeRO-3 cuts each parameter, flat, into equal parts, one for each rank, the last one padded. A rank keeps its parts of
all parameters one after another in flat groups: the master weights, and a tensor as long for each state of the
optimizer. What a new rank owns thus lies in few old shards, which are mapped from disk and copied from.

DeepSpeed's way is a universal checkpoint: three files for each tensor and shard, each of which every rank reads whole.
torch.distributed.checkpoint would do, but plans with pickles that the ranks send each other.

Shapes: P values of a parameter, W ranks, ceil(P / W) values of a rank's part.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .deepspeed_files import count_steps, flat_groups, frozen_parts, load_optimizer, trained_layout
from .zero_shards import MODEL, OPTIMIZER, open_file, stretch_of

# The name of the master weights among the states of a flat group.
MASTER = "fp32"


class Shard(NamedTuple):
    """What the file of a rank's optimizer holds."""

    states: dict[str, list[Tensor]]  # flat groups: of the master weights, and of each state
    plain: dict[str, Any]  # the other states, such as the number of steps, which are those of all ranks


class Shards:
    """The files of a checkpoint, each mapped when it is first needed."""

    def __init__(self, folder: Path, world: int):
        """world: number of ranks that wrote it. Raises ConfigError for files that are missing or damaged."""
        self.world = world
        self.optimizer = cache(lambda rank: open_shard(folder, rank))
        self.model = cache(lambda rank: open_file(folder, MODEL, rank))
        self.trained = {name: shape for group in self.model(0)["param_shapes"] for name, shape in group.items()}
        self.frozen = self.model(0).get("frozen_param_shapes") or {}
        parts = [-(-shape.numel() // world) for shape in self.trained.values()]
        self.starts = dict(zip(self.trained, accumulate(parts, initial=0), strict=False))

    def trained_values(self, name: str, state: str, rank: int, start: int, stop: int) -> Iterator[Tensor]:
        """Yield views of the values `start` to `stop` of a rank's part of a trained parameter."""
        return stretch_of(self.optimizer(rank).states[state], self.starts[name] + start, stop - start)

    def frozen_values(self, name: str, rank: int, start: int, stop: int) -> Iterator[Tensor]:
        """Yield views of the values `start` to `stop` of a rank's part of a frozen parameter."""
        yield self.model(rank)["frozen_param_fragments"][name].flatten()[start:stop]


def open_shard(folder: Path, rank: int) -> Shard:
    """Map the file of a rank's optimizer. Raises ConfigError for a damaged one, many exceptions for other contents."""
    content = open_file(folder, OPTIMIZER, rank)["optimizer_state_dict"]
    if content["zero_stage"] != 3:
        raise ValueError(f"written by ZeRO stage {content['zero_stage']}")
    flats, base = content["fp32_flat_groups"], content["optimizer_state_dict"]
    first = base["state"].get(0, {})
    as_long = {name for name, value in first.items() if isinstance(value, Tensor) and value.dim()}
    states = {name: [base["state"][group][name] for group in range(len(flats))] for name in first if name in as_long}
    plain = {name: value for name, value in first.items() if name not in as_long}
    return Shard({MASTER: flats, **states}, plain)


class Place(NamedTuple):
    """Some values of a parameter: `start` to `stop` of an old rank's part, and where they begin in a new one's."""

    rank: int
    start: int
    stop: int
    at: int


def places(numel: int, old_world: int, world: int, rank: int) -> Iterator[Place]:
    """Yield where the values are that `rank` of `world` owns of a parameter with `numel`; padding has no place."""
    old, new = -(-numel // old_world), -(-numel // world)
    first, last = (min(number * new, numel) for number in (rank, rank + 1))
    for holder in range(first // old, -(-last // old)) if first < last else ():
        start, stop = max(first - holder * old, 0), min(last - holder * old, old)
        yield Place(holder, start, stop, holder * old + start - first)


class Wanted(NamedTuple):
    """A flat tensor to be filled with what a rank owns of a parameter."""

    target: Tensor  # ceil(P / W) values
    numel: int  # of the whole parameter
    source: Callable[[int, int, int], Iterable[Tensor]]  # yields the values of an old rank's part, from start to stop


def fill(
    wanted: Sequence[Wanted],
    old_world: int,
    world: int,
    rank: int,
    tell: Callable[[float], None] = lambda part: None,
) -> None:
    """Fill flat tensors with what `rank` owns, and zeros behind it: ZeRO-3's padding.

    One old shard after another, each from its beginning to its end as far as `wanted` is in its order: a kernel that
    reads ahead in as many places as there are shards and states reads what it drops again before it is used.
    tell: called with the part that is done. Raises ValueError if a shard has too few values.
    """
    by_numel = {
        numel: {place.rank: place for place in places(numel, old_world, world, rank)}
        for numel in {each.numel for each in wanted}
    }
    for target, numel, _ in wanted:
        owned = sum(place.stop - place.start for place in by_numel[numel].values())
        target[owned:].zero_()
    holders = sorted({holder for found in by_numel.values() for holder in found})
    for number, holder in enumerate(holders, 1):
        for target, numel, source in wanted:
            if holder in by_numel[numel]:
                copy_from(source, by_numel[numel][holder], target)
        tell(number / len(holders))


def copy_from(source: Callable[[int, int, int], Iterable[Tensor]], place: Place, target: Tensor) -> None:
    """Copy the values at one place. Raises ValueError if there are fewer."""
    filled, end = place.at, place.at + place.stop - place.start
    for values in source(place.rank, place.start, place.stop):
        target[filled : filled + len(values)].copy_(values)
        filled += len(values)
    if filled != end:
        raise ValueError(f"rank {place.rank} holds {end - filled} values too few of a parameter")


@torch.no_grad()
def reshard(engine: Any, folder: Path, old_world: int, say: Callable[[str], None]) -> None:
    """Fill this rank's parts of parameters and optimizer states from a checkpoint of `old_world` ranks.

    say: told again and again how far it is. Not collective; in a block of `partitioned`. Raises ConfigError for damaged
    files, and many exceptions for those of another model.
    """
    old, rank, world = Shards(folder, old_world), dist.get_rank(), dist.get_world_size()
    groups, frozen = flat_groups(engine), list(frozen_parts(engine))
    check_shapes(old.trained, {name: shape for group in groups for name, shape in group.shapes.items()})
    check_shapes(old.frozen, {name: shape for name, shape, _ in frozen})
    shard = old.optimizer(rank * old_world // world)
    states, wanted = [], list[Wanted]()
    for group in groups:
        # Filled in place where there are some already: no second copy, on a GPU least of all.
        state = {name: group.states.get(name, torch.empty_like(group.flat)) for name in shard.states if name != MASTER}
        sizes = [-(-shape.numel() // world) for shape in group.shapes.values()]
        for state_name, flat in {MASTER: group.flat, **state}.items():
            for (name, shape), part in zip(group.shapes.items(), flat.detach().split(sizes), strict=True):
                wanted.append(Wanted(part, shape.numel(), partial(old.trained_values, name, state_name)))
        # Of its own for each group: the optimizer counts its steps in place.
        states.append({**deepcopy(shard.plain), **state})
    fill(wanted, old_world, world, rank, lambda part: say(f"reading {folder} of {old_world} ranks: {part:.0%}"))
    load_optimizer(engine, states)
    parts = [Wanted(part, shape.numel(), partial(old.frozen_values, name)) for name, shape, part in frozen]
    fill(parts, old_world, world, rank)
    count_steps(engine, old.model(0))


def fits_as_it_is(engine: Any, folder: Path, old_world: int) -> bool:
    """Tell whether each rank owns what it owned when the checkpoint of `old_world` ranks was written. Not collective.

    Raises ConfigError for a damaged file.
    """
    if old_world != dist.get_world_size():
        return False
    return [list(group) for group in open_file(folder, MODEL, 0)["param_shapes"]] == trained_layout(engine)


def check_shapes(saved: dict[str, torch.Size], wanted: dict[str, torch.Size]) -> None:
    """Raise ValueError, naming a parameter, where a checkpoint has others than the model."""
    for name in {**saved, **wanted}:
        if saved.get(name) != wanted.get(name):
            was, now = (list(shapes[name]) if name in shapes else "none" for shapes in (saved, wanted))
            raise ValueError(f"{name}: of shape {was} in it, {now} in the model")
