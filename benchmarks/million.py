"""One evaluation over a million tokens, streamed: tokens/s, and whether resident memory stays flat.

    python benchmarks/million.py --model HF_FOLDER --text FOLDER [--tokens 1048576]

The texts are joined and read as one sample, segment by segment. Memory is sampled from a thread; growth is the largest
resident size after the first twentieth over that at its end. Prints one JSON line last.
"""

import argparse
import json
import threading
import time
from pathlib import Path

import psutil
from ranks import RESULTS, heading

from armt_dist.config import validate
from armt_dist.data.sections import DataConfig
from armt_dist.data.tasks import make_task
from armt_dist.evaluation.charts import Curve, Panel, draw
from armt_dist.evaluation.evaluate import evaluate
from armt_dist.evaluation.exported import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="exported folder of a byte-level model")
    parser.add_argument("--text", type=Path, required=True, help="folder of text files")
    parser.add_argument("--tokens", type=int, default=2**20)
    parser.add_argument("--device", help="for example cuda")
    args = parser.parse_args()
    model = load_model(args.model, args.device)
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
    text["tokenizer"] = str(args.model)
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
    curve = Curve("resident", [at - started for at, _ in read], [mb for _, mb in read])
    draw([Panel("s", "MB", [curve], log_x=False, limits=(0, 1.5 * warm))], RESULTS / "million.png", "memory")
    lines = [f"- {name}: {value}" for name, value in result.items() if name != "benchmark"]
    (RESULTS / "million.md").write_text(
        f"# A million tokens\n\n{heading('million.py')}\n\n"
        + "\n".join(lines)
        + "\n\n![resident memory](million.png)\n"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
