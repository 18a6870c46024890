"""What a memory can give a pretrained model: trained for a while on long texts, then controlled on held-out ones.

    python launch/get_model.py smollm2-135m --out models/smollm2
    python benchmarks/lm_memory.py --model models/smollm2 --texts plays=benchmarks/data/plays [novels=FOLDER] ...

Variants train side by side with the recipe novels_smollm2.yaml, each for so many seconds from its first step on, and
stop as a preempted job does: with a checkpoint. Of every folder of texts one in three, by name, is held out. Each
is exported, and `launch/evaluate.py --control --full-attention` compares its own memory with another text's, with none,
and with full attention, on the held-out texts of each folder. Prints a table and one JSON line last.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ranks import ROOT, table

RECIPE = ROOT / "launch/configs/novels_smollm2.yaml"
CHECKPOINTED = 75
VARIANTS = {
    "frozen": [],
    "lora": [
        "train.freeze=null",
        "model.lora={r: 16, alpha: 32, targets: [q_proj, k_proj, v_proj, o_proj]}",
        "train.optimizer_groups=[{match: ['*lora*'], lr_scale: 0.3}]",
    ],
    "all": ["train.freeze=null", "train.optimizer_groups=[{match: [base], lr_scale: 0.03}]"],
    "32 rows": ["model.num_mem_tokens=32"],
}
LIMIT_S = 900


def held_out(folder: Path) -> tuple[list[str], list[str]]:
    """Texts to train on and to evaluate on: every third of a folder, by name, is held out."""
    texts = sorted(str(path) for path in folder.glob("*.txt"))
    return [each for i, each in enumerate(texts) if i % 3 != 2], texts[2::3]


def listed(paths: list[str]) -> str:
    """A list as a value on the command line."""
    return f"[{', '.join(paths)}]"


def train(out: Path, log: Path, seconds: float, settings: list[str]) -> dict:
    """Train until so many seconds after the first step. Returns steps, tokens and the last loss."""
    command = [sys.executable, "launch/train.py", "--config", str(RECIPE), "--out", str(out), *settings]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        metrics, began = out / "metrics.jsonl", time.monotonic()
        while not (metrics.exists() and '"train"' in metrics.read_text()):
            if process.poll() is not None or time.monotonic() > began + LIMIT_S:
                process.kill()
                raise RuntimeError(f"no step was made:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGUSR1)
        code = process.wait(timeout=LIMIT_S)
    if code not in (0, CHECKPOINTED):
        raise RuntimeError(f"exit code {code}:\n{log.read_text()[-3000:]}")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    return {"steps": len(steps), "tokens": steps[-1]["tokens"], "loss": steps[-1]["loss"]}


def run(command: list[str], log: Path) -> None:
    """Run a command of the project. Raises RuntimeError with the end of what it said."""
    with log.open("w") as file:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{log.read_text()[-3000:]}")


def measure(name: str, args: argparse.Namespace, settings: list[str], split: dict[str, tuple[list, list]]) -> dict:
    """Train, export and control one variant."""
    folder = args.work / name.replace(" ", "_")
    folder.mkdir(parents=True)
    found: dict = {"variant": name, **train(folder / "run", folder / "train.log", args.seconds, settings)}
    print(f"{name}: {found}", flush=True)
    model = folder / "model"
    run(["launch/consolidate.py", str(folder / "run"), "--out", str(model)], folder / "export.log")
    for texts, ((spare, *_), files) in split.items():
        out = folder / texts
        # A task of texts has some to train on, too: any other one.
        data = [f"data.text.files={listed([spare, *files])}", f"data.text.validation_files={listed(files)}"]
        data.append(f"data.text.sequence_tokens={256 * args.segments}")
        sizes = ["--lengths", args.segments, "--samples", args.samples, "--batch", args.batch]
        options = ["--control", "--full-attention", args.full_attention, "--trust-data", "--no-self-check"]
        command = ["launch/evaluate.py", "--model", model, *sizes, *options, "--out", out, "--data", *data]
        run(list(map(str, command)), folder / f"{texts}.log")
        found[texts] = json.loads((out / "control_text.json").read_text())
        print(f"{name}, {texts}: {(folder / f'{texts}.log').read_text().splitlines()[-1]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True)
    add("--texts", nargs="+", default=["plays=benchmarks/data/plays"], metavar="NAME=FOLDER")
    add("--variants", nargs="+", choices=VARIANTS, default=["frozen", "lora"])
    add("--seconds", type=float, default=3600.0, help="of training, from the first step on")
    add("--segments", type=int, default=32, help="of an evaluated sample")
    add("--samples", type=int, default=64)
    add("--batch", type=int, default=16)
    add("--full-attention", type=int, default=8192, metavar="TOKENS")
    add("--work", type=Path, help="folder of runs, exports and logs")
    add("--set", nargs="*", default=[], metavar="key=value", help="settings of all trainings")
    args = parser.parse_args()
    args.work = args.work or Path(tempfile.mkdtemp())
    folders = {name: Path(folder) for name, folder in (each.split("=", 1) for each in args.texts)}
    split = {name: held_out(folder.resolve()) for name, folder in folders.items()}
    seen = [text for train_on, _ in split.values() for text in train_on]
    every = [text for _, texts in split.values() for text in texts]
    settings = [f"{key}={args.model.resolve()}" for key in ("model.base", "data.text.tokenizer")]
    settings += [f"data.text.files={listed(seen)}", f"data.text.validation_files={listed(every)}", *args.set]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with ThreadPoolExecutor(len(args.variants)) as pool:
        found = list(pool.map(lambda name: measure(name, args, [*settings, *VARIANTS[name]], split), args.variants))
    kinds = ("full", "own", "other", "none")
    rows = []
    for each in found:
        for texts in split:
            after = each[texts]["after"]
            bits = [f"{after['bits_per_byte'].get(kind, float('nan')):.4f}" for kind in kinds]
            costs = "{value:.4f} ± {error:.4f}".format(**after["worse"]["other"])
            rows.append([each["variant"], texts, f"{each['tokens']:,}", *bits, costs, each[texts]["share"]])
    print(
        table(["variant", "texts", "tokens", "full", "own", "other", "none", "other - own", "share of the gap"], rows)
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
