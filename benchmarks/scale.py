"""How everything grows that a large run needs: all pieces, each within its time.

    python benchmarks/scale.py [--folder .] [--out FILE] [--limit 600] [PIECE ...]

Pieces: start (of 1 to 32 ranks by torchrun), step (1 to 8 ranks), checkpoint (2 to 8 ranks), consolidation (to a
billion parameters; 16 GB of disk), evaluation (a million tokens), base (a pretrained model on 4 ranks), resume (on
another number of ranks, to 3 billion parameters; 40 GB of disk), text (files on 4 ranks, and streams), growth
(schedules, checks, shards, metrics, reports, hashes). A piece that fails or runs out of time is reported, and the next
one goes on. With other work on the machine pieces take longer: each is shown with the load when it began. Prints
Markdown, and writes it to --out as well; exit code 1 if a piece is missing.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
PIECES = {
    # 32 ranks take as long as all others together.
    "start": [
        ["scale_ranks.py", "start", "--folder", "{folder}", "--ranks", *ranks]
        for ranks in (("1", "2", "4", "8", "16"), ("32",))
    ],
    "step": [["scale_ranks.py", "step", "--folder", "{folder}"]],
    "checkpoint": [["scale_ranks.py", "checkpoint", "--folder", "{folder}"]],
    "consolidation": [["scale_consolidation.py", "--folder", "{folder}", "--shards", "8"]],
    "evaluation": [["million.py"]],
    "base": [["scale_base.py", "--folder", "{folder}"]],
    "resume": [["scale_resume.py", "--folder", "{folder}", "--billions", size] for size in ("0.1", "0.3", "1", "3")],
    "text": [["scale_text.py", "--no-streams"], ["scale_text.py", "--mb", "--bpe-mb"]],
    "growth": [["scale_growth.py"]],
}


def run(command: list[str], limit_s: float) -> tuple[str, bool]:
    """Run a script within its time; what it printed, and whether it came to its end."""
    began, load = time.monotonic(), os.getloadavg()[0]
    process = subprocess.Popen(
        [sys.executable, HERE / command[0], *command[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        # With the launcher that it may have started, which ends its ranks: they would slow down the next piece.
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate()
        return f"did not end within {limit_s:g} s (load {load:.1f} when it began)", False
    if process.returncode:
        return f"failed with exit code {process.returncode}:\n\n```\n{stderr[-2000:]}\n```", False
    lines = stdout.strip().splitlines()
    # Without the line of JSON that comes last, unless there is nothing else.
    if len(lines) > 1 and lines[-1].startswith(("{", "[")):
        lines.pop()
    return "\n".join([*lines, "", f"{time.monotonic() - began:.0f} s, load {load:.1f} when it began"]), True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="*", metavar="PIECE", choices=[[], *PIECES], help="all, if none is named")
    parser.add_argument("--folder", default=".", help="on the disk to be measured")
    parser.add_argument("--out", type=Path, help="file for what is printed")
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="of a script (default %(default)g)")
    args = parser.parse_args()
    said, complete = [], True
    for piece in args.pieces or PIECES:
        for command in PIECES[piece]:
            text, ended = run([word.format(folder=args.folder) for word in command], args.limit)
            said.append(f"## {piece}\n\n{text}")
            complete = complete and ended
            print(said[-1], end="\n\n", flush=True)
            if args.out:
                args.out.write_text("\n\n".join(said) + "\n")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
