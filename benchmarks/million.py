"""One evaluation over a million tokens, streamed: tokens/s, and whether resident memory stays flat.

    python benchmarks/million.py [--model HF_FOLDER] [--text FOLDER] [--tokens 1048576]

Without a model: a random one, which costs the same, and whose figures do not take the place of the results.
The texts are joined and read as one sample, segment by segment. Memory is sampled from a thread; growth is the largest
resident size after the first twentieth over that at its end. Prints one JSON line last.
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path

import psutil
from ranks import RESULTS, heading

from armt_dist.config import validate
from armt_dist.data.sections import DataConfig
from armt_dist.data.tasks import make_task
from armt_dist.data.tokenizers import byte_tokenizer
from armt_dist.evaluation.charts import Curve, Panel, draw
from armt_dist.evaluation.evaluate import evaluate
from armt_dist.evaluation.exported import load_model
from armt_dist.model.configuration_armt import ARMTConfig
from armt_dist.model.modeling_armt import ARMTForCausalLM

PLAYS = Path(__file__).parent / "data" / "plays"


def write_random_model(folder: Path) -> Path:
    """Write an export of an untrained byte-level model, 4 layers of width 256, segments of 512 tokens."""
    tokenizer = byte_tokenizer()
    base = {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": len(tokenizer),
    }
    ARMTForCausalLM(ARMTConfig(base_config=base, segment_tokens=512, num_mem_tokens=8, d_mem=32)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="exported folder of a byte-level model (default: a random one)")
    parser.add_argument("--text", type=Path, default=PLAYS, help="folder of text files (default: the plays)")
    parser.add_argument("--tokens", type=int, default=2**20)
    parser.add_argument("--device", help="for example cuda")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or write_random_model(Path(scratch))
        result, curve = measure(args, folder)
    if args.model:
        write_results(result, curve)
    print(json.dumps(result))


def measure(args: argparse.Namespace, folder: Path) -> tuple[dict, Curve]:
    """Evaluate once; the figures, and resident memory in MB by seconds."""
    model = load_model(folder, args.device)
    segment = model.config.segment_tokens
    # A task wants something to train on.
    first, *others = sorted(map(str, args.text.iterdir()))
    text = {
        "files": first,
        "validation_files": others,
        "pack": True,
        "cross_documents": True,
        "sequence_tokens": args.tokens,
    }
    text["tokenizer"] = str(folder)
    task = make_task(validate(DataConfig, {"task": "text", "text": text}), segment, model.config.vocab_size, 1)
    process, samples, over = psutil.Process(), [], threading.Event()

    def sample() -> None:
        while not over.wait(0.2):
            samples.append((time.perf_counter(), process.memory_info().rss / 1e6))

    started = time.perf_counter()
    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    (row,) = evaluate(model, task, [args.tokens // segment], samples=1, batch=1)
    over.set()
    sampler.join()
    # Reading the text comes first; the last of the time is the reading of the sums.
    ends = time.perf_counter()
    begins = ends - args.tokens / row.tokens_per_s
    read = [(at, mb) for at, mb in samples if at >= begins]
    warm = read[len(read) // 20][1]
    growth = max(mb for _, mb in read[len(read) // 20 :]) / warm - 1
    result = {
        "benchmark": "million",
        "tokens": row.tokens,
        "segments": row.length,
        "tokens_per_s": round(row.tokens_per_s),
        "bits_per_byte": round(row.bits_per_byte, 4),
        "resident_mb": round(warm),
        "growth": round(growth, 4),
    }
    return result, Curve("resident", [at - started for at, _ in read], [mb for _, mb in read])


def write_results(result: dict, curve: Curve) -> None:
    """Write results/million.md and its chart."""
    draw(
        [Panel("s", "MB", [curve], log_x=False, limits=(0, 1.5 * result["resident_mb"]))],
        RESULTS / "million.png",
        "memory",
    )
    lines = [f"- {name}: {value}" for name, value in result.items() if name != "benchmark"]
    (RESULTS / "million.md").write_text(
        f"# A million tokens\n\n{heading('million.py')}\n\n"
        + "\n".join(lines)
        + "\n\n![resident memory](million.png)\n"
    )


if __name__ == "__main__":
    main()
