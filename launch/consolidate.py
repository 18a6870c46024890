"""Turn a checkpoint of a run into a Hugging Face folder: offline, in one process, without a GPU.

Weights are streamed from the ranks' files into safetensors, so a model of any size fits into little host memory.
The folder holds everything that plain transformers needs (trust_remote_code=True), armt_dist not among it.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from armt_dist.config import run_main  # noqa: E402

EXAMPLES = """examples:
  python launch/consolidate.py runs/default --out runs/default/export
  python launch/consolidate.py runs/default --tag latest --dtype bfloat16 --out model
  python launch/consolidate.py runs/default/checkpoints/step_00000700 --out model --max-shard-size 1GB
"""
NEXT = """wrote {out} ({size:.4g} MB) from {checkpoint}; next:
  python launch/evaluate.py --model {out}
  python -c 'from transformers import AutoModelForCausalLM; \
print(AutoModelForCausalLM.from_pretrained("{out}", trust_remote_code=True))'"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, help="run folder of launch/train.py, or one checkpoint in it")
    add("--out", type=Path, required=True, help="folder to write; must not exist or be empty")
    add("--tag", help="checkpoint: latest, best or a folder's name (default: best where there is one, else latest)")
    add("--dtype", default="float32", help="of the weights: float32 (default) or bfloat16")
    add("--max-shard-size", default="5GB", help="of one file (default %(default)s)")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    # Slow to import; --help should not wait for it.
    from transformers.utils import logging

    from armt_dist.export import export

    logging.set_verbosity_error()
    found = export(args.run, args.out, args.tag, args.dtype, args.max_shard_size)
    size = sum(path.stat().st_size for path in args.out.glob("*.safetensors")) / 1e6
    print(NEXT.format(out=args.out, size=size, checkpoint=found.checkpoint))


if __name__ == "__main__":
    run_main(main, rank=0)
