"""Evaluate an exported model by the length of its input, in constant memory.

Reports accuracy (retrieval, BABILong) or perplexity and bits per byte (text) for each length as a table, and writes
evaluation.json and evaluation.png. For BABILong, the tasks are evaluated one by one and shown as a heat map. The task
is the one that the model was trained on, unless --task names another.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from armt_dist.data.sections import DataConfig
    from armt_dist.data.task import Task
    from armt_dist.evaluation.evaluate import Row
    from armt_dist.model.modeling_armt import ARMTForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from armt_dist.config import ConfigError, run_main
from armt_dist.records import write_json
from armt_dist.versions import check_versions

EXAMPLES = """examples:
  python launch/evaluate.py --model model
  python launch/evaluate.py --model model --task remember --lengths 5 10 20 50 100 --samples 1024
  python launch/evaluate.py --model model --lengths 1 4 16 64 --data data.text.validation_files=held_out/
  python launch/evaluate.py --model model --task babilong --data 'data.babilong.tasks=[qa1, qa2]' --lengths 4 16 64
  python launch/evaluate.py --model model --zero-memory     # without memory, for comparison
  python launch/evaluate.py --model model --audit --lengths 500      # which layer's memory fails at this length
  python launch/evaluate.py --model model --control --lengths 64 --data data.text.validation_files=held_out/
"""


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder that launch/consolidate.py wrote")
    add(
        "--task",
        help="rewrite, remember, text, babilong, instructions or mixture (default: the one the model was trained on)",
    )
    add("--lengths", nargs="*", type=int, help="pairs or segments (default: 5 10 20 50 pairs or 1 2 4 ... 64 segments, "
        "as far as the task can make them)")  # fmt: skip
    add("--samples", type=int, default=256, help="samples of each length (default %(default)s)")
    add("--batch", type=int, default=64, help="samples evaluated at a time (default %(default)s)")
    add("--data", nargs="+", action="extend", default=[], metavar="data.KEY=VALUE", help="change the task's settings")
    add("--trust-data", action="store_true", help="read data wherever the model's folder says, also from other folders "
        "and the network")  # fmt: skip
    add("--extensions", nargs="+", default=[], metavar="MODULE", help="modules that register the task, as in training")
    add("--zero-memory", action="store_true", help="empty the memory before every segment")
    add("--audit", action="store_true", help="at the longest length, also tell what each layer's memory does with it, "
        "which layer does harm, and how far back the loss reaches: audit_TASK.json and .png")  # fmt: skip
    add("--control", action="store_true", help="at the longest length of task text, also tell whether the memory "
        "carries content: bits with another text's memory, and with none: control_text.json and .png")  # fmt: skip
    add("--full-attention", type=int, metavar="TOKENS", help="with --control, let the base also read up to so many "
        "tokens in one pass")  # fmt: skip
    add("--out", type=Path, help="folder of the results (default: MODEL/evaluation, or MODEL/evaluation_zero_memory)")
    add("--no-self-check", action="store_true", help="skip the comparison of cached with uncached logits")
    add("--strict-versions", action="store_true", help="fail if a package is outside its tested range")
    add("--device", help="for example cpu or cuda:1 (default: a GPU if there is one)")
    return parser.parse_args()


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn an OSError of the block into a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written ({error.strerror}); give another --out") from None


def one_by_one(data: "DataConfig") -> dict[str, "DataConfig"]:
    """Split into what is evaluated separately, by name: each task of BABILong, or everything."""
    if data.task != "babilong":
        return {data.task: data}
    from armt_dist.data.sections import BabilongConfig

    section = data.babilong or BabilongConfig()
    return {
        name: data.model_copy(update={"babilong": section.model_copy(update={"tasks": [name]})})
        for name in section.tasks
    }


def write_results(out: Path, facts: dict, found: "dict[str, list[Row]]") -> None:
    """Write evaluation.json and evaluation.png. Raises OSError."""
    from armt_dist.evaluation.evaluation_report import heat_map, plot_evaluation

    rows = [{"task": name, **row._asdict()} for name, part in found.items() for row in part]
    write_json(out / "evaluation.json", {**facts, "rows": rows})
    name, measure, picture = facts["data"]["task"], facts["measure"], out / "evaluation.png"
    if name == "babilong":
        heat_map(found, picture, "BABILong: exact match")
    else:
        plot_evaluation(found[name], measure, picture, f"{name}: {measure} by length")


def write_audit(out: Path, model: "ARMTForCausalLM", name: str, task: "Task", length: int, samples: int) -> None:
    """Audit a model on a task, print what was found, and write audit_TASK.json and .png. Raises ConfigError."""
    from armt_dist.evaluation.audit import audit
    from armt_dist.evaluation.audit_report import audit_table, plot_audit, sentence

    found = audit(model, task, length, samples)
    print(f"{audit_table(found)}\n{sentence(found)}")
    layers = [layer._asdict() for layer in found.layers]
    ages = [age._asdict() for age in found.ages]
    with writing(out):
        write_json(
            out / f"audit_{name}.json", {**found._asdict(), "layers": layers, "ages": ages, "says": sentence(found)}
        )
        plot_audit(found, out / f"audit_{name}.png", f"{name}: {length} {task.unit}")


def write_control(out: Path, model: "ARMTForCausalLM", task: "Task", length: int, args: argparse.Namespace) -> None:
    """Compare memories, print what was found, and write control_text.json and .png. Raises ConfigError."""
    from armt_dist.evaluation.control import control
    from armt_dist.evaluation.control_report import as_json, control_table, plot_control, sentence

    found = control(model, task, length, args.samples, args.batch, full_tokens=args.full_attention)
    print(f"{control_table(found)}\n{sentence(found)}")
    with writing(out):
        write_json(out / "control_text.json", as_json(found))
        plot_control(found, out / "control_text.png", f"text: {length} {task.unit}")


def check_options(args: argparse.Namespace) -> None:
    """Raise ConfigError for options that exclude each other."""
    if args.batch < 1:
        raise ConfigError(f"batch={args.batch}: must be at least 1")
    if args.full_attention is not None and not args.control:
        raise ConfigError(f"full-attention={args.full_attention}: is a part of --control; give both")
    if args.control and args.zero_memory:
        raise ConfigError("control: measures what --zero-memory does, too; give one of them")


def main() -> None:
    """Evaluate, print tables, and write the results."""
    args = arguments()
    check_versions(args.strict_versions)
    # Slow to import; --help should not wait for it.
    from transformers.utils import logging

    from armt_dist.checkpoint.exported_code import REFRESH, is_stale
    from armt_dist.data.extensions import load_extensions
    from armt_dist.data.tasks import make_task
    from armt_dist.evaluation.control import check_control
    from armt_dist.evaluation.evaluate import check_lengths, evaluate
    from armt_dist.evaluation.evaluation_report import evaluation_table
    from armt_dist.evaluation.exported import default_lengths, load_model, read_task, self_check

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    check_options(args)
    out = args.out or args.model / ("evaluation_zero_memory" if args.zero_memory else "evaluation")
    model = load_model(args.model, args.device)
    if is_stale(args.model):
        print(f"note: the code in {args.model} is not this version's, which evaluates it; update it with\n"
              f"  {REFRESH.format(folder=args.model)}", file=sys.stderr)  # fmt: skip
    if not args.no_self_check:
        self_check(model)
    load_extensions(args.extensions)
    data = read_task(args.model, args.task, args.data, args.trust_data)
    parts = {name: make_task(part, model.config.segment_tokens, model.config.vocab_size, args.batch)
             for name, part in one_by_one(data).items()}  # fmt: skip
    lengths = args.lengths
    for task in parts.values():
        lengths = lengths if lengths is not None else default_lengths(task)
        check_lengths(task, lengths, args.samples, args.batch)
        if args.control:
            check_control(model, task, max(lengths), args.full_attention)
    # Checked before the work, whose results would be lost.
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, task in parts.items():
        found[name] = evaluate(model, task, lengths, args.samples, args.batch, zero_memory=args.zero_memory)
        if len(parts) > 1:
            print(name)
        print(evaluation_table(found[name], task.measure))
        if args.audit:
            write_audit(out, model, name, task, max(lengths), args.samples)
        if args.control:
            write_control(out, model, task, max(lengths), args)
    facts = {"model": str(args.model), "data": data.model_dump(mode="json", exclude_none=True)}
    facts |= {"measure": task.measure, "zero_memory": args.zero_memory}
    with writing(out):
        write_results(out, facts, found)
    print(f"wrote {out}/evaluation.json and {out}/evaluation.png")


if __name__ == "__main__":
    run_main(main, rank=0)
