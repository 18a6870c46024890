"""One node's share of a Slurm job: torchrun for the node's ranks, with signals and exit codes as Slurm needs them.

    srun --ntasks-per-node=1 python launch/node.py --nnodes=8 --nproc-per-node=8 --master-addr=A --master-port=P \
        --log-dir=LOGS launch/train.py ...

The options are torchrun's. Every rank's output goes to LOGS/NODE/.../LOCAL_RANK/, that of rank 0 also to the job's.
"""

import os
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run

# What launch/train.py exits with when it has checkpointed on SIGUSR1 and wants to be started again.
CHECKPOINTED = 75


def main() -> int:
    """Run this node's ranks; 0 if they ended well or checkpointed, else the first failure's exit code."""
    # Slurm signals every process of a step. This one is for the ranks, which handle it; ignoring is inherited by them
    # until they do, so that a signal during their start does not kill them.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    node = int(os.environ["SLURM_NODEID"])
    arguments = get_args_parser().parse_args()
    arguments.node_rank = node
    arguments.log_dir = str(Path(arguments.log_dir) / os.environ["SLURMD_NODENAME"])
    arguments.tee = "3"
    arguments.local_ranks_filter = "0"
    try:
        run(arguments)
    except ChildFailedError as error:
        return exit_code(error, arguments.log_dir)
    return 0


def exit_code(error: ChildFailedError, log_dir: str) -> int:
    """0 where the ranks checkpointed: srun would end the other nodes at once on any other, and lose the code."""
    if any(failure.exitcode == CHECKPOINTED for failure in error.failures.values()):
        return 0
    rank, failure = error.get_first_failure()
    print(
        f"error: rank {rank} on {os.environ['SLURMD_NODENAME']} ended with exit code {failure.exitcode}; see {log_dir}",
        file=sys.stderr,
    )
    # A signal's number is negative here; to a shell it is 128 and more.
    return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode


if __name__ == "__main__":
    sys.exit(main())
