"""Where the values of a rank are among the shards of another number of ranks."""

from functools import partial
from itertools import product

import pytest
import torch

from armt_dist.checkpoint.resharding import Shards, Wanted, check_shapes, fill, places

SIZES = (1, 2, 5, 7, 12, 13)
WORLDS = (1, 2, 3, 4, 6)


def cut(values: torch.Tensor, world: int) -> list[torch.Tensor]:
    """ZeRO-3's parts, the last ones padded."""
    part = -(-len(values) // world)
    return list(torch.cat([values, torch.zeros(part * world - len(values))]).split(part))


def stretch(shards: list[torch.Tensor], rank: int, start: int, stop: int) -> list[torch.Tensor]:
    return [shards[rank][start:stop]]


@pytest.mark.parametrize(("old", "new"), [*product(WORLDS, WORLDS)])
def test_every_value_is_read_once_from_where_it_is(old, new):
    for size in SIZES:
        whole = torch.arange(1.0, size + 1)
        shards, wanted = cut(whole, old), cut(whole, new)
        for rank in range(new):
            target = torch.full_like(wanted[rank], -1)
            fill([Wanted(target, size, partial(stretch, shards))], old, new, rank)
            assert torch.equal(target, wanted[rank])
            found = list(places(size, old, new, rank))
            assert all(0 <= start < stop <= len(shards[holder]) for holder, start, stop, _ in found)


def test_a_shard_is_read_to_its_end_before_the_next_one():
    """A rank that needs values of several shards for every parameter, and of which some are in one shard alone."""
    reads = []

    def source(name, rank, start, stop):
        reads.append((rank, name, start))
        return [torch.zeros(stop - start)]

    sizes = {"a": 32, "b": 3, "c": 12}
    wanted = [Wanted(torch.empty(-(-size // 2)), size, partial(source, name)) for name, size in sizes.items()]
    told = []
    fill(wanted, 8, 2, 0, told.append)
    assert len({rank for rank, *_ in reads}) > 3 and reads == sorted(reads)
    assert told == sorted(told) and told[-1] == 1


def write(folder, world: int, values: dict, frozen: dict, group: int = 4) -> None:
    """Shards as DeepSpeed writes them, in flat groups of at least `group` values."""
    for rank in range(world):
        groups, length = [[]], 0
        for whole in values.values():
            groups[-1].append(cut(whole.flatten(), world)[rank])
            length += len(groups[-1][-1])
            if length >= group:
                groups.append([])
                length = 0
        flats = [torch.cat(parts) for parts in groups if parts]
        state = {i: {"step": torch.tensor(3.0), "exp_avg": -flat} for i, flat in enumerate(flats)}
        optimizer = {"zero_stage": 3, "partition_count": world, "fp32_flat_groups": flats}
        optimizer["optimizer_state_dict"] = {"state": state, "param_groups": [{"lr": 1.0, "params": [*state]}]}
        torch.save({"optimizer_state_dict": optimizer}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        model = {
            "param_shapes": [{name: whole.shape for name, whole in values.items()}],
            "frozen_param_shapes": {name: whole.shape for name, whole in frozen.items()},
            "frozen_param_fragments": {name: cut(whole.flatten(), world)[rank] for name, whole in frozen.items()},
        }
        torch.save(model, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")


VALUES = {"a": torch.arange(1.0, 7).view(2, 3), "b": torch.arange(7.0, 8), "c": torch.arange(8.0, 19)}
FROZEN = {"d": torch.arange(19.0, 24)}


@pytest.mark.parametrize("old", [1, 2, 3, 5])
def test_files(old, tmp_path):
    write(tmp_path, old, VALUES, FROZEN)
    for new, (name, whole) in product((1, 2, 4, 7), (VALUES | FROZEN).items()):
        shards = Shards(tmp_path, old)
        for rank, part in enumerate(cut(whole.flatten(), new)):
            sources = [(partial(shards.frozen_values, name), 1)]
            if name in VALUES:
                sources = [
                    (partial(shards.trained_values, name, state), s) for state, s in (("fp32", 1), ("exp_avg", -1))
                ]
            for source, sign in sources:
                target = torch.empty_like(part)
                fill([Wanted(target, whole.numel(), source)], old, new, rank)
                assert torch.equal(target, sign * part)


def test_a_rank_opens_only_the_shards_that_it_reads(tmp_path):
    write(tmp_path, 8, {"a": torch.arange(64.0)}, {})
    for rank in range(8):
        if rank not in (4, 5):
            (tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").unlink()
    target = torch.empty(16)
    fill([Wanted(target, 64, partial(Shards(tmp_path, 8).trained_values, "a", "fp32"))], 8, 4, 2)
    assert torch.equal(target, torch.arange(32.0, 48))


def test_values_that_are_missing(tmp_path):
    write(tmp_path, 2, VALUES, FROZEN)
    shards = Shards(tmp_path, 2)
    flat = shards.optimizer(1).states["fp32"]
    flat[-1] = flat[-1][:-2]
    with pytest.raises(ValueError, match="rank 1 holds 1 values too few of a parameter"):
        fill([Wanted(torch.empty(11), 11, partial(shards.trained_values, "c", "fp32"))], 2, 1, 0)


def test_another_model():
    shapes = {name: whole.shape for name, whole in VALUES.items()}
    check_shapes(shapes, dict(shapes))
    with pytest.raises(ValueError, match=r"a: of shape \[2, 3\] in it, \[3, 2\] in the model"):
        check_shapes(shapes, {**shapes, "a": torch.Size([3, 2])})
    with pytest.raises(ValueError, match=r"e: of shape none in it, \[1\] in the model"):
        check_shapes(shapes, {**shapes, "e": torch.Size([1])})
