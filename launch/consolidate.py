"""Export a checkpoint of a run as a Hugging Face folder: offline, in one process, without a GPU.

Weights are streamed from the ranks' files into safetensors, so a model of any size needs little host memory.
Plain transformers loads the folder (trust_remote_code=True), without armt_dist.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from armt_dist.config import ConfigError, one_line, run_main
from armt_dist.versions import check_versions

EXAMPLES = """examples:
  python launch/consolidate.py runs/default --out runs/default/export
  python launch/consolidate.py runs/default --tag latest --dtype bfloat16 --out model
  python launch/consolidate.py runs/default/checkpoints/step_00000700 --out model --max-shard-size 1GB
  python launch/consolidate.py runs/lora --adapter --out adapter   # adapters and memory, without the base
  python launch/consolidate.py --refresh model     # update the modelling code of an exported folder
"""
NEXT = """wrote {out} ({size:.4g} MB) from {checkpoint}; next:
  python launch/evaluate.py --model {out}
  python -c 'from transformers import AutoModelForCausalLM; \
print(AutoModelForCausalLM.from_pretrained("{out}", trust_remote_code=True))'"""

NEXT_ADAPTER = """wrote {out} from {checkpoint}; the whole model, with its base:
  python -c 'from armt_dist.checkpoint.adapter_export import load_adapted; \
from transformers import AutoModelForCausalLM; from pathlib import Path; \
print(load_adapted(Path("{out}"), AutoModelForCausalLM.from_pretrained("BASE")))'"""


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, nargs="?", help="run folder of launch/train.py, or one checkpoint in it")
    add("--out", type=Path, help="folder to write; must be new or empty")
    add("--tag", help="checkpoint: latest, best or a folder's name (default: best if there is one, else latest)")
    add("--dtype", default="float32", help="type of the weights: float32 (default) or bfloat16")
    add("--max-shard-size", default="5GB", help="largest size of a file (default %(default)s)")
    add(
        "--adapter",
        action="store_true",
        help="write only what a run with model.lora has trained: peft's adapter folder, with the memory in it",
    )
    add("--refresh", type=Path, metavar="FOLDER", help="only replace the code in an exported folder by this version's")
    add(
        "--no-self-check",
        action="store_true",
        help="skip comparing cached with uncached logits of a small model",
    )
    add("--strict-versions", action="store_true", help="fail if a package is outside its tested range")
    args = parser.parse_args()
    if args.refresh is None and (args.run is None or args.out is None):
        parser.error("give a run and --out, or --refresh FOLDER")
    if args.refresh is not None and (args.run is not None or args.out is not None):
        parser.error("--refresh takes no run and no --out")
    return args


def refresh(folder: Path) -> None:
    """Update the code of an exported folder. Raises ConfigError."""
    from armt_dist.checkpoint import exported_code

    try:
        changed = exported_code.refresh(folder)
    except ValueError as error:
        raise ConfigError(one_line(error, 400)) from None
    except OSError as error:
        raise ConfigError(f"refresh={folder}: cannot be written ({one_line(error)})") from None
    print(f"{folder}: replaced {', '.join(changed)}" if changed else f"{folder}: its code is this version's already")


def export_alone(args: argparse.Namespace) -> None:
    """Export adapters and memory without the base. Raises ConfigError."""
    from armt_dist.checkpoint.adapter_export import export_adapter

    found = export_adapter(args.run, args.out, args.tag, args.dtype)
    print(f"published: {', '.join(sorted(path.name for path in args.out.iterdir()))}")
    print(NEXT_ADAPTER.format(out=args.out, checkpoint=found.checkpoint))


def check_code(folder: Path) -> None:
    """Run the self-check on a small model of the kind in `folder`. Raises ConfigError if it fails."""
    from armt_dist.evaluation.exported import self_check, small_twin
    from armt_dist.model.configuration_armt import ARMTConfig

    self_check(small_twin(ARMTConfig.from_pretrained(folder)))


def main() -> None:
    """Export, or update the code of an export, and check it."""
    args = arguments()
    check_versions(args.strict_versions)
    # Slow to import; --help should not wait for it.
    from transformers.utils import logging

    from armt_dist.checkpoint.export import export

    logging.set_verbosity_error()
    if args.refresh is not None:
        refresh(args.refresh)
        if not args.no_self_check:
            check_code(args.refresh)
        return
    if args.adapter:
        export_alone(args)
        return
    found = export(args.run, args.out, args.tag, args.dtype, args.max_shard_size)
    if not args.no_self_check:
        check_code(args.out)
    if found.left_out:
        print(f"left out of {found.run}/model: {', '.join(found.left_out)}")
    print(f"published: {', '.join(sorted(path.name for path in args.out.iterdir()))}")
    size = sum(path.stat().st_size for path in args.out.glob("*.safetensors")) / 1e6
    print(NEXT.format(out=args.out, size=size, checkpoint=found.checkpoint))


if __name__ == "__main__":
    run_main(main, rank=0)
