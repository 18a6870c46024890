"""Consolidating a checkpoint to a Hugging Face folder: seconds, memory and bytes read by size.

    python benchmarks/scale_consolidation.py [--billions 0.1 0.3 1] [--shards 8 64] [--dtype float32] [--memory MB]
        [--folder .]

Fabricates a run of a random Llama with memory as ZeRO-3 leaves it (12 bytes a parameter, with a manifest), and exports
it, in a process of its own, from files that are not in the page cache. Needs 16 GB of disk a billion parameters; with
root rights it drops the page cache, without them `cold` is "no". --memory, with root rights: an export and its page
cache have only so many MB, as if the checkpoint were larger than the memory of the machine. Prints a Markdown table
with the fitted law, and one JSON line last.

MB/s    bytes of the checkpoint by seconds; the bytes written are not counted
read    bytes that came from the disk by those of the checkpoint
added   anonymous memory at most, beyond what the process had before
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measures import MB, Highest, bytes_from_disk, drop_cache, exponent, join_group, limited_memory
from ranks import heading, table
from scale_resume import fabricate, llama_size

from armt_dist.checkpoint.export import PREFIX, export, skeleton
from armt_dist.checkpoint.folder import hash_files, tag_of, write_manifest
from armt_dist.model.configuration_armt import ARMTConfig


def fabricate_run(run: Path, billions: float, world: int) -> int:
    """Write a run of about so many billion parameters by `world` ranks; return the number of parameters."""
    layers, width = llama_size(billions)
    base = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 8 * width // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "vocab_size": 8_000,
    }
    ARMTConfig(base_config=base, segment_tokens=16, num_mem_tokens=2, d_mem=8).save_pretrained(run / "model")
    model = skeleton(run / "model", "float32")
    shapes = {PREFIX + name: parameter.shape for name, parameter in model.named_parameters()}
    checkpoint = run / "checkpoints" / tag_of(1)
    checkpoint.mkdir(parents=True)
    fabricate(checkpoint, shapes, world)
    entries = hash_files(checkpoint, checkpoint.iterdir())
    write_manifest(checkpoint, entries, {"tag": checkpoint.name, "world_size": world, "state": {}})
    return sum(shape.numel() for shape in shapes.values())


def measure(run: Path, dtype: str, group: Path | None) -> dict[str, float]:
    """Export a run in this process."""
    join_group(group)
    disk, started, computed = bytes_from_disk(), time.perf_counter(), time.process_time()
    with Highest() as highest:
        export(run, run / "export", dtype=dtype)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_s": time.process_time() - computed,
        "disk": bytes_from_disk() - disk,
        "added_mb": highest.added / MB,
    }


def fabricate_and_measure(billions: float, world: int, args: argparse.Namespace) -> dict[str, float]:
    """Return one row of the table."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, limited_memory(args.memory) as group:
        run = Path(folder)
        count = fabricate_run(run, billions, world)
        held = sum(path.stat().st_size for path in (run / "checkpoints").rglob("*.pt"))
        cold = drop_cache()
        command = [sys.executable, __file__, "--dtype", args.dtype, "--one", folder]
        command += ["--group", str(group)] if group else []
        done = subprocess.run(command, capture_output=True, text=True, timeout=590)
        if done.returncode:
            sys.exit(f"{billions} billion parameters: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    found["read"] = found.pop("disk") / held
    return {"size": count, "shards": world, "mb": held / MB, "cold": cold, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--billions", type=float, nargs="+", default=[0.1, 0.3, 1])
    parser.add_argument("--shards", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--folder", default=".", help="on the disk to be measured")
    parser.add_argument("--memory", type=int, metavar="MB", help="of an export and its page cache (default: no limit)")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--group", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.dtype, args.group)))
        return
    rows = []
    for world in args.shards:
        for size in args.billions:
            rows.append(fabricate_and_measure(size, world, args))
            print(rows[-1], file=sys.stderr, flush=True)
    header = ["billion parameters", "shards", "MB", "cold", "seconds", "CPU seconds", "MB/s", "read", "added, MB"]
    lines = [
        [
            f"{row['size'] / 1e9:.2f}",
            row["shards"],
            f"{row['mb']:,.0f}",
            "yes" if row["cold"] else "no",
            f"{row['seconds']:.1f}",
            f"{row['cpu_s']:.1f}",
            f"{row['mb'] / row['seconds']:,.0f}",
            f"{row['read']:.2f}",
            f"{row['added_mb']:.0f}",
        ]
        for row in rows
    ]
    print(heading("scale_consolidation.py"), table(header, lines), sep="\n\n")
    for world in args.shards if len(args.billions) > 1 else ():
        of_world = [row for row in rows if row["shards"] == world]
        laws = ", ".join(f"{field} {exponent(of_world, field):.2f}" for field in ("seconds", "cpu_s", "added_mb"))
        print(f"\nGrows with the parameters, {world} shards, to the power of: {laws}.")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
