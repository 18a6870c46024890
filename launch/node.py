"""One node's share of a Slurm job: torchrun for the node's ranks, with signals and exit codes as Slurm needs them.

    srun --ntasks-per-node=1 python launch/node.py --nnodes=8 --nproc-per-node=8 --master-addr=A --master-port=P \
        --log-dir=LOGS launch/train.py ...

The options are torchrun's. Every rank's output goes to LOGS/NODE/*/attempt_0/LOCAL_RANK/, and that of each node's
first rank to the job's own log too.
"""

import contextlib
import logging
import os
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run

# What launch/train.py exits with when it has checkpointed on SIGUSR1 and wants to be started again.
CHECKPOINTED = 75


def main() -> int:
    """Run this node's ranks; 0 if they ended well or checkpointed, else the exit code of the first that failed."""
    # Slurm signals every process of a step. This one is for the ranks, which handle it; ignoring is inherited by them
    # until they do, so that a signal during their start does not kill them.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # What torchrun's agents say when a rank ends, and when the first node leaves before the last, is said better below.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"] = "[rank ${rank}] "
    arguments = get_args_parser().parse_args()
    arguments.node_rank = int(os.environ["SLURM_NODEID"])
    logs = Path(arguments.log_dir)
    arguments.log_dir = str(logs / os.environ["SLURMD_NODENAME"])
    arguments.tee = "3"
    arguments.local_ranks_filter = "0"
    try:
        run(arguments)
    except ChildFailedError as error:
        return first_failure(error, logs, os.environ["SLURMD_NODENAME"])
    except SignalException as error:
        # srun ends this node because another has failed; torchrun has ended the ranks.
        return 128 + error.sigval
    return 0


def first_failure(error: ChildFailedError, logs: Path, node: str) -> int:
    """Write the exit code of the rank that failed first to LOGS/exit_code, unless another node has; return it.

    A signal's code becomes 128 and more, like a shell's. After a checkpoint 0 is returned, because srun would end the
    other nodes at once.
    """
    rank, failure = error.get_first_failure()
    if any(failure.exitcode == CHECKPOINTED for failure in error.failures.values()):
        code = CHECKPOINTED
    else:
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        print(f"error: rank {rank} on {node} ended with exit code {code}; see {logs / node}", file=sys.stderr)
    with contextlib.suppress(FileExistsError), (logs / "exit_code").open("x") as file:
        file.write(f"{code}\n")
    return 0 if code == CHECKPOINTED else code


if __name__ == "__main__":
    sys.exit(main())
