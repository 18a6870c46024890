"""Checkpoints without an engine."""

from pathlib import Path

from armt_dist.checkpoint import folder as checkpoint

TAGS = ("step_00000002", "step_00000004")


def write_checkpoints(root: Path) -> None:
    """Write two whole checkpoints into `root`, with `latest` at the second."""
    for tag in TAGS:
        with checkpoint.building(root / tag) as staged:
            files = [staged / "shard_0.pt", staged / "shard_1.pt"]
            for number, path in enumerate(files):
                path.write_bytes(bytes([number]) * 100)
            facts = {"tag": tag, "world_size": 2, "state": {}}
            checkpoint.write_manifest(staged, checkpoint.hash_files(staged, files), facts)
    checkpoint.point_to(root, "latest", TAGS[1])
