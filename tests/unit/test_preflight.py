"""Preflight: judgements on made-up facts, then real measurements with one rank made unfit on purpose."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.ranks import spawn

from armt_dist.distributed import preflight
from armt_dist.distributed.preflight import GIB, MIB, Facts, Thresholds, judge, link_turn, report

LIMITS = Thresholds(gpus=1, folder_bytes=GIB, clock_s=5.0, slow=1.5)
FIT = Facts(
    node="",
    versions={"torch": "2.13.0", "deepspeed": "0.19.8"},
    gpus=("H100",),
    free_host_bytes=900 * GIB,
    free_gpu_bytes=78 * GIB,
    clock_s=1000.0,
    folder_fault=None,
    folder_free_bytes=99 * GIB,
    compute_s=1e-3,
    reduce_s=1e-3,
    send_s=1e-3,
)


def cluster(**changes: dict) -> list[Facts]:
    """Five fit nodes n1..n5, with the fields in `changes` replaced: cluster(n3=dict(compute_s=1))."""
    return [FIT._replace(node=f"n{i}", **changes.get(f"n{i}", {})) for i in range(1, 6)]


def test_fit_nodes_have_no_faults():
    assert judge(cluster(), LIMITS) == []
    # spread within the limits
    assert judge(cluster(n2=dict(compute_s=1.4e-3, clock_s=1004.0), n3=dict(send_s=1.4e-3)), LIMITS) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(versions={"torch": "2.12.0", "deepspeed": "0.19.8"}), "torch=2.12.0, the other nodes have 2.13.0"),
        (dict(versions={"torch": "2.13.0"}), "deepspeed=none"),
        (dict(gpus=()), "shows 0 GPUs of 1"),
        (dict(gpus=("A100",)), "GPUs=A100, the other nodes have H100"),
        (dict(folder_fault="cannot write to runs (No space left on device)"), "No space left on device"),
        (dict(folder_free_bytes=GIB / 2), "0.5 GiB free in the run's folder, 1.0 wanted"),
        (dict(clock_s=1060.0), "clock is off by +60.0 s"),
        (dict(free_host_bytes=100 * GIB), "100.0 GiB of host memory free"),
        (dict(free_gpu_bytes=60 * GIB), "a GPU has 60.0 GiB free"),
        (dict(compute_s=2e-3), "slow, computes in 2.00 ms"),
    ],
)
def test_an_unfit_node_is_named_with_its_fault(change, words):
    faults = judge(cluster(n3=change), LIMITS)
    assert any(fault.startswith("n3: ") and words in fault for fault in faults), faults
    assert all(fault.startswith("n3: ") for fault in faults), faults


@pytest.mark.parametrize(
    ("slow_links", "named"),
    [
        # a node with a bad adapter slows the links to it and from it
        (("n2", "n3"), ["n3: slow links"]),
        (("n5", "n1"), ["n1: slow links"]),
        # one bad cable: both ends
        (("n4",), ["n4: slow link to n5"]),
        (("n5",), ["n5: slow link to n1"]),
    ],
)
def test_slow_links_are_laid_on_the_node_they_share(slow_links, named):
    faults = judge(cluster(**{node: dict(send_s=5e-3) for node in slow_links}), LIMITS)
    assert len(faults) == len(named)
    assert all(fault.startswith(name) for fault, name in zip(faults, named, strict=True)), faults


@pytest.mark.parametrize("world", [2, 3, 4, 5, 8, 9])
def test_in_a_turn_no_rank_serves_two_links(world):
    for turn in range(3):
        ends = [end for link in range(world) if link_turn(link, world) == turn for end in (link, (link + 1) % world)]
        assert len(ends) == len(set(ends))
    assert {link_turn(link, world) for link in range(world)} <= {0, 1, 2}


def test_report_has_a_line_per_node_and_the_bandwidth():
    lines = report(cluster(), payload_bytes=10 * MIB).splitlines()
    assert [line.split()[0] for line in lines[1:6]] == ["n1", "n2", "n3", "n4", "n5"]
    # 2 * 4 / 5 * 10 MiB / 1 ms
    assert "bus 16.78 GB/s" in lines[-1]


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


def preflight_command(*arguments: str, **environ: str) -> subprocess.CompletedProcess:
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, str(root / "launch/preflight.py"), *arguments],
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"} | environ,
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_command_passes_on_one_fit_node(tmp_path):
    result = preflight_command("--nodes=1", f"--folder={tmp_path}", "--need-gib=0")
    assert result.returncode == 0, result.stderr
    assert "preflight: 1 nodes fit" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes=2"], "nodes=2: 1 take part"),
        (["--gpus=64"], "GPUs of 64"),
        (["--need-gib=1e9"], "GiB free in the run's folder, 1000000000.0 wanted"),
    ],
)
def test_command_ends_with_one_line_and_code_2(tmp_path, arguments, words):
    result = preflight_command(f"--folder={tmp_path}", *arguments)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], result.stderr
