"""The command `python -m armt_dist.stuck runs/NAME`; see `monitoring.stuck_ranks`."""

from .config import run_main
from .monitoring.stuck_ranks import main

if __name__ == "__main__":
    run_main(main, rank=0)
