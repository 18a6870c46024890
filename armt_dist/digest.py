"""The command `python -m armt_dist.digest RUN_A RUN_B`; see `monitoring.state_digests`."""

from .config import run_main
from .monitoring.state_digests import main

if __name__ == "__main__":
    run_main(main, rank=0)
