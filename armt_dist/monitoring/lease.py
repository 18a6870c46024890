"""One process at a time trains into a run folder: the one that holds the folder's lease.

Leases are the files lease/1.json, lease/2.json, ...; the newest counts. A process takes the folder by creating the next
number, which a file system, NFS and Lustre included, grants to one process only (O_CREAT | O_EXCL). It then rewrites
its file every few seconds; the file's size is fixed, so that a full disk does not matter. Another process takes over
once the lease was released, its owner has ended (`lease_owner`), or the file has not changed for STALE_S on the clock
of the one that waits: clocks of hosts are not compared.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from .. import files
from ..config import ConfigError
from ..records import RUN_CONFIG
from .lease_owner import Owner

BEAT_S = 10.0
STALE_S = 60.0
# Between two looks at the lease of another process, each of which may ask squeue.
POLL_S = 5.0
# Of a lease file, in bytes.
SIZE = 1024


class Held(NamedTuple):
    """The content of a lease file."""

    owner: Owner
    held_s: float = 0.0  # since it was taken
    beats: int = 0  # times that it was rewritten
    released: bool = False

    def encode(self) -> bytes:
        """Return the file's SIZE bytes."""
        return (json.dumps(self._asdict() | {"owner": self.owner._asdict()}) + "\n").encode().ljust(SIZE)

    @classmethod
    def decode(cls, content: bytes) -> "Held":
        """Read a file; one that is still empty, or damaged, has an unknown owner."""
        try:
            found = files.parse_json(content.decode())
            return cls(**(found | {"owner": Owner(**found["owner"])}))
        except (ValueError, TypeError, KeyError):
            return cls(Owner())


class Lease:
    """The lease of the run folder `out`. `take` may wait; `check` and `lost` tell whether it is still ours."""

    def __init__(self, out: Path, beat_s: float = BEAT_S, stale_s: float = STALE_S):
        self.out, self.beat_s, self.stale_s = out, beat_s, stale_s
        self.folder = out / "lease"
        self.number = 0  # of our file; 0: none
        self.lost = False
        self.held = Held(Owner.here())
        self.since = 0.0
        # Held while the file is written or compared, so that nobody here reads half of it.
        self.busy = threading.Lock()
        self.closed = threading.Event()
        self.thread: threading.Thread | None = None

    def take(self, say: Callable[[str], None] = lambda line: None) -> None:
        """Take the lease, or raise ConfigError if a live process holds it. Waits `stale_s` for one that is silent.

        say: prints a line for people.
        """
        try:
            newest = self.newest()
            while newest and not self.may_take(newest, say) or not self.create(newest + 1):
                newest = self.newest()
            for number in range(newest, 0, -1):
                self.file(number).unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"out={self.out}: {error.strerror}; give --out a folder that can be written") from None
        self.thread = threading.Thread(target=self.beat, name="lease", daemon=True)
        self.thread.start()

    def may_take(self, number: int, say: Callable[[str], None]) -> bool:
        """Watch lease `number` until it may be taken over (True), or is no longer the newest (False).

        Raises ConfigError if its owner is alive.
        """
        first, began, told = self.read(number), time.monotonic(), False
        while True:
            held = Held.decode(first)
            if held.released:
                return True
            ended = held.owner.ended(self.held.owner)
            if ended or time.monotonic() - began > self.stale_s:
                say(f"takes over {self.out} from {held.owner}, which {'has ended' if ended else 'is silent'}")
                return True
            if not told and time.monotonic() - began > self.beat_s:
                say(f"waits up to {self.stale_s:g} s for a sign of {held.owner}, which trained into {self.out}")
                told = True
            time.sleep(min(POLL_S, self.beat_s / 2))
            if self.newest() != number:
                return False
            content = self.read(number)
            held = Held.decode(content)
            if ended is False or (content != first and not held.released):
                remedy = f"stop it (scancel {held.owner.job})" if held.owner.job else "stop it"
                raise ConfigError(
                    f"out={self.out}: {held.owner} has been training into this folder for {held.held_s:.0f} s; wait "
                    f"for its end, {remedy}, or give another --out or job name"
                )
            first = content

    def create(self, number: int) -> bool:
        """Create lease `number` as ours; False if another process was faster."""
        self.since = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(self.file(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(file, "wb") as content:
            content.write(self.held.encode())
            content.flush()
            os.fsync(content.fileno())
        self.number = number
        return True

    def beat(self) -> None:
        """Rewrite the file until the lease is released or lost: the body of the thread."""
        while not self.closed.wait(self.beat_s) and not self.lost:
            # A file system that fails for a while is no reason to end the run.
            with suppress(OSError), self.busy:
                self.lost = not self.ours()
                if not self.lost:
                    self.write(released=False)

    def write(self, released: bool) -> None:
        """Write what this process says of itself over the file's content. Raises OSError."""
        self.held = self.held._replace(
            held_s=round(time.monotonic() - self.since, 1), beats=self.held.beats + 1, released=released
        )
        # Not created again if the next owner has removed it. Closed each time: NFS shows it to others only then.
        with os.fdopen(os.open(self.file(self.number), os.O_WRONLY), "wb") as content:
            content.write(self.held.encode())
            content.flush()
            os.fsync(content.fileno())

    def ours(self) -> bool:
        """Return whether the newest lease is this process's; somebody may have made the folder anew. Raises OSError."""
        newest = self.newest()
        return newest == self.number and Held.decode(self.read(newest)).owner.token == self.held.owner.token

    def check(self) -> None:
        """Raise ConfigError if another process has taken the folder over, as after a suspension of this one.

        Nothing is said by a folder that cannot be read for a moment.
        """
        if not self.number:
            return
        with suppress(OSError), self.busy:
            self.lost = self.lost or not self.ours()
            if self.lost:
                raise ConfigError(f"out={self.out}: {self.why_lost()}; this run ends without saving")

    def why_lost(self) -> str:
        """Say who has the folder now. Raises OSError."""
        newest = self.newest()
        if not newest:
            return "its lease was removed"
        owner = Held.decode(self.read(newest)).owner
        return f"{owner} has taken this folder over, because this process gave no sign for {self.stale_s:g} s"

    def release(self) -> None:
        """Give the lease back, and remove a folder in which no run began."""
        self.closed.set()
        if self.thread is None:
            return
        # It may wait for a file system that has stopped answering.
        self.thread.join(self.beat_s)
        with suppress(OSError):
            if self.lost or not self.ours():
                return
            if (self.out / RUN_CONFIG).exists():
                self.write(released=True)
                return
            self.file(self.number).unlink()
            self.folder.rmdir()
            self.out.rmdir()

    def newest(self) -> int:
        """Return the highest number of a lease; 0 if there is none."""
        try:
            found = os.listdir(self.folder)
        except FileNotFoundError:
            return 0
        names = (name.removesuffix(".json") for name in found if name.endswith(".json"))
        return max((int(name) for name in names if name.isdecimal() and name.isascii()), default=0)

    def read(self, number: int) -> bytes:
        """Return the content of a lease's file; empty if it is gone."""
        try:
            return files.read_bytes(self.file(number))
        except FileNotFoundError:
            return b""

    def file(self, number: int) -> Path:
        """Return the file of a lease."""
        return self.folder / f"{number}.json"


@contextmanager
def hold(out: Path) -> Iterator[Lease]:
    """Give a lease of `out` that is to be taken, and release it at the end."""
    lease = Lease(out)
    try:
        yield lease
    finally:
        lease.release()
