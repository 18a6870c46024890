"""Does a stream that waits hold up others? By the number of hardware queues (CUDA_DEVICE_MAX_CONNECTIONS).

    python benchmarks/gpu_queues.py [--streams 10]

One stream sleeps for a second and has a kernel behind that, which cannot start; each of the others gets a small kernel.
Those that have not ended half a second later wait in a hardware queue behind it. A rank of a wavefront uses up to seven
streams. Prints one JSON line last.
"""

import argparse
import json
import os
import subprocess
import sys
import time

import torch

QUEUES = (None, 1, 4, 8, 16, 32)
SLEEP_CYCLES = 2_000_000_000


def held_up(streams: int) -> int:
    """Streams whose kernel has not ended while another stream sleeps."""
    others = [torch.cuda.Stream() for _ in range(streams)]
    asleep, events = others.pop(0), []
    x = torch.ones(1024, device="cuda")
    for stream in (asleep, *others):
        with torch.cuda.stream(stream):
            x + 1
    torch.cuda.synchronize()
    with torch.cuda.stream(asleep):
        torch.cuda._sleep(SLEEP_CYCLES)
        x + 1
    for stream in others:
        with torch.cuda.stream(stream):
            x + 1
            events.append(stream.record_event())
    time.sleep(0.4)
    waiting = sum(not event.query() for event in events)
    torch.cuda.synchronize()
    return waiting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=10)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        print(held_up(args.streams))
        return
    found = {}
    for queues in QUEUES:
        given = {} if queues is None else {"CUDA_DEVICE_MAX_CONNECTIONS": str(queues)}
        command = [sys.executable, __file__, "--here", "--streams", str(args.streams)]
        done = subprocess.run(command, env={**os.environ, **given}, capture_output=True, text=True, check=True)
        found[str(queues or "unset")] = int(done.stdout)
        print(
            f"{queues or 'unset':>6} queues: {done.stdout.strip()} of {args.streams - 1} streams are held up",
            flush=True,
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
