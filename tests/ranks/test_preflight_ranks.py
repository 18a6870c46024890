"""Preflight on four ranks: real measurements with one rank made unfit on purpose."""

import contextlib
import os
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from support.ranks import spawn

from armt_dist.distributed import preflight
from armt_dist.distributed.preflight import Thresholds, judge


@contextlib.contextmanager
def broken(how: str, folder: Path):
    """Make this process unfit from outside, and whole again."""
    with contextlib.ExitStack() as stack:
        patch = lambda module, **new: stack.enter_context(mock.patch.multiple(module, **new))  # noqa: E731
        if how == "compute":
            compute_s = preflight.compute_s
            patch(preflight, compute_s=lambda device: compute_s(device) + 1.0)
        elif how == "links":
            send, recv = dist.send, dist.recv
            patch(dist, send=lambda *a: time.sleep(0.02) or send(*a), recv=lambda *a: time.sleep(0.02) or recv(*a))
        elif how == "full":
            # a link to a device on which every write fails with "No space left on device"
            (folder / ".preflight.2.part").symlink_to("/dev/full")
        elif how == "version":
            fake = folder / "site" / "transformers-0.0.1.dist-info"
            fake.mkdir(parents=True)
            (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 0.0.1\n")
            patch(sys, path=[str(fake.parent), *sys.path])
        yield


def examine_broken(ranks, folder, hows):
    """For each way to break rank 2: the faults that `judge` finds, and the files left in the folder."""
    ranks = ranks._replace(local_world_size=1)
    os.environ["SLURMD_NODENAME"] = f"n{ranks.rank}"
    limits = Thresholds(gpus=0, folder_bytes=0, clock_s=30.0, slow=20.0)
    folder, results = Path(folder), []
    for how in hows:
        here = folder / "only here" if how == "folder" and ranks.rank == 2 else folder
        with broken(how if ranks.rank == 2 else "", folder):
            faults = judge(preflight.examine(ranks, torch.device("cpu"), here, payload_bytes=2**18), limits)
        results.append((faults, [path.name for path in folder.glob("**/.preflight*")]))
        # The next round's files must not count as this one's leftovers.
        dist.barrier()
    return results


def test_a_broken_rank_is_found_among_four(tmp_path):
    expected = {
        "": None,
        "compute": "n2: slow, computes in 10",
        "links": "n2: slow links",
        "version": "n2: transformers=0.0.1",
        "folder": "n2: does not see what rank 0 wrote",
        "full": "n2: cannot write to",
    }
    for results in spawn(4, examine_broken, str(tmp_path), list(expected), timeout_s=90):
        for how, (faults, leftovers) in zip(expected, results, strict=True):
            assert leftovers == [], how
            assert (faults == []) if not how else any(fault.startswith(expected[how]) for fault in faults), (
                how,
                faults,
            )
