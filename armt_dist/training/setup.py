"""What a rank knows before training: the checked configuration, the data, and the partitioned model."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from ..config import ConfigError
from ..data.extensions import METRICS
from ..data.task import Task, notes_of
from ..data.tasks import make_task
from ..distributed.launchers import Ranks
from ..distributed.machine import check_queues
from ..distributed.mesh import make_mesh, ring
from ..model.configuration_armt import ARMTConfig
from ..model.fields import ARMTFields
from ..records import RUN_CONFIG
from ..runtime.executor import ScheduledLM, check_memory
from ..runtime.handoff import Local, Wire
from ..schedule.grid import Grid, prefetch_window
from ..schedule.hardware import HARDWARE
from ..schedule.kept_cells import parse_keep
from ..schedule.planned_run import RunTree, planned_run
from ..schedule.planner import plan
from ..schedule.step_memory import STATES, Held, resident_bytes
from ..schedule.weight_groups import GROUPED
from ..zero3.adapters import add_adapters, add_partitioned_adapters, without_adapters
from ..zero3.ds_config import Prepared, prepare
from ..zero3.partitioned_model import armt_config, build_model, on_meta, token_fields
from ..zero3.trained_parameters import freeze_parameters, parameter_groups
from .checks import check_best, check_curriculum
from .curriculum import Stage, with_steps
from .global_batch import Batches
from .run_config import RunConfig, resolved
from .run_folder import check_same, check_texts


class Prefetch(NamedTuple):
    """How many layers are gathered ahead of use, and how many the wavefront wants."""

    window: int
    wanted: int

    def notes(self) -> list[str]:
        """Return a line where ranks will wait for each other."""
        if self.window >= self.wanted:
            return []
        return [
            f"prefetch: {self.window} layers, and the wavefront wants {self.wanted}, so ranks wait for each other; "
            "more ranks, a smaller parallel.sp, more parallel.chunks or an offload make room"
        ]


class Setup(NamedTuple):
    """What one rank knows before the model is built."""

    batches: Batches
    prepared: Prepared
    stages: list[Stage]  # of the curriculum, with their steps
    resuming: bool  # whether the run folder holds a run
    prefetch: Prefetch

    def notes(self) -> list[str]:
        """Return what was found in the data, and the steps that follow from it, line by line."""
        size, rows = self.batches.task.size("train"), self.batches.sizes.global_batch
        steps = [
            f"curriculum.{i}: {stage.total_steps:,} steps of {rows} samples, "
            f"{stage.total_steps * rows / size:.3g} epochs of the {size:,} for training"
            for i, stage in enumerate(self.stages)
            if size
        ]
        return [*notes_of(self.batches.task), *steps, *self.prefetch.notes()]


def set_up(
    config: RunConfig,
    ds_config: dict,
    out: Path,
    ranks: Ranks,
    device: torch.device,
    progress: Callable[[str], None] = lambda line: None,
) -> Setup:
    """Check the configuration, and open the data. Not collective. Raises ConfigError.

    progress: called with a line while texts are tokenised.
    """
    mesh = make_mesh(ranks, config.parallel.sp)
    prepared = prepare(ds_config, mesh.dp, ranks.world_size, device)
    base = config.model.base_config or {}
    segment_tokens = getattr(config.model, "segment_tokens", None)
    task = make_task(config.data, segment_tokens, base.get("vocab_size"), prepared.sizes.global_batch, progress)
    armt = armt_config(config.model, token_fields(task.tokenizer), task.segment_tokens)
    grid = Grid(1, armt.num_hidden_layers, mesh.sp, config.parallel.rounds, config.parallel.chunks)
    prefetch = fit_states(config, ds_config, armt, grid, ranks, device)
    check_task(config, task, armt)
    check_curriculum(config, task)
    check_memory(config.parallel, armt.memory_kind)
    if config.loss.distill is not None:
        check_window(config.loss.distill.window, armt)
    check_trained(config, armt, prepared.ds_config["optimizer"]["params"])
    sizes = prepared.sizes
    stages = with_steps(config.curriculum, config.train.epochs, task.size("train"), sizes.global_batch)
    resuming = (out / RUN_CONFIG).exists()
    if resuming:
        check_same(out, config.model_copy(update={"ds_config": ds_config}))
        check_texts(out, task)
    batches = Batches(task, armt, grid, config.parallel.schedule, mesh, sizes, device, config.loss)
    return Setup(batches, prepared, stages, resuming, prefetch)


def fit_states(
    config: RunConfig, ds_config: dict, armt: ARMTConfig, grid: Grid, ranks: Ranks, device: torch.device
) -> Prefetch:
    """Check that parameters, gradients and optimizer states fit on the device. Raises ConfigError.

    Returns how many layers are gathered ahead, of those that the plan has room for. What a step needs besides is not
    known well enough to refuse a run for it. Tasks of extensions are not planned, nor what patterns freeze.
    """
    wanted = prefetch_window(grid)
    if config.data.options is not None or isinstance(config.train.freeze, list):
        return Prefetch(config.parallel.prefetch or wanted, wanted)
    model = {name: getattr(armt, name) for name in ARMTFields.__annotations__} | {"base_config": armt.base.to_dict()}
    planned = planned_run(RunTree(resolved(config) | {"model": model}, ds_config), ranks.world_size)
    alone = Grid(1, armt.num_hidden_layers, 1)
    held = resident_bytes(Held(planned.model, planned.work, alone, ranks.world_size, 0, device.type))
    need = sum(held[name] for name in STATES)
    if device.type == "cuda":
        have = torch.cuda.mem_get_info(device)[1]
    else:
        have = psutil.virtual_memory().total // ranks.local_world_size
    if need > have:
        raise ConfigError(
            f"model: {planned.model.parameters:,} parameters need {need / 1e9:,.0f} GB on each of {ranks.world_size} "
            f"ranks for weights, gradients and optimizer states, and a rank has {have / 1e9:,.0f} GB; use more ranks, "
            "a smaller model or an offload (launch/plan.py shows what a run needs)"
        )
    if grid.sp == 1:
        return Prefetch(config.parallel.prefetch or wanted, wanted)
    hardware = HARDWARE["h100" if device.type == "cuda" else "cpu"]._replace(memory_bytes=have)
    try:
        window = plan(*planned, hardware).window
    except ConfigError:
        # What cannot be planned may still be run.
        window = wanted
    return Prefetch(min(window, config.parallel.prefetch or wanted), wanted)


def check_window(window: int, armt: ARMTConfig) -> None:
    """Check that a teacher sees no less than the model in a segment, and no more than it can read. Raises ConfigError.

    window: `DistillConfig.window`.
    """
    base, least = armt.base, 2 * armt.segment_tokens
    limits = [base.max_position_embeddings]
    if "sliding_attention" in (getattr(base, "layer_types", None) or ["sliding_attention"]):
        limits.append(getattr(base, "sliding_window", None) or base.max_position_embeddings)
    if not least <= window <= min(limits):
        raise ConfigError(
            f"loss.distill.window={window}: must be from {least}, two segments, to {min(limits)}, which the base can "
            "read at once"
        )


def check_trained(config: RunConfig, armt: ARMTConfig, optimizer: dict) -> None:
    """Check names and patterns of what is trained before weights are loaded. Raises ConfigError."""
    train, lora = config.train, config.model.lora
    if train.freeze is not None or train.optimizer_groups or lora is not None:
        model = on_meta(armt)
        if lora is not None:
            with torch.device("meta"):
                add_adapters(model, lora)
        freeze_parameters(model, train.freeze)
        parameter_groups(model, train.optimizer_groups, optimizer)


def check_task(config: RunConfig, task: Task, armt: ARMTConfig) -> None:
    """Check that the model fits the task. Raises ConfigError."""
    if len(task.tokenizer) > armt.vocab_size:
        raise ConfigError(
            f"model.vocab_size={armt.vocab_size}: the tokenizer has {len(task.tokenizer)} tokens; use another "
            "tokenizer or a base model with a larger embedding"
        )
    check_best(config.train.best, task, tuple(METRICS))
    if armt.segment_alignment != "left" and task.pads():
        raise ConfigError(
            f"model.segment_alignment={armt.segment_alignment}: samples of data.task={config.data.task} may be padded, "
            "and where they are cut would depend on their batch; set left"
        )
    if task.size("train") == 0:
        raise ConfigError(f"data.{config.data.task}: no sample is left to train on; hold out fewer for validation")


def build_runner(config: RunConfig, setup: Setup) -> ScheduledLM:
    """Build the partitioned model, and the links between the ranks of an sp group. Collective."""
    batches, prepared = setup.batches, setup.prepared
    model = build_model(config.model, batches.armt, prepared.ds_config, config.train.seed)
    if config.model.lora is not None:
        add_partitioned_adapters(model, config.model.lora, prepared.ds_config, config.train.seed)
    freeze_parameters(model, config.train.freeze)
    link: Local | Wire = Local()
    if batches.mesh.sp > 1:
        if batches.device.type == "cuda":
            check_queues(batches.mesh.sp)
        link = Wire(*ring(batches.mesh, config.parallel.timeout_s), batches.device)
    graphs = batches.device.type == "cuda" if config.bptt.graphs is None else config.bptt.graphs
    return ScheduledLM(
        model,
        states=config.bptt.states,
        keep=parse_keep(config.bptt.keep),
        offload=prepared.offload_activations,
        graphs=graphs,
        grouped=config.bptt.weight_gradients == GROUPED,
        link=link,
        without_adapters=without_adapters,
    )
