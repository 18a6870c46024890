"""Check that every node is fit for the job, by comparing facts and short measurements, before GPU hours are spent.

`examine` measures, on one rank per node or more; `judge` is pure: facts in, one sentence per fault out.
"""

import os
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist

from ..versions import installed
from .collectives import gather_json
from .launchers import Ranks

PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "pydantic")
REPEATS = 10
MIB, GIB = 2**20, 2**30


class Thresholds(NamedTuple):
    """What `judge` accepts."""

    gpus: int  # that every node must show
    folder_bytes: float  # free space that the run's folder must have
    clock_s: float  # largest difference from the median clock
    slow: float  # multiple of the median node's time from which a node counts as slow


class Facts(NamedTuple):
    """What one rank has measured on its node. Durations are the best of several, to ignore short disturbances."""

    node: str
    versions: dict[str, str]
    gpus: tuple[str, ...]
    free_host_bytes: int
    free_gpu_bytes: int
    clock_s: float
    folder_fault: str | None  # None where the shared folder works
    folder_free_bytes: int
    compute_s: float  # of the node's slowest device
    reduce_s: float  # of an all-reduce of the payload
    send_s: float  # of handing the payload to the next rank, and its answer
    answer_s: float  # of a number there and back


def examine(ranks: Ranks, device: torch.device, folder: Path, payload_bytes: int) -> list[Facts]:
    """Return the facts of all ranks in rank order, on every rank. Leaves no file in `folder`. Collective."""
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    gpus = range(torch.cuda.device_count()) if device.type == "cuda" else ()
    fault, free = try_folder(ranks, folder)
    payload = torch.zeros(payload_bytes // 4, device=device)
    dist.barrier()
    facts = Facts(
        clock_s=time.time(),
        node=node if ranks.local_world_size == 1 else f"{node}:{ranks.local_rank}",
        versions=package_versions(),
        gpus=tuple(torch.cuda.get_device_name(i) for i in gpus),
        free_host_bytes=psutil.virtual_memory().available,
        free_gpu_bytes=min((torch.cuda.mem_get_info(i)[0] for i in gpus), default=0),
        folder_fault=fault,
        folder_free_bytes=free,
        compute_s=max(compute_s(torch.device("cuda", i)) for i in gpus) if gpus else compute_s(device),
        reduce_s=best_s(lambda: dist.all_reduce(payload), device),
        send_s=send_s(ranks, payload),
        answer_s=send_s(ranks, payload[:1].clone()),
    )
    return [Facts(*found) for found in gather_json(facts)]


def package_versions() -> dict[str, str]:
    """Return the version of everything that must be the same on all ranks for equal collectives and numbers."""
    found = {name: number for name, number in installed(PACKAGES).items() if number is not None}
    found["cuda"] = str(torch.version.cuda)
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def try_folder(ranks: Ranks, folder: Path) -> tuple[str | None, int]:
    """Write, sync and rename a file, then look for those of all ranks. Collective.

    Returns the fault, or None, and the free bytes.
    """
    fault, free = None, 0
    own = folder / f".preflight.{ranks.rank}"
    part = folder / f"{own.name}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = psutil.disk_usage(str(folder)).free
        with part.open("wb") as file:
            file.write(bytes(MIB))
            file.flush()
            os.fsync(file.fileno())
        part.rename(own)
    except OSError as error:
        fault = f"cannot write to {folder} ({error.strerror}); make room, or choose a folder that this node can write"
    faults = gather_json(fault)
    unseen = invisible(folder, [rank for rank in range(ranks.world_size) if faults[rank] is None])
    if fault is None and unseen:
        fault = f"does not see what rank {unseen[0]} wrote to {folder}; choose a folder that all nodes share"
    dist.barrier()
    for leftover in (own, part):
        leftover.unlink(missing_ok=True)
    return fault, free


def invisible(folder: Path, ranks: list[int]) -> list[int]:
    """Return those of `ranks` whose file is missing; looks again for a while, because network file systems cache."""
    unseen = ranks
    for _ in range(10):
        present = set(os.listdir(folder)) if folder.is_dir() else set()
        unseen = [rank for rank in ranks if f".preflight.{rank}" not in present]
        if not unseen:
            break
        time.sleep(0.3)
    return unseen


def best_s(work: Callable[[], object], device: torch.device) -> float:
    """Return the shortest of several runs of `work`, in seconds, after one to warm up."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def compute_s(device: torch.device) -> float:
    """Time a matrix product: large enough to load a GPU, small enough not to be interrupted on a CPU."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    a = torch.ones(n, n, dtype=dtype, device=device)
    return best_s(lambda: a @ a, device)


def send_s(ranks: Ranks, payload: torch.Tensor) -> float:
    """Time the payload's way to the next rank of the ring and its answer; 0 for a single rank. Collective.

    The links take turns, so that no rank serves two at once and a slow node slows its own two links only.
    """
    rank, world = ranks.rank, ranks.world_size
    answer = payload[:1].clone()
    duration = 0.0

    def send() -> None:
        dist.send(payload, (rank + 1) % world)
        dist.recv(answer, (rank + 1) % world)

    def receive() -> None:
        dist.recv(payload, (rank - 1) % world)
        dist.send(answer, (rank - 1) % world)

    for turn in range(3 if world > 1 else 0):
        dist.barrier()
        if link_turn(rank, world) == turn:
            duration = best_s(send, payload.device)
        elif link_turn((rank - 1) % world, world) == turn:
            best_s(receive, payload.device)
    return duration


def link_turn(link: int, world: int) -> int:
    """Return the turn in which link `link` -> `link + 1` is measured: even, odd, or the one that closes an odd ring."""
    return 2 if world % 2 and link == world - 1 else link % 2


def judge(facts: list[Facts], limits: Thresholds) -> list[str]:
    """Return one sentence for each fault, beginning with the node's name; empty if all nodes are fit."""
    faults = [f"{fact.node}: {fact.folder_fault}" for fact in facts if fact.folder_fault]
    faults += [
        f"{fact.node}: shows {len(fact.gpus)} GPUs of {limits.gpus}; check its driver and the container's GPU option"
        for fact in facts
        if len(fact.gpus) < limits.gpus
    ]
    faults += [
        f"{fact.node}: {fact.folder_free_bytes / GIB:.1f} GiB free in the run's folder, "
        f"{limits.folder_bytes / GIB:.1f} GiB needed; free some space"
        for fact in facts
        if fact.folder_free_bytes < limits.folder_bytes and not fact.folder_fault
    ]
    return faults + odd_ones(facts) + weak_ones(facts, limits) + slow_ones(facts, limits.slow)


def exceptional(faults: list[str], nodes: int) -> list[str]:
    """Return the nodes that `judge` found unfit; none where they are no minority: others would be no better."""
    names = list(dict.fromkeys(fault.split(":", 1)[0] for fault in faults))
    return names if 2 * len(names) < nodes else []


def odd_ones(facts: list[Facts]) -> list[str]:
    """Name the nodes whose versions or GPUs differ from the majority's."""
    table = [{**fact.versions, "GPUs": ", ".join(fact.gpus) or "none"} for fact in facts]
    faults = []
    for name in dict.fromkeys(name for row in table for name in row):
        values = [row.get(name, "none") for row in table]
        usual = Counter(values).most_common(1)[0][0]
        faults += [
            f"{fact.node}: {name}={value}, the other nodes have {usual}; make them the same or exclude it"
            for fact, value in zip(facts, values, strict=True)
            if value != usual
        ]
    return faults


def weak_ones(facts: list[Facts], limits: Thresholds) -> list[str]:
    """Name the nodes with a wrong clock, or whose memory other processes hold."""
    clock_s, host, gpu = (
        statistics.median(getattr(fact, field) for fact in facts)
        for field in ("clock_s", "free_host_bytes", "free_gpu_bytes")
    )
    faults = []
    for fact in facts:
        if abs(fact.clock_s - clock_s) > limits.clock_s:
            faults.append(f"{fact.node}: clock is off by {fact.clock_s - clock_s:+.1f} s; check its time service")
        if fact.free_host_bytes < host / 2:
            faults.append(
                f"{fact.node}: {fact.free_host_bytes / GIB:.1f} GiB of host memory free, median {host / GIB:.1f}"
            )
        if fact.free_gpu_bytes < gpu * 0.9:
            faults.append(
                f"{fact.node}: a GPU has {fact.free_gpu_bytes / GIB:.1f} GiB free, median {gpu / GIB:.1f}; "
                "look for processes of an earlier job"
            )
    return faults


def slow_ones(facts: list[Facts], slow: float) -> list[str]:
    """Name the nodes that compute slowly or have two slow links; a single slow link is named by its ends.

    Times are compared with the lower median: of four links, one bad node slows two.
    """
    compute_s = slow * statistics.median_low(fact.compute_s for fact in facts)
    send_s = slow * statistics.median_low(fact.send_s for fact in facts)
    faults = [
        f"{fact.node}: slow, computes in {fact.compute_s * 1e3:.2f} ms, limit {compute_s * 1e3:.2f}; exclude it"
        for fact in facts
        if fact.compute_s > compute_s
    ]
    links = [fact.send_s > send_s for fact in facts]
    blamed = [links[i] and links[i - 1] for i in range(len(facts))]
    for i, fact in enumerate(facts):
        after = (i + 1) % len(facts)
        if blamed[i]:
            faults.append(f"{fact.node}: slow links, {fact.send_s * 1e3:.2f} ms, limit {send_s * 1e3:.2f}; exclude it")
        elif links[i] and not blamed[after]:
            faults.append(
                f"{fact.node}: slow link to {facts[after].node}, {fact.send_s * 1e3:.2f} ms, limit {send_s * 1e3:.2f}"
            )
    return faults


def network(facts: list[Facts], payload_bytes: int) -> dict[str, float]:
    """Return what the planner takes from a preflight: fields of `schedule.hardware.Hardware`, of the slowest link.

    Bytes of an all-reduce: each of n ranks sends and receives 2 (n - 1) / n of the payload.
    """
    n, latency_s = len(facts), max(fact.answer_s for fact in facts) / 2
    way_s = max(max(fact.send_s for fact in facts) - 2 * latency_s, 1e-9)
    reduce_s = max(fact.reduce_s for fact in facts)
    return {
        "handoff_latency_s": latency_s,
        "handoff_bytes_per_s": payload_bytes / way_s,
        "collective_latency_s": latency_s,
        "gather_bytes_per_s": 2 * (n - 1) / n * payload_bytes / reduce_s,
    }


def report(facts: list[Facts], payload_bytes: int) -> str:
    """Format a line per node, then the bus bandwidth of an all-reduce: 2 (n - 1) / n of the payload per second."""
    lines = [f"{'node':<12} {'GPUs':>4} {'host GiB':>9} {'GPU GiB':>8} {'compute ms':>11} {'link GB/s':>10}"]
    for fact in facts:
        link = f"{payload_bytes / fact.send_s / 1e9:.2f}" if fact.send_s else "-"
        lines.append(
            f"{fact.node:<12} {len(fact.gpus):>4} {fact.free_host_bytes / GIB:>9.1f} {fact.free_gpu_bytes / GIB:>8.1f} "
            f"{fact.compute_s * 1e3:>11.3f} {link:>10}"
        )
    n, reduce_s = len(facts), max(fact.reduce_s for fact in facts)
    lines.append(
        f"all-reduce of {payload_bytes / MIB:g} MiB over {n} ranks: {reduce_s * 1e3:.2f} ms, "
        f"bus {2 * (n - 1) / n * payload_bytes / reduce_s / 1e9:.2f} GB/s"
    )
    return "\n".join(lines)
