"""Answer a question with an exported model, with nothing but transformers.

python launch/ask.py --model runs/quickstart/hf "a:3|7:c|a:5|a?"
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="exported folder; its modelling code is run (trust_remote_code)")
    parser.add_argument("--tokens", type=int, default=2, help="tokens to generate")
    parser.add_argument("question")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True).eval()
    inputs = tokenizer(args.question, return_tensors="pt", add_special_tokens=False)
    answer = model.generate(inputs["input_ids"], max_new_tokens=args.tokens, do_sample=False)
    print(f"{args.question} -> {tokenizer.decode(answer[0, inputs['input_ids'].shape[1] :])}")


if __name__ == "__main__":
    main()
