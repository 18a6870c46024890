"""Train an ARMT with DeepSpeed ZeRO-3.

    deepspeed launch/train.py --ds_config ds_configs/zero3.json
    deepspeed --num_gpus 2 launch/train.py --ds_config ds_configs/zero3_fp32.json --config launch/configs/default.yaml
    torchrun --nproc-per-node 8 launch/train.py --ds_config ds_configs/zero3.json parallel.sp=8 parallel.chunks=2
    python launch/train.py train.max_steps=20 ds_config.train_batch_size=32       # one process, on a laptop
    python launch/train.py --help train.save_every                                # explains a key or a section
    python launch/train.py --config launch/configs/plays_cpu.yaml --show-config   # prints, does not start
    python launch/train.py --config launch/configs/plays_cpu.yaml --check 64      # is it right for 64 ranks?

key=value sets any field of the YAML config. Batch, precision, optimizer, ZeRO and offload come from the ds_config file,
over it the recipe's ds_config section, over both ds_config.key=value; docs/config.md lists all keys.
{array}, {job} and {name} in a value or path stand for Slurm's array task, job id and job name (docs/sweeps.md).
Run again with the same --out to resume from the newest checkpoint. Exit codes: 0 done, 1 stuck, alone or
without finite numbers, 2 a mistake in the configuration, 75 stopped by SIGUSR1 or SIGTERM after saving.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from armt_dist.config import ConfigError, ended_by_error, run_main
from armt_dist.distributed.launchers import claimed_rank, discover
from armt_dist.distributed.placeholders import fill
from armt_dist.training.checks import check_run
from armt_dist.training.run_config import as_yaml, load_run
from armt_dist.versions import check_versions

DS_CONFIG = ROOT / "ds_configs/zero3.json"
CONFIG = ROOT / "launch/configs/default.yaml"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    add = parser.add_argument
    add("-h", "--help", nargs="?", const="", metavar="KEY", help="show this, or explain a key or section, and exit")
    add("--show-config", action="store_true", help="print the configuration that the run would have as YAML, and exit")
    add("--check", type=int, metavar="RANKS", help="check the configuration for so many ranks, at once, and exit")
    add("--ds_config", type=Path, help="DeepSpeed JSON; left out: ds_configs/zero3.json")
    add("--config", type=Path, default=CONFIG, help="YAML config; left out: a small ARMT learns associative retrieval")
    add("--out", type=Path, help="run folder; left out: runs/NAME OF THE CONFIG")
    add("--resume", default="auto", help="auto (default): the newest checkpoint, if any; never; a tag")
    add("--strict-versions", action="store_true", help="end if a package is outside its range")
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    add("overrides", nargs="*", metavar="key=value", help="fields of the YAML config")
    return parser


def show_help(parser: argparse.ArgumentParser, key: str) -> None:
    """Print the usage and the sections of the configuration, or one key."""
    from armt_dist.training.config_docs import help_key, help_sections

    print(help_key(key) if key else f"{parser.format_help()}\n{help_sections()}")


def main() -> int:
    """Train, or print what was asked for. Returns the exit code."""
    parser = make_parser()
    args = parser.parse_intermixed_args(sys.argv[1:])
    if args.help is not None:
        if claimed_rank() == 0:
            show_help(parser, args.help)
        return 0
    world = args.check
    if world is not None and world < 1:
        raise ConfigError(f"check={world}: expected a number of ranks")
    ranks = discover() if world is None and not args.show_config else None
    check_versions(args.strict_versions, speaks=claimed_rank() == 0)
    recipe = Path(fill(str(args.config)))
    config = load_run(recipe, args.ds_config, DS_CONFIG, [fill(override) for override in args.overrides])
    out = Path(fill(str(args.out or Path("runs") / recipe.stem)))
    if ranks or world is not None:
        check_run(config, out, ranks.world_size if ranks else world)
    if ranks is None:
        if args.show_config and claimed_rank() == 0:
            print(as_yaml(config), end="")
        return 0
    # These import torch, which takes seconds: a mistake in the configuration has been named by now.
    from armt_dist.distributed import rendezvous as parallel
    from armt_dist.distributed.process import make_deterministic

    if config.deterministic:
        make_deterministic()
    device = parallel.start(ranks, config.parallel.timeout_s)
    # DeepSpeed picks its accelerator when it is first imported, so nothing that imports it comes before `start`.
    from armt_dist.monitoring.lease import hold
    from armt_dist.training.trainer import Trainer

    with ended_by_error(), hold(out) as lease:
        return Trainer(config, config.ds_config, out, ranks, device, lease).run(args.resume)


def leave() -> bool:
    """Leave the other ranks, if this process has met them; see `rendezvous.leave`."""
    if "torch.distributed" not in sys.modules:
        return True
    from armt_dist.distributed.rendezvous import leave

    return leave()


if __name__ == "__main__":
    run_main(main, claimed_rank(), leave)
