"""Start a benchmark once for every rank of this machine, by torch's launcher."""

import json
import os
import subprocess
import sys
from pathlib import Path

from armt_dist.distributed import launchers
from armt_dist.distributed.launchers import Ranks

# Operations that NCCL's flight record keeps, per rank.
RECORDED = 20_000


def this_rank() -> Ranks | None:
    """This process's rank; None in a process that no launcher started."""
    ranks = launchers.discover()
    return None if ranks.launcher == "single" else ranks


def run_ranks(ranks: int, script: str, *arguments: str) -> dict:
    """Run a script of this folder as so many ranks; return the last line of JSON that it printed. Exits if it fails."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launcher, str(Path(__file__).with_name(script)), *arguments]
    environment = {**os.environ, "TORCH_FR_BUFFER_SIZE": str(RECORDED)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    print("\n".join(line for line in done.stdout.splitlines() if not line.startswith("{")), flush=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
