"""What a training run will need and how fast it will be: memory, traffic, time, before it starts. Imports no torch.

With --config or key=value, exactly the run that launch/train.py would start with the same arguments; with --model, a
well-known model or a config.json, and the layout asked for or the fastest that fits.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from armt_dist.config import ConfigError, read_object, run_main
from armt_dist.schedule.calibration import calibrated, with_network
from armt_dist.schedule.grid import pipeline_warning
from armt_dist.schedule.hardware import HARDWARE, Hardware
from armt_dist.schedule.model_sizes import KINDS, MODELS, ModelSizes, StepWork, memory_fields, model_sizes
from armt_dist.schedule.planned_run import PlannedRun, planned_run
from armt_dist.schedule.planner import (
    STATES,
    Layout,
    Plan,
    choose,
    fits,
    largest_useful_sp,
    listed,
    plan,
    savings,
    schedule_name,
)
from armt_dist.schedule.simulator import simulate_step
from armt_dist.schedule.timeline import plot_timeline, show
from armt_dist.zero3.run_trees import read_trees

EXAMPLES = """examples:
  python launch/plan.py --config launch/configs/plays_cpu.yaml --ds_config ds_configs/zero3_fp32.json --gpus 2 \\
      --hardware cpu --calibrate runs/plays_cpu data.text.files=FOLDER
  python launch/plan.py --config X.yaml --nodes 8 --gpus 8 parallel.sp=8 ds_config.train_batch_size=64
  python launch/plan.py --model llama-1b --gpus 8 --sequence-tokens 131072
  python launch/plan.py --model llama-8b --gpus 64 --sequence-tokens 1048576 --sp 8 --rounds 4 --timeline
  python launch/plan.py --model path/to/config.json --gpus 512 --sequence-tokens 16777216 \\
      --states rebuild --offload-activations --max-step-tokens 67108864
"""
SIMULATED_UNITS = 100_000
"""Longer programs than this (all ranks together) take their time from the closed form."""
# Options of --model: name, type, default, help. With --config the same is said by a key of the configuration.
SHORTCUTS = (
    ("sequence_tokens", int, 131072, ""),
    ("segment_tokens", int, 1024, ""),
    ("micro_batch", int, 1, "sequences per sp group; chosen unless --sp is given"),
    ("sp", int, None, "ranks that share one sequence; without it the best layout is chosen"),
    ("rounds", int, 1, "blocks per rank, with --sp"),
    ("chunks", int, 1, "slices of the micro-batch, with --sp"),
    ("max_step_tokens", float, float("inf"), "largest global batch that may be chosen"),
    ("memory_kind", str, "armt", f"one of {', '.join(KINDS)}"),
    ("num_mem_tokens", int, None, "default 16; transformer_xl has none"),
    ("d_mem", int, 64, ""),
    ("nu", int, 3, ""),
    ("n_heads", int, 1, "memory heads"),
    ("sink", int, 0, "learned rows before a segment's tokens"),
    ("sliding_window", int, 0, "tokens visible across a border, 0: none, or a segment under transformer_xl"),
    ("states", str, "store", f"how the backward recovers states: {', '.join(STATES)}"),
)
OFFLOADS = {
    "offload_activations": "layer inputs in pinned host memory",
    "offload_optimizer": "gradients and optimizer in host memory",
    "offload_parameters": "parameter shards in host memory",
}
MEMORY = ("memory_kind", "num_mem_tokens", "d_mem", "nu", "n_heads", "sink", "sliding_window")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line; options of --model that were not given are absent."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", type=Path, help="YAML config of a run (with key=value alone: launch/configs/default.yaml)")
    add("--ds_config", type=Path, help="DeepSpeed JSON (default ds_configs/zero3.json)")
    add("overrides", nargs="*", metavar="key=value", help="fields of the YAML config, or ds_config.key=value")
    add("--model", help=f"{', '.join(MODELS)}, or a Hugging Face config.json (default llama-1b)")
    add("--gpus", type=int, default=8, help="ranks, of each node if --nodes is given (default %(default)s)")
    add("--nodes", type=int, default=1, help="default %(default)s")
    add("--hardware", choices=HARDWARE, default="h100", help="default %(default)s")
    add("--calibrate", type=Path, action="append", default=[], metavar="RUN", help="run folder; may be repeated")
    add("--network", type=Path, metavar="FILE", help="of launch/preflight.py --network: latency and bandwidth of links")
    add("--timeline", action="store_true", help="print the simulated timeline of one sp group")
    add("--png", type=Path, help="draw the simulated timeline to this file")
    only = parser.add_argument_group("with --model")
    for name, kind, default, text in SHORTCUTS:
        shown = f"{text} (default {default})" if default is not None else text
        only.add_argument(option(name), type=kind, default=argparse.SUPPRESS, help=shown.strip())
    for name, text in OFFLOADS.items():
        only.add_argument(option(name), action="store_true", default=argparse.SUPPRESS, help=text)
    return parser.parse_intermixed_args(arguments)


def option(name: str) -> str:
    """d_mem -> --d-mem."""
    return "--" + name.replace("_", "-")


def read(options: argparse.Namespace, hardware: Hardware) -> PlannedRun:
    """The run that the command line describes. Raises ConfigError."""
    for name in ("gpus", "nodes"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name}={getattr(options, name)}: must be at least 1")
    world = options.nodes * options.gpus
    if not (options.config or options.ds_config or options.overrides):
        return read_shortcut(options, world, hardware)
    if options.model:
        raise ConfigError(
            f"model={options.model}: a run is planned from --config; remove --model or the run's arguments"
        )
    for name in [*(row[0] for row in SHORTCUTS), *OFFLOADS]:
        if hasattr(options, name):
            raise ConfigError(
                f"{option(name)}: belongs to --model; a run takes it from its configuration, as key=value"
            )
    config = options.config or ROOT / "launch/configs/default.yaml"
    return planned_run(read_trees(config, options.ds_config, ROOT / "ds_configs/zero3.json", options.overrides), world)


def read_shortcut(options: argparse.Namespace, world: int, hardware: Hardware) -> PlannedRun:
    """A known model or the sizes in a config.json, in the layout asked for or the best one."""
    given = {name: getattr(options, name, default) for name, _, default, _ in SHORTCUTS}
    given |= {name: getattr(options, name, False) for name in OFFLOADS}
    name = options.model or "llama-1b"
    memory = memory_fields({key: given[key] for key in MEMORY}, given["segment_tokens"])
    if name in MODELS:
        model = MODELS[name]._replace(**memory)
    elif Path(name).is_file():
        model = model_sizes(read_object(Path(name), "model"), memory)
    else:
        raise ConfigError(f"model={name}: neither {', '.join(MODELS)} nor a readable config.json")
    work = StepWork(**{field: given[field] for field in StepWork._fields if field in given})
    sp = given["sp"]
    if sp is None:
        return PlannedRun(model, *choose(model, work, world, hardware, given["max_step_tokens"]))
    if sp < 1 or world % sp:
        raise ConfigError(f"sp={sp} does not divide gpus={world}; try sp=1")
    return PlannedRun(model, work, Layout(world // sp, sp, given["rounds"], given["chunks"]))


def size(count: float) -> str:
    """Bytes for people: 3.1 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def lines(run: PlannedRun, result: Plan, hardware: Hardware) -> list[str]:
    """The table, row by row."""
    memory = describe_memory(run, result, hardware)
    rows = [*describe_run(run, result), *memory, *describe_time(run.model, run.work, result)]
    return [f"{name:<36}{value}" for name, value in rows]


def describe_run(run: PlannedRun, result: Plan) -> list[tuple[str, str]]:
    """The model, the sequence and how they are spread."""
    (model, work, layout), grid = run, result.grid
    batch = work.accumulation * layout.dp * work.micro_batch
    spread = f"dp {layout.dp} x sp {layout.sp}, rounds {grid.rounds}, chunks {grid.chunks}"
    steps = f", {work.accumulation} accumulation steps" if work.accumulation > 1 else ""
    layers = f"{model.num_hidden_layers} layers of {model.layer_parameters:,}"
    return [
        ("model", f"{model.parameters:,} parameters, {layers}"),
        ("sequence", f"{work.sequence_tokens:,} tokens = {grid.segments} segments of {work.segment_tokens}"),
        ("layout", f"{spread}, micro-batch {work.micro_batch}{steps}, {schedule_name(model, layout)}"),
        ("global batch", f"{batch} sequences, {batch * work.sequence_tokens:,} tokens per step"),
    ]


def describe_memory(run: PlannedRun, result: Plan, hardware: Hardware) -> list[tuple[str, str]]:
    """Device and host memory of a rank, item by item."""
    saving = listed(["more gpus", *savings(run.work)])
    verdict = "fits" if fits(result, hardware) else f"does NOT fit; try {saving}"
    total = f"{size(sum(result.gpu_bytes.values()))} per rank of {size(hardware.memory_bytes)}"
    device = [(f"  {name}", size(held)) for name, held in result.gpu_bytes.items() if held]
    host = [(f"  {name}", size(held)) for name, held in result.host_bytes.items() if held]
    if host:
        host.insert(0, ("host memory", f"{size(sum(result.host_bytes.values()))} per rank"))
    name = "GPU memory" if hardware.device == "cuda" else "memory of tensors"
    rows = [(name, f"{total}: {verdict}"), ("largest in", result.phase), *device, *host]
    if run.layout.sp > 1:
        useful = largest_useful_sp(run.model, run.work, run.layout, hardware)
        filled = f"the pipeline fills up to layers x chunks = {result.grid.layers * result.grid.chunks}"
        rows.append(("largest useful sp", f"{useful} of these ranks, in this memory; {filled}"))
    return rows


def describe_time(model: ModelSizes, work: StepWork, result: Plan) -> list[tuple[str, str]]:
    """Traffic, operations and time of a step."""
    ahead, wanted = (min(window, result.grid.layers) for window in (result.window, result.wanted_window))
    window = f"{ahead} of {result.grid.layers} layers, {size(model.layer_parameters * work.dtype_bytes)} each"
    if ahead < wanted:
        window += f"; the wavefront wants {wanted}, and ranks wait for each other"
    handed = f"{size(result.handoff_unit_bytes)} per unit, {size(result.handoff_bytes)} per rank and step"
    busy = f"{result.efficiency:.1%} of the time computing; the schedule's bound is {result.bound:.1%}"
    per_rank = f"{result.tokens_per_s / result.world:,.0f} per rank"
    taught = f"{result.teacher_s:.3g} s: the base over windows of {work.teacher_window:,} tokens, in the step"
    return [
        ("gathered", f"{size(result.gather_bytes)} per rank and step"),
        ("reduced", f"{size(result.reduce_bytes)} per rank and step"),
        ("handed on", handed),
        ("prefetch window", window),
        ("operations", f"{result.flops:.3g} per rank and step, the re-run counted"),
        ("efficiency", busy),
        *([("teacher", taught)] if work.teacher_window else []),
        ("step", f"{result.step_s:.3g} s, {result.mfu:.1%} MFU"),
        ("throughput", f"{result.tokens_per_s:,.0f} tokens/s, {per_rank}"),
    ]


def main() -> int:
    """Print the plan. Returns the exit code."""
    options = parse(sys.argv[1:])
    hardware = HARDWARE[options.hardware]
    if options.network:
        hardware = with_network(hardware, options.network)
    if options.calibrate:
        hardware = calibrated(hardware, options.calibrate)
    run = read(options, hardware)
    model, work, layout = run
    result = plan(model, work, layout, hardware)
    drawn = options.timeline or options.png
    if drawn or 8 * result.grid.sp * result.grid.units <= SIMULATED_UNITS:
        name = schedule_name(model, layout)
        report = simulate_step(name, result.grid, result.costs, model.kind.arrows)
        result = plan(model, work, layout, hardware, pipeline_s=report.makespan_s)
    print("\n".join(lines(run, result, hardware)))
    if message := pipeline_warning(result.grid):
        print(f"warning: {message}")
    if options.timeline:
        print(show(report.events))
    if options.png:
        title = options.model or (options.config.stem if options.config else "default")
        plot_timeline(report.events, options.png, f"{title}, sp {layout.sp}, rounds {layout.rounds}")
    return 0


if __name__ == "__main__":
    run_main(main, rank=0)
