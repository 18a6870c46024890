"""Facts planted in real text, and questions that only a memory can answer once the text is further back than a segment.

    python benchmarks/planted_facts.py make --texts benchmarks/data/plays --tokenizer models/smollm2 --out facts
    deepspeed launch/train.py --ds_config ds_configs/zero3.json --config RECIPE data.task=instructions \
        data.instructions.files=facts/train.jsonl data.instructions.validation_files=facts/validation.jsonl ...
    python benchmarks/planted_facts.py evaluate facts/validation.jsonl --model EXPORT --base models/smollm2

Every row is a piece of a text with ten facts such as "The password of the harbour of Tarin is 4817.", evenly spread,
and a question about one of them, in turn: documents, question and answer, as `data.task: instructions` reads them. One
text in three, by name, is for validation alone. A row depends on the seed, its split and its number.

An answer is right where each of its tokens is the most likely one after those before it, which is where greedy
generation would write it. Prints, by the position of the fact asked for, how many answers were right and what they
cost in nats, for the exported model with its memory and for the base that reads only the last tokens.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lm_memory import held_out
from ranks import table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from armt_dist.data.instructions.encoding import IDS, SCORED, RowEncoder
from armt_dist.evaluation.exported import load_model

PLACES = (
    "harbour",
    "library",
    "mill",
    "tower",
    "bakery",
    "garden",
    "chapel",
    "market",
    "bridge",
    "stable",
    "inn",
    "mint",
)
SYLLABLES = ("ba", "den", "fi", "gor", "hal", "ki", "lem", "mo", "nar", "pel", "rin", "sa", "tu", "vor", "wes", "zan")
FACT = "The password of the {place} of {town} is {value}."
QUESTION = "What is the password of the {place} of {town}? Answer with the number alone."


class Fact(NamedTuple):
    """A name and its value."""

    place: str
    town: str
    value: int

    def say(self, sentence: str) -> str:
        """A sentence with the fact's words."""
        return sentence.format(**self._asdict())


def draw_facts(rng: random.Random, count: int) -> list[Fact]:
    """Facts whose names and values all differ."""
    names: set[tuple[str, str]] = set()
    while len(names) < count:
        names.add((rng.choice(PLACES), "".join(rng.sample(SYLLABLES, 2)).capitalize()))
    values = rng.sample(range(1000, 10000), count)
    return [Fact(*name, value) for name, value in zip(sorted(names, key=lambda _: rng.random()), values, strict=True)]


def plant(text: str, ends: list[int], facts: list[Fact]) -> str:
    """Put a fact on a line of its own behind each of the text's characters `ends`."""
    parts = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
    lines = [f"\n{fact.say(FACT)}\n" for fact in facts]
    return "".join(part + line for part, line in zip(parts, [*lines, ""], strict=True))


def make_row(name: str, number: int, texts: list[tuple[str, list[int]]], tokens: int, count: int) -> dict[str, Any]:
    """Row `number` of a split; `name` seeds it. texts: each with the character at which each of its tokens begins."""
    rng = random.Random(f"{name}/{number}")
    text, starts = rng.choice([each for each in texts if len(each[1]) > tokens])
    first = rng.randrange(len(starts) - tokens)
    piece = text[starts[first] : starts[first + tokens]]
    wanted = [starts[first + int((i + 0.5) * tokens / count)] - starts[first] for i in range(count)]
    # At the end of a line, so that no sentence is broken.
    ends = [end if (end := piece.find("\n", at)) >= 0 else at for at in wanted]
    facts, asked = draw_facts(rng, count), number % count
    row = {"documents": [plant(piece, ends, facts)], "question": facts[asked].say(QUESTION)}
    return {**row, "answer": str(facts[asked].value), "position": asked}


def read_texts(paths: list[str], tokenizer: Any) -> list[tuple[str, list[int]]]:
    """Texts with the character at which each token begins."""
    texts = [Path(path).read_text() for path in paths]
    options = {"return_offsets_mapping": True, "add_special_tokens": False, "verbose": False}
    return [(text, [start for start, _ in tokenizer(text, **options)["offset_mapping"]]) for text in texts]


def make(args: argparse.Namespace) -> None:
    """Write train.jsonl and validation.jsonl."""
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    args.out.mkdir(parents=True, exist_ok=True)
    splits = zip(("train", "validation"), (args.rows, args.validation_rows), held_out(args.texts), strict=True)
    for split, rows, paths in splits:
        texts = read_texts(paths, tokenizer)
        if not any(len(starts) > args.tokens for _, starts in texts):
            raise SystemExit(f"error: tokens={args.tokens}: no text of {split} in {args.texts} is as long; lower it")
        made = (make_row(f"{args.seed}/{split}", i, texts, args.tokens, args.facts) for i in range(rows))
        path = args.out / f"{split}.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in made))
        print(f"wrote {path}: {rows} rows of about {args.tokens:,} tokens with {args.facts} facts")


class Reader(NamedTuple):
    """A model as it reads a prompt and an answer."""

    name: str
    logits: Callable[[Tensor, int], Tensor]
    """Of ids [1, n], the logits [k, V] of the last k positions."""


def memory_reader(folder: Path) -> Reader:
    """The exported model, which reads all of it, segment by segment."""
    model = load_model(folder)
    return Reader(str(folder), lambda ids, count: model(ids.to(model.device), logits_to_keep=count).logits[0])


def window_readers(folder: Path, windows: list[int]) -> Iterator[Reader]:
    """The base, which reads the last tokens at once."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    def logits(ids: Tensor, count: int, window: int) -> Tensor:
        return model(ids[:, -window:].to(model.device), logits_to_keep=count, use_cache=False).logits[0]

    for window in windows:
        yield Reader(f"base, {window:,} tokens", lambda ids, count, window=window: logits(ids, count, window))


@torch.no_grad()
def ask(reader: Reader, sample: Any) -> tuple[bool, float]:
    """Whether an encoded row's answer is the most likely one, and its negative log-likelihood in nats."""
    scored = torch.from_numpy((sample & SCORED) > 0).nonzero().squeeze(1)
    ids = torch.from_numpy((sample & IDS).astype("int64"))[: scored[-1] + 1]
    count = len(ids) - int(scored[0])
    found = reader.logits(ids[None, :-1], count).float().cpu()
    answer = ids[-count:]
    nats = torch.nn.functional.cross_entropy(found, answer, reduction="sum")
    return bool((found.argmax(-1) == answer).all()), nats.item()


def evaluate(args: argparse.Namespace) -> None:
    """Print right answers by position, and a JSON line last."""
    rows = [json.loads(line) for line in args.file.read_text().splitlines()][: args.rows]
    tokenizer = AutoTokenizer.from_pretrained(args.model or args.base)
    encoder = RowEncoder(tokenizer, leading_tokens=True)
    samples = cache(lambda i: encoder.encode(rows[i], "documents", f"row {i}"))
    readers = [memory_reader(args.model)] if args.model else []
    readers += window_readers(args.base, args.windows) if args.base else []
    positions = sorted({row["position"] for row in rows})
    found = {}
    for reader in readers:
        results = [(row["position"], *ask(reader, samples(i))) for i, row in enumerate(rows)]
        by_position = [[each for each in results if each[0] == position] for position in [*positions, None]]
        by_position[-1] = results
        found[reader.name] = [
            {
                "rows": len(each),
                "right": sum(right for _, right, _ in each),
                "nats": sum(n for *_, n in each) / len(each),
            }
            for each in by_position
        ]
        print(f"{reader.name}: {found[reader.name][-1]}", flush=True)
    lines = [
        [name, *(f"{each[i]['right']} of {each[i]['rows']}, {each[i]['nats']:.2f}" for each in found.values())]
        for i, name in enumerate([*map(str, positions), "all"])
    ]
    print(table(["position", *found], lines))
    print(json.dumps(found))


def main() -> None:
    """Make data, or evaluate on them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="make | evaluate")
    making = commands.add_parser("make", help="write train.jsonl and validation.jsonl")
    making.set_defaults(run=make)
    add = making.add_argument
    add("--texts", type=Path, required=True, help="folder of .txt files")
    add("--tokenizer", required=True, help="a Hugging Face folder or name, which counts tokens")
    add("--out", type=Path, required=True, help="folder to write")
    add("--tokens", type=int, default=2000, help="of the text of a row (default %(default)s)")
    add("--facts", type=int, default=10, help="of a row (default %(default)s)")
    add("--rows", type=int, default=2000, help="for training (default %(default)s)")
    add("--validation-rows", type=int, default=100, help="default %(default)s")
    add("--seed", type=int, default=0)
    asking = commands.add_parser("evaluate", help="print right answers by position")
    asking.set_defaults(run=evaluate)
    add = asking.add_argument
    add("file", type=Path, help="validation.jsonl")
    add("--model", type=Path, help="an exported ARMT")
    add("--base", type=Path, help="a model without memory, which reads the last tokens at once")
    add("--windows", type=int, nargs="+", default=[256, 2048], help="tokens that the base reads (default 256 2048)")
    add("--rows", type=int, help="evaluate the first rows only")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
