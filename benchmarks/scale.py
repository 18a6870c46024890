"""How everything grows that a large run needs: all pieces, each within its time.

    python benchmarks/scale.py [--folder .] [--out FILE] [PIECE ...]

Pieces: growth (schedules, checks, shards, metrics, reports, hashes), base (a pretrained model on 4 ranks), resume (on
another number of ranks, to 3 billion parameters; 40 GB of disk), text (files on 4 ranks, and streams), evaluation (to a
million tokens). A piece that fails or runs out of time is reported, and the next one goes on. Prints Markdown, and
writes it to --out as well; exit code 1 if a piece is missing.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
LIMIT_S = 600
PIECES = {
    "growth": [["scale_growth.py"]],
    "base": [["scale_base.py", "--folder", "{folder}"]],
    "resume": [["scale_resume.py", "--folder", "{folder}", "--billions", size] for size in ("0.1", "0.3", "1", "3")],
    "text": [["scale_text.py", "--no-streams"], ["scale_text.py", "--mb", "--bpe-mb"]],
    "evaluation": [["million.py"]],
}


def run(command: list[str]) -> tuple[str, bool]:
    """Run a script within its time; what it printed, and whether it came to its end."""
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, HERE / command[0], *command[1:]], capture_output=True, text=True, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return f"did not end within {LIMIT_S} s", False
    if done.returncode:
        return f"failed with exit code {done.returncode}:\n\n```\n{done.stderr[-2000:]}\n```", False
    return f"{done.stdout.strip()}\n\n{time.monotonic() - began:.0f} s", True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="*", metavar="PIECE", choices=[[], *PIECES], help="all, if none is named")
    parser.add_argument("--folder", default=".", help="on the disk to be measured")
    parser.add_argument("--out", type=Path, help="file for what is printed")
    args = parser.parse_args()
    said, complete = [], True
    for piece in args.pieces or PIECES:
        for command in PIECES[piece]:
            text, ended = run([word.format(folder=args.folder) for word in command])
            said.append(f"## {piece}\n\n{text}")
            complete = complete and ended
            print(said[-1], end="\n\n", flush=True)
            if args.out:
                args.out.write_text("\n\n".join(said) + "\n")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
