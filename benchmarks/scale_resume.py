"""Resuming on another number of ranks: how fast each rank reads what it owns, and what memory that takes.

    python benchmarks/scale_resume.py [--billions 0.1 0.3 1 3] [--shards 8 64] [--ranks 4] [--memory MB]
        [--folder .]

Fabricates checkpoints of a Llama shape as ZeRO-3 writes them (master weights and two moments, 12 bytes a parameter), by
8 and by 64 ranks; then 4 processes each read their parts, as a resumed run does, from files that are not in the page
cache. They fill one buffer again and again: the model itself does not have to fit. Needs 12 GB of disk a billion
parameters; with root rights it drops the page cache, without it `cold` is "no". --memory, with root rights: the ranks
and their page cache have only so many MB, as if the checkpoint were larger than the memory of the machine. Prints a
Markdown table.

MB/s     bytes of the checkpoint by the time until the last rank has its part
read     bytes that the processes had from the disk, or the cache, by those of the checkpoint
added    anonymous memory of a rank beyond its buffer, at most
opened   files that a rank opened, at most
"""

import argparse
import math
import shutil
import tempfile
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from measures import MB, Highest, bytes_from_disk, drop_cache, join_group, limited_memory, memory
from ranks import heading, table

from armt_dist.checkpoint import resharding
from armt_dist.checkpoint.folder import tag_of

STATES = ("fp32", "exp_avg", "exp_avg_sq")


def llama_size(billions: float) -> tuple[int, int]:
    """Layers and width of a Llama with about so many parameters: both grow together."""
    layers = max(2, round(16 * (billions / 1.2) ** (1 / 3)))
    return layers, 64 * round(math.sqrt(billions * 1e9 / layers / 12) / 64)


def shapes_of(billions: float) -> dict[str, torch.Size]:
    """Parameters of a Llama-like model with about so many."""
    layers, width = llama_size(billions)
    layer = {"q": (width, width), "k": (width, width), "v": (width, width), "o": (width, width), "norm": (width,)}
    layer |= {"gate": (8 * width // 3, width), "up": (8 * width // 3, width), "down": (width, 8 * width // 3)}
    return {f"{number}.{name}": torch.Size(shape) for number in range(layers) for name, shape in layer.items()}


def fabricate(folder: Path, shapes: dict[str, torch.Size], world: int) -> int:
    """Write the shards of `world` ranks; the bytes of their states."""
    length = sum(-(-shape.numel() // world) for shape in shapes.values())
    for rank in range(world):
        flat = torch.arange(length, dtype=torch.float32)
        states = {"step": torch.tensor(1.0), "exp_avg": flat + rank, "exp_avg_sq": flat - rank}
        base = {"state": {0: states}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
        content = {"zero_stage": 3, "partition_count": world, "fp32_flat_groups": [flat], "optimizer_state_dict": base}
        torch.save({"optimizer_state_dict": content}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    torch.save({"param_shapes": [shapes]}, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    return 12 * length * world


def read(folder: Path, old_world: int, world: int, group: Path | None, barrier, results, rank: int) -> None:
    """One rank's part."""
    torch.set_num_threads(1)
    join_group(group)
    shards = resharding.Shards(folder, old_world)
    longest = max(-(-shape.numel() // world) for shape in shards.trained.values())
    buffer = torch.zeros(longest)
    barrier.wait()
    wanted = [
        resharding.Wanted(
            buffer[: -(-shape.numel() // world)], shape.numel(), partial(shards.trained_values, name, state)
        )
        for state in STATES
        for name, shape in shards.trained.items()
    ]
    before, disk, start = memory("RssAnon"), bytes_from_disk(), time.perf_counter()
    with Highest() as highest:
        resharding.fill(wanted, old_world, world, rank)
    seconds, most = time.perf_counter() - start, highest.most - before
    results.put((seconds, most, bytes_from_disk() - disk, shards.optimizer.cache_info().currsize))


def measure(root: Path, billions: float, old_world: int, args: argparse.Namespace) -> list:
    """One row of the table."""
    folder = root / tag_of(1)
    folder.mkdir()
    shapes = shapes_of(billions)
    held = fabricate(folder, shapes, old_world)
    cold = drop_cache()
    context = get_context("spawn")
    barrier, results = context.Barrier(args.ranks), context.Queue()
    with limited_memory(args.memory) as group:
        arguments = (folder, old_world, args.ranks, group, barrier, results)
        ranks = [context.Process(target=read, args=(*arguments, rank)) for rank in range(args.ranks)]
        for rank in ranks:
            rank.start()
        found = [results.get(timeout=600) for _ in ranks]
        for rank in ranks:
            rank.join()
    shutil.rmtree(folder)
    seconds, most, disk, opened = (max(column) for column in zip(*found, strict=True))
    disk = sum(row[2] for row in found)
    count = sum(shape.numel() for shape in shapes.values()) / 1e9
    return [
        f"{count:.2f}",
        old_world,
        f"{held / MB:,.0f}",
        "yes" if cold else "no",
        f"{seconds:.1f}",
        f"{held / MB / seconds:,.0f}",
        f"{disk / held:.2f}",
        f"{most / MB:.0f}",
        opened,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--billions", type=float, nargs="+", default=[0.1, 0.3, 1, 3])
    parser.add_argument("--shards", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument(
        "--memory", type=int, metavar="MB", help="of the ranks with their page cache (default: no limit)"
    )
    parser.add_argument("--folder", default=".", help="on the disk to be measured")
    args = parser.parse_args()
    header = ["billion parameters", "shards", "MB", "cold", "seconds", "MB/s", "read", "added, MB", "opened"]
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        rows = [measure(Path(root), size, old, args) for size in args.billions for old in args.shards]
    print(heading("scale_resume.py"), table(header, rows), sep="\n\n")


if __name__ == "__main__":
    main()
