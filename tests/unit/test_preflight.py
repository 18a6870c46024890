"""Preflight judges nodes by made-up facts."""

import pytest

from armt_dist.distributed.preflight import GIB, MIB, Facts, Thresholds, judge, link_turn, network, report

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
    answer_s=1e-4,
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
        (dict(folder_free_bytes=GIB / 2), "0.5 GiB free in the run's folder, 1.0 GiB needed"),
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


def test_what_the_planner_takes_from_a_preflight_is_that_of_the_slowest_link():
    facts = cluster(n2=dict(send_s=0.1 + 2e-3, answer_s=2e-3), n4=dict(reduce_s=0.5))
    assert network(facts, payload_bytes=10**6) == pytest.approx(
        {
            "handoff_latency_s": 1e-3,
            "handoff_bytes_per_s": 1e7,
            "collective_latency_s": 1e-3,
            # An all-reduce moves 8/5 of its bytes over each link of five.
            "gather_bytes_per_s": 1.6e6 / 0.5,
        }
    )
