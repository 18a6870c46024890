"""Check the nodes of a job before it starts; one line and exit code 2 where one is unfit.

    srun --ntasks-per-node=1 python launch/preflight.py --nodes 8 --gpus 8 --folder runs/NAME

One rank per node is enough, under any launcher: srun, mpirun, torchrun, deepspeed.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from armt_dist.config import ConfigError, run_main
from armt_dist.distributed import rendezvous as parallel
from armt_dist.distributed.launchers import claimed_rank, discover
from armt_dist.distributed.preflight import GIB, MIB, Thresholds, examine, exceptional, judge, network, report

# By device: payload of the collectives in bytes, and from which multiple of the median a node counts as slow. GPUs of
# one kind agree within a few percent; CPUs are shared, only a broken one is told apart.
DEFAULTS = {"cuda": (64 * MIB, 1.3), "cpu": (MIB, 50.0)}
SHOWN_FAULTS = 4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--nodes", type=int, help="nodes that must take part (default: not checked)")
    add("--gpus", type=int, default=0, help="GPUs that every node must show (default %(default)s)")
    add("--folder", type=Path, default=Path("."), help="the run's folder, shared by all nodes (default %(default)s)")
    add("--need-gib", type=float, default=1.0, help="free space that the folder must have (default %(default)s)")
    add("--clock-s", type=float, default=5.0, help="largest difference of the clocks (default %(default)s)")
    add("--slow", type=float, help=f"slow from this multiple of the median (default by device: {DEFAULTS})")
    add("--network", type=Path, help="write latencies and bandwidths to this file, for launch/plan.py --network")
    add("--timeout-s", type=float, default=120.0, help="longest wait for the other nodes (default %(default)s)")
    add("--unfit", type=Path, help="file to which the names of unfit nodes are written, if most nodes are fit")
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    begin = time.monotonic()
    ranks = discover()
    nodes = ranks.world_size // ranks.local_world_size
    if args.nodes and nodes != args.nodes:
        raise ConfigError(f"nodes={args.nodes}: {nodes} take part (launcher {ranks.launcher}); start one rank on each")
    device = parallel.start(ranks, args.timeout_s)
    payload_bytes, slow = DEFAULTS[device.type]
    facts = examine(ranks, device, args.folder, payload_bytes)
    parallel.stop()
    if ranks.rank == 0:
        print(report(facts, payload_bytes), flush=True)
        if args.network and ranks.world_size > 1:
            args.network.write_text(json.dumps(network(facts, payload_bytes), indent=1) + "\n")
    faults = judge(facts, Thresholds(args.gpus, args.need_gib * GIB, args.clock_s, args.slow or slow))
    if faults:
        if args.unfit and ranks.rank == 0 and (names := exceptional(faults, nodes)):
            args.unfit.write_text(",".join(names) + "\n")
        more = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        raise ConfigError("; ".join(faults[:SHOWN_FAULTS]) + more)
    if ranks.rank == 0:
        print(f"preflight: {nodes} nodes fit, {time.monotonic() - begin:.1f} s", flush=True)


if __name__ == "__main__":
    args = arguments()
    run_main(lambda: main(args), claimed_rank())
