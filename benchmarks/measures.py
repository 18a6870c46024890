"""What the benchmarks of growth have in common: memory and disk traffic of a process, a cold cache, the fitted law."""

import math
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

MB = 10**6


def memory(field: str) -> int:
    """Return a field of this process's status, in bytes: VmRSS, VmHWM, RssAnon."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def bytes_from_disk() -> int:
    """Return what this process has read so far; pages that were in the cache do not count."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def drop_cache() -> bool:
    """Let files come from the disk from now on; return whether that was possible, which takes root rights."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


@contextmanager
def limited_memory(mb: int | None) -> Iterator[Path | None]:
    """Make a control group of at most so many MB, page cache included; yield the file that processes join it by.

    Takes root rights. None: no limit, and no file.
    """
    if mb is None:
        yield None
        return
    root = Path("/sys/fs/cgroup")
    # Of version 1 and 2.
    root, limit = (root / "memory", "memory.limit_in_bytes") if (root / "memory").is_dir() else (root, "memory.max")
    group = root / f"armt_benchmark_{os.getpid()}"
    group.mkdir()
    try:
        (group / limit).write_text(str(mb * MB))
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


def join_group(processes: Path | None) -> None:
    """Put this process, and what it starts, under the limit of `limited_memory`."""
    if processes is not None:
        processes.write_text(str(os.getpid()))


class Highest:
    """The highest anonymous memory of this process within a block, in bytes, sampled by a thread."""

    def __enter__(self):
        self.before = self.most = memory("RssAnon")
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        """Look every 2 ms."""
        while not self.done.wait(0.002):
            self.most = max(self.most, memory("RssAnon"))

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()

    @property
    def added(self) -> int:
        """Return by how much it was higher than before."""
        return self.most - self.before


class FileEvents:
    """Counts the files that this process opens and the folders that it lists or changes, from now on."""

    NAMES = frozenset({"open", "os.listdir", "os.scandir", "os.rename", "os.remove", "os.mkdir", "os.truncate"})

    def __init__(self, folder: Path | None = None):
        """folder: what happens below it is counted in `inside` as well."""
        self.prefix, self.all, self.inside = folder and str(folder), 0, 0
        sys.addaudithook(self.count)

    def count(self, event: str, arguments: tuple) -> None:
        """Take note of an audit event."""
        if event in self.NAMES:
            self.all += 1
            self.inside += bool(self.prefix and str(arguments[0]).startswith(self.prefix))


def exponent(rows: Iterable[Mapping[str, float]], field: str, size: str = "size") -> float:
    """Return p of the law `field` ~ `size` ** p: the slope of the least-squares line through the logarithms.

    Values below a thousandth count as that.
    """
    points = [(math.log(row[size]), math.log(max(row[field], 1e-3))) for row in rows]
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)
