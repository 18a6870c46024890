"""What a pretrained base costs in memory while it is loaded, partitioned, on several ranks.

    python benchmarks/scale_base.py [--millions 100 200 400] [--ranks 4] [--folder .]

Writes random Llama folders of about so many million parameters, float32, and builds each as a run's base does, under
ZeRO-3. Prints a Markdown table, in MB: the model, a rank's shard, the largest tensor; and, at most over the ranks, the
anonymous memory added at the highest and at the end, and the seconds that it took.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from measures import MB, Highest, memory
from ranks import heading, spawn, table

CPU = torch.device("cpu")


def write_base(folder: Path, millions: float) -> None:
    """A random Llama in files of at most 200 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = 8
    width = 64 * round((millions * 1e6 / layers / 11) ** 0.5 / 64)
    config = LlamaConfig(
        vocab_size=8_000,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="200MB")


def build(ranks, folder: Path) -> tuple[float, ...]:
    """Build the model; bytes of shard, largest tensor, highest, end, and seconds."""
    from armt_dist.config import validate
    from armt_dist.zero3 import partitioned_model
    from armt_dist.zero3.communication import start_communication
    from armt_dist.zero3.ds_config import prepare

    ds = {"train_batch_size": ranks.world_size, "zero_optimization": {"stage": 3}}
    prepared = prepare(ds, ranks.world_size, ranks.world_size, CPU)
    start_communication()
    config = validate(partitioned_model.ModelConfig, {"base": str(folder), "num_mem_tokens": 2, "d_mem": 8})
    armt = partitioned_model.armt_config(config, {}, 16)
    torch.distributed.barrier()
    start = time.perf_counter()
    with Highest() as highest:
        model = partitioned_model.build_model(config, armt, prepared.ds_config, seed=0)
    seconds = time.perf_counter() - start
    shard = sum(p.ds_tensor.nbytes for p in model.parameters())
    whole = [p.ds_numel * p.element_size() for p in model.parameters()]
    return sum(whole), shard, max(whole), highest.added, memory("RssAnon") - highest.before, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, nargs="+", default=[100, 200, 400])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--folder", default=".", help="where the models are written for a while")
    args = parser.parse_args()
    rows = []
    for millions in args.millions:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            write_base(Path(folder), millions)
            found = [max(column) for column in zip(*spawn(args.ranks, build, Path(folder), timeout_s=600), strict=True)]
        rows.append([*(f"{value / MB:,.0f}" for value in found[:-1]), f"{found[-1]:.0f}"])
    print(heading("scale_base.py"), table(["model", "shard", "largest", "highest", "end", "seconds"], rows), sep="\n\n")


if __name__ == "__main__":
    main()
