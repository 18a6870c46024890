"""Files as a stranger may make them, and what reading them costs."""

import hashlib
import json
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Read YAML files, and print what becomes of each.
LIMITED = """
import sys
from armt_dist.config import ConfigError, read_yaml
for path in sys.argv[1:]:
    try:
        read_yaml(path)
    except ConfigError:
        print("refused")
"""


def anonymous_mb() -> float:
    """Memory of this process beside mapped files."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


@contextmanager
def anonymous_growth_mb() -> Iterator[Callable[[], float]]:
    """Give a function that returns, after the block, by how many MB this process had grown at most."""
    before, done = anonymous_mb(), threading.Event()
    peak = before

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_mb())
            time.sleep(0.002)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: peak - before
    finally:
        done.set()
        thread.join()


def repacked(path: Path, edit: Callable[[str, bytes], bytes] = lambda name, content: content, compress: bool = False):
    """Write a file of torch's anew, with other records."""
    with zipfile.ZipFile(path) as archive:
        records = {name: edit(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def make_hashes_fit(folder: Path, **facts) -> None:
    """Write a checkpoint's manifest anew, as whoever plants a file does too; facts: other fields of it."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) if path.exists() else {"tag": folder.name, "world_size": 1, "state": {}}
    files = (file for file in folder.rglob("*") if file.is_file() and file != path)
    manifest["files"] = {
        file.relative_to(folder).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in files
    }
    path.write_text(json.dumps(manifest | facts))
