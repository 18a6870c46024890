"""The command `python -m armt_dist.report runs/NAME`; see `evaluation.run_report`."""

from .config import run_main
from .evaluation.run_report import main

if __name__ == "__main__":
    run_main(main, rank=0)
