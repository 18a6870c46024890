"""How starts grow with the text, and what one row of a stream costs.

    python benchmarks/scale_text.py [--mb 10 100 400 1000] [--bpe-mb 10] [--no-streams] [--ranks 4] [--code FOLDER]

Ranks are processes that make the task as a training start does, all at once and without a model. For each size of text
and each tokenizer: seconds of the first and the second start, megabytes beside mapped files that the largest rank adds,
tokens a second that the slowest then loads. For a stream of 1,024 rows: milliseconds of a step, by the clock and of the
CPU, for a rank that has one row. --code: another checkout, to compare with. The last line is JSON.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measures import MB, Highest

HERE = Path(__file__).parent
PLAYS = HERE / "data" / "plays"
SEQUENCE, SEGMENT = 8192, 1024
# Of a stream: rows of a step, tokens of a row, bytes of a text on average.
ROWS, ROW_TOKENS, TEXT_BYTES = 1024, 128, 1000
LOAD_S, STEPS = 3.0, 200


def main() -> None:
    """Measure what was asked for, and print a table and its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, nargs="*", default=[10, 100, 400, 1000], help="megabytes of text as bytes")
    parser.add_argument("--bpe-mb", type=int, nargs="*", default=[10], help="megabytes of text in words of 8,000")
    parser.add_argument("--streams", action=argparse.BooleanOptionalAction, default=True, help="measure streams")
    parser.add_argument("--ranks", type=int, default=4, help="processes that start at once")
    parser.add_argument("--code", type=Path, default=HERE.parent, help="checkout whose code is measured")
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(args.code))
    if args.work is not None:
        print(json.dumps(rank_of_texts(args.work) if "files" in args.work else rank_of_stream(args.work)))
        # As `config.run_main` does: a Parquet stream that is still open keeps the process from ending.
        gc.collect()
        return
    from armt_dist.records import markdown_table

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        tokenizer = train_tokenizer(work / "bpe") if args.bpe_mb or args.streams else work
        for kind, sizes in (("byte", args.mb), (str(tokenizer), args.bpe_mb)):
            for mb in sizes:
                rows.append(measure_texts(args, work, mb, kind))
                print(json.dumps(rows[-1]), file=sys.stderr)
        for format in ("json", "parquet") if args.streams else ():
            docs = write_docs(work / f"docs.{format}")
            for kind in ("byte", str(tokenizer)):
                (found,) = start(args, work, 1, {"docs": str(docs), "format": format, "tokenizer": kind})
                rows.append({"text": f"stream of {format}, {name_of(kind)}", **found})
    print(markdown_table(rows))
    print(json.dumps(rows))


def name_of(tokenizer: str) -> str:
    """Name a tokenizer for the table."""
    return "bytes" if tokenizer == "byte" else "BPE of 8,000"


def measure_texts(args: argparse.Namespace, work: Path, mb: int, tokenizer: str) -> dict:
    """Start all ranks twice on files of `mb` megabytes together."""
    folder = write_texts(work / f"{mb}", mb)
    task = {"files": str(folder), "tokenizer": tokenizer}
    first, second = (start(args, work, args.ranks, task) for _ in range(2))

    def worst(ranks: list[dict], key: str) -> float:
        return round(max(rank[key] for rank in ranks), 2)

    return {
        "text": f"{mb} MB, {name_of(tokenizer)}",
        "first_start_s": worst(first, "seconds"),
        "second_start_s": worst(second, "seconds"),
        "rank_mb": worst(first, "mb"),
        "second_rank_mb": worst(second, "mb"),
        "loader_tokens_per_s": round(min(rank["tokens_per_s"] for rank in second)),
    }


def start(args: argparse.Namespace, work: Path, ranks: int, task: dict) -> list[dict]:
    """Start processes that do the same work at the same moment, and return what they measured."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_ASSETS_CACHE": str(work / "cache")}
    # Time to import everything.
    task = {**task, "begin": time.time() + 8 + 2 * ranks, "ranks": ranks}
    command = [sys.executable, __file__, "--code", str(args.code), "--work"]
    processes = [
        subprocess.Popen([*command, json.dumps({**task, "rank": rank})], stdout=subprocess.PIPE, env=environment)
        for rank in range(ranks)
    ]
    found = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes), "a rank failed"
    return [json.loads(output.splitlines()[-1]) for output in found]


def rank_of_texts(work: dict) -> dict:
    """Make the task of one rank, and load its row of batches for a while."""
    from armt_dist.config import validate
    from armt_dist.data.lengths import Difficulty
    from armt_dist.data.sections import DataConfig
    from armt_dist.data.tasks import make_task

    text = {"files": work["files"], "tokenizer": work["tokenizer"], "sequence_tokens": SEQUENCE}
    config = validate(DataConfig, {"task": "text", "text": {**text, "validation_fraction": 0}})
    wait_until(work["begin"])
    with Highest() as highest:
        began = time.monotonic()
        task = make_task(config, SEGMENT, None, work["ranks"])
        seconds = time.monotonic() - began
        step, began = 0, time.monotonic()
        while time.monotonic() - began < LOAD_S:
            task.batch("train", step, range(work["rank"], work["rank"] + 1), Difficulty.fixed(SEQUENCE // SEGMENT))
            step += 1
        loaded = step * SEQUENCE / (time.monotonic() - began)
    return {"seconds": seconds, "mb": highest.added / MB, "tokens_per_s": loaded}


def rank_of_stream(work: dict) -> dict:
    """Take one row of step after step, the first ones excepted."""
    from armt_dist.config import validate
    from armt_dist.data.lengths import Difficulty
    from armt_dist.data.sections import DataConfig
    from armt_dist.data.tasks import make_task

    text = {"tokenizer": work["tokenizer"], "sequence_tokens": ROW_TOKENS, "pack": True}
    dataset = {"name": work["format"], "data_files": work["docs"]}
    config = validate(DataConfig, {"task": "text", "text": {**text, "dataset": dataset}})
    task = make_task(config, ROW_TOKENS, None, ROWS)
    for step in range(STEPS):
        if step == STEPS // 4:
            began, used = time.perf_counter(), time.process_time()
        task.batch("train", step, range(7, 8), Difficulty.fixed(1))
    steps = (STEPS - STEPS // 4) / 1000
    wall, cpu = time.perf_counter() - began, time.process_time() - used
    return {"ms_a_step": round(wall / steps, 2), "cpu_ms_a_step": round(cpu / steps, 2)}


def wait_until(begin: float) -> None:
    """Return at a moment of the clock."""
    time.sleep(max(0.0, begin - time.time()))


def all_plays() -> str:
    """Return the texts that come with the repository."""
    return "".join(path.read_text() for path in sorted(PLAYS.glob("*.txt")))


def write_texts(folder: Path, mb: int) -> Path:
    """Write eight files of `mb` megabytes together, the plays over and over."""
    folder.mkdir(exist_ok=True)
    text = all_plays().encode("ascii", "ignore")
    for i in range(8):
        with (folder / f"{i}.txt").open("wb") as file:
            left = mb * 10**6 // 8
            while left:
                left -= file.write(text[: min(left, len(text))])
    return folder


def write_docs(path: Path) -> Path:
    """Write texts of 0.5 to 1.5 times TEXT_BYTES, enough for every step."""
    import pyarrow
    from pyarrow import parquet

    plays, at, texts = all_plays(), 0, []
    while at < STEPS * ROWS * ROW_TOKENS * 5:
        size = TEXT_BYTES // 2 + at % TEXT_BYTES
        place = at % (len(plays) - size)
        texts.append(plays[place : place + size])
        at += size
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=10_000)
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def train_tokenizer(folder: Path) -> Path:
    """Train a byte-level BPE of 8,000 tokens on the plays, and save it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(all_plays().splitlines(keepends=True), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
