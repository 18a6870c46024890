"""Answer a question with an exported model; needs only transformers.

python launch/ask.py --model runs/quickstart/hf "a:3|7:c|a:5|a?"
"""

import argparse
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from armt_dist.checkpoint.exported_code import REFRESH, is_stale


def main() -> int:
    """Print the answer. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="exported folder; its code is run (trust_remote_code)")
    parser.add_argument("--tokens", type=int, default=2, help="tokens to generate")
    parser.add_argument("question")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True).eval()
    refresh = REFRESH.format(folder=args.model)
    if not hasattr(model, "check"):
        print(f"error: model={args.model}: its code is too old to check that it fits this transformers, and may "
              f"answer nonsense; run {refresh}", file=sys.stderr)  # fmt: skip
        return 2
    if is_stale(Path(args.model)):
        print(f"note: the code in {args.model} is not this version's; update it with {refresh}",
              file=sys.stderr)  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    inputs = tokenizer(args.question, return_tensors="pt", add_special_tokens=False)
    answer = model.generate(inputs["input_ids"], max_new_tokens=args.tokens, do_sample=False)
    print(f"{args.question} -> {tokenizer.decode(answer[0, inputs['input_ids'].shape[1] :])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
