"""What a training run will need and how fast it will be on an H100 cluster: memory, traffic, time, before it starts."""

import argparse
import json
from pathlib import Path

from armt_dist.config import ConfigError, run_main
from armt_dist.schedule.grid import pipeline_warning
from armt_dist.schedule.hardware import H100
from armt_dist.schedule.model_sizes import MODELS, Model, StepWork, from_hf
from armt_dist.schedule.planner import KINDS, STATES, Layout, Plan, choose, fits, plan, schedule_name
from armt_dist.schedule.simulator import simulate_step
from armt_dist.schedule.timeline import plot_timeline, show

EXAMPLES = """examples:
  python launch/plan.py --model llama-1b --gpus 8 --sequence-tokens 131072
  python launch/plan.py --model llama-8b --gpus 64 --sequence-tokens 1048576 --sp 8 --rounds 4 --timeline
  python launch/plan.py --model path/to/config.json --gpus 512 --sequence-tokens 16777216 \\
      --states rebuild --offload-activations --max-step-tokens 67108864
"""
SIMULATED_UNITS = 100_000
"""Longer programs than this (all ranks together) take their time from the closed form."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="llama-1b", help=f"{', '.join(MODELS)}, or a Hugging Face config.json (default %(default)s)")
    add("--gpus", type=int, default=8, help="dp x sp (default %(default)s)")
    add("--sequence-tokens", type=int, default=131072, help="default %(default)s")
    add("--segment-tokens", type=int, default=1024, help="default %(default)s")
    add("--micro-batch", type=int, default=1, help="sequences per sp group; chosen unless --sp is given")
    add("--sp", type=int, help="ranks that share one sequence; without it the best layout is chosen")
    add("--rounds", type=int, default=1, help="blocks per rank, with --sp (default %(default)s)")
    add("--chunks", type=int, default=1, help="slices of the micro-batch, with --sp (default %(default)s)")
    add("--max-step-tokens", type=float, default=float("inf"), help="largest global batch that may be chosen")
    add("--kind", choices=KINDS, default="armt", help="memory (default %(default)s)")
    add("--memory-tokens", type=int, default=16, help="default %(default)s")
    add("--d-mem", type=int, default=64, help="default %(default)s")
    add("--nu", type=int, default=3, help="default %(default)s")
    add("--sink", type=int, default=0, help="learned rows before a segment's tokens (default %(default)s)")
    add("--sliding-window", type=int, default=0, help="tokens visible across a border (default %(default)s: none)")
    add("--states", choices=STATES, default="store", help="how the backward has the states again (default %(default)s)")
    add("--offload-activations", action="store_true", help="layer inputs in pinned host memory")
    add("--offload-optimizer", action="store_true", help="gradients and optimizer in host memory")
    add("--offload-parameters", action="store_true", help="parameter shards in host memory")
    add("--timeline", action="store_true", help="print the simulated timeline of one sp group")
    add("--png", type=Path, help="draw the simulated timeline to this file")
    return parser.parse_args()


def read_model(options: argparse.Namespace) -> Model:
    """A known model or the sizes in a config.json, with the memory asked for."""
    memory = {key: getattr(options, key) for key in ("kind", "memory_tokens", "d_mem", "nu", "sink", "sliding_window")}
    if options.model in MODELS:
        return MODELS[options.model]._replace(**memory)
    try:
        return from_hf(json.loads(Path(options.model).read_text(encoding="utf-8")), memory)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        known = ", ".join(MODELS)
        raise ConfigError(f"model={options.model}: neither {known} nor a readable config.json ({error})") from None


def read_layout(options: argparse.Namespace, model: Model) -> tuple[StepWork, Layout]:
    """The layout asked for, or the best one."""
    work = StepWork(**{field: getattr(options, field) for field in StepWork._fields if hasattr(options, field)})
    if options.gpus < 1:
        raise ConfigError(f"gpus={options.gpus}: must be at least 1")
    if options.sp is None:
        return choose(model, work, options.gpus, max_step_tokens=options.max_step_tokens)
    if options.sp < 1 or options.gpus % options.sp:
        raise ConfigError(f"sp={options.sp} does not divide gpus={options.gpus}; try sp=1")
    return work, Layout(options.gpus // options.sp, options.sp, options.rounds, options.chunks)


def size(count: float) -> str:
    """Bytes for people: 3.1 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def lines(model: Model, work: StepWork, layout: Layout, result: Plan) -> list[str]:
    """The table, row by row."""
    grid = result.grid
    head = [
        ("model", f"{model.parameters / 1e9:.2f} B parameters, {model.layers} layers of {model.layer_parameters:,}"),
        ("sequence", f"{work.sequence_tokens:,} tokens = {grid.segments} segments of {work.segment_tokens}"),
        ("layout", f"dp {layout.dp} x sp {layout.sp}, rounds {grid.rounds}, chunks {grid.chunks}, "
                   f"micro-batch {work.micro_batch}, {schedule_name(model)}"),
        ("global batch", f"{layout.dp * work.micro_batch * work.sequence_tokens:,} tokens per step"),
    ]  # fmt: skip
    memory = [(f"  {name}", size(count)) for name, count in result.gpu_bytes.items()]
    host = [(f"  {name}", size(count)) for name, count in result.host_bytes.items() if count]
    verdict = "fits" if fits(result) else "does NOT fit; try more gpus, --states rebuild or an --offload"
    traffic = [
        ("gathered", f"{size(result.gather_bytes)} per rank and step"),
        ("reduced", f"{size(result.reduce_bytes)} per rank and step"),
        ("handed on", f"{size(result.handoff_unit_bytes)} per unit, {size(result.handoff_bytes)} per rank and step"),
        ("prefetch window", f"{result.window} layers of {size(model.layer_parameters * work.dtype_bytes)}"),
        ("operations", f"{result.flops:.3g} per rank and step, the re-run counted"),
        ("efficiency", f"{result.efficiency:.1%} of the time computing; the schedule's bound is {result.bound:.1%}"),
        ("step", f"{result.step_s:.3g} s, {result.mfu:.1%} MFU"),
        ("throughput", f"{result.tokens_per_s:,.0f} tokens/s, {result.tokens_per_s / result.world:,.0f} per GPU"),
    ]
    device = [
        ("GPU memory", f"{size(sum(result.gpu_bytes.values()))} per rank of {size(H100.memory_bytes)}: {verdict}"),
        *memory,
    ]
    offloaded = [("host memory", f"{size(sum(result.host_bytes.values()))} per rank"), *host] if host else []
    return [f"{name:<36}{value}" for name, value in [*head, *device, *offloaded, *traffic]]


def main() -> int:
    options = arguments()
    model = read_model(options)
    work, layout = read_layout(options, model)
    result = plan(model, work, layout)
    drawn = options.timeline or options.png
    if drawn or 8 * result.grid.sp * result.grid.units <= SIMULATED_UNITS:
        report = simulate_step(schedule_name(model), result.grid, result.costs, KINDS[model.kind])
        result = plan(model, work, layout, pipeline_s=report.makespan_s)
    print("\n".join(lines(model, work, layout, result)))
    if message := pipeline_warning(result.grid):
        print(f"warning: {message}")
    if options.timeline:
        print(show(report.events))
    if options.png:
        plot_timeline(report.events, options.png, f"{options.model}, sp {layout.sp}, rounds {layout.rounds}")
    return 0


if __name__ == "__main__":
    run_main(main, rank=0)
