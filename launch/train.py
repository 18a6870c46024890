"""Train an ARMT with DeepSpeed ZeRO-3.

    deepspeed launch/train.py --ds_config ds_configs/zero3.json
    deepspeed --num_gpus 2 launch/train.py --ds_config ds_configs/zero3_fp32.json --config launch/configs/default.yaml
    torchrun --nproc-per-node 8 launch/train.py --ds_config ds_configs/zero3.json parallel.sp=8 parallel.chunks=2
    python launch/train.py train.max_steps=20 ds_config.train_batch_size=32       # one process, on a laptop

key=value sets any field of the YAML config; the ds_config owns batch, precision, optimizer, ZeRO and offload, and
ds_config.key=value sets a field of that.
Run again with the same --out to go on from the newest checkpoint. Exit codes: 0 done, 1 stuck, alone or
without finite numbers, 2 a mistake in the configuration, 75 stopped by SIGUSR1 or SIGTERM after saving.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from armt_dist.config import load_config, run_main
from armt_dist.distributed import rendezvous as parallel
from armt_dist.distributed.launchers import claimed_rank, discover
from armt_dist.distributed.process import make_deterministic
from armt_dist.versions import check_versions

DS_CONFIG = "ds_config."


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ds_config", type=Path, default=ROOT / "ds_configs/zero3.json", help="DeepSpeed JSON")
    parser.add_argument(
        "--config",
        type=Path,
        default=ROOT / "launch/configs/default.yaml",
        help="YAML config; left out: a small ARMT learns associative retrieval",
    )
    parser.add_argument("--out", type=Path, help="run folder; left out: runs/NAME OF THE CONFIG")
    parser.add_argument("--resume", default="auto", help="auto (default): the newest checkpoint, if any; never; a tag")
    parser.add_argument("--strict-versions", action="store_true", help="end if a package is outside its range")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the YAML config")
    return parser.parse_intermixed_args(arguments)


def main() -> int:
    args = parse(sys.argv[1:])
    ranks = discover()
    check_versions(args.strict_versions, speaks=ranks.rank == 0)
    from armt_dist.training.run_config import RunConfig
    from armt_dist.zero3.ds_config import read_ds_config

    of_ds_config = [text for text in args.overrides if text.startswith(DS_CONFIG)]
    config = load_config(RunConfig, args.config, [text for text in args.overrides if text not in of_ds_config])
    ds_config = read_ds_config(args.ds_config, [text.removeprefix(DS_CONFIG) for text in of_ds_config])
    if config.deterministic:
        make_deterministic()
    device = parallel.start(ranks, config.parallel.timeout_s)
    # DeepSpeed picks its accelerator when it is first imported, so nothing that imports it comes before `start`.
    from armt_dist.training.trainer import Trainer

    try:
        out = args.out or Path("runs") / args.config.stem
        return Trainer(config, ds_config, out, ranks, device).run(args.resume)
    finally:
        parallel.stop()


if __name__ == "__main__":
    run_main(main, claimed_rank())
