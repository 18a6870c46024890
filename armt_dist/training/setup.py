"""What a rank knows before training: the checked configuration, the data, and the partitioned model."""

from pathlib import Path
from typing import NamedTuple

import torch

from ..config import ConfigError
from ..data.extensions import METRICS
from ..data.retrieval import Retrieval
from ..data.task import Task
from ..data.tasks import make_task
from ..distributed.launchers import Ranks
from ..distributed.mesh import make_mesh, ring
from ..model.configuration_armt import ARMTConfig
from ..model.segment_rows import segment_lengths
from ..runtime.executor import ScheduledLM, check_memory
from ..runtime.handoff import Local, Wire
from ..schedule.grid import Grid
from ..zero3.ds_config import Prepared, prepare
from ..zero3.partitioned_model import armt_config, build_model, token_fields
from .global_batch import Batches
from .loss_mask import check_loss
from .run_config import RunConfig
from .run_folder import check_same, check_texts


class Setup(NamedTuple):
    """What one rank knows before the model is built."""

    batches: Batches
    prepared: Prepared
    resuming: bool  # whether the run folder holds a run


def set_up(config: RunConfig, ds_config: dict, out: Path, ranks: Ranks, device: torch.device) -> Setup:
    """Check the configuration, and open the data. Not collective. Raises ConfigError."""
    mesh = make_mesh(ranks, config.parallel.sp)
    prepared = prepare(ds_config, mesh.dp, ranks.world_size, device)
    base = config.model.base_config or {}
    segment_tokens = getattr(config.model, "segment_tokens", None)
    task = make_task(config.data, segment_tokens, base.get("vocab_size"), prepared.sizes.global_batch)
    armt = armt_config(config.model, token_fields(task.tokenizer), task.segment_tokens)
    grid = Grid(1, armt.num_hidden_layers, mesh.sp, config.parallel.rounds, config.parallel.chunks)
    check_task(config, task, armt)
    check_curriculum(config, task, armt)
    check_memory(config.parallel, armt.memory_kind)
    resuming = (out / "config.yaml").exists()
    if resuming:
        check_same(out, config)
        check_texts(out, task)
    sizes = prepared.sizes
    batches = Batches(task, armt, grid, config.parallel.schedule, mesh, sizes, device, config.loss)
    return Setup(batches, prepared, resuming)


def check_task(config: RunConfig, task: Task, armt: ARMTConfig) -> None:
    """Check that the model fits the task. Raises ConfigError."""
    if len(task.tokenizer) > armt.vocab_size:
        raise ConfigError(
            f"model.vocab_size={armt.vocab_size}: the tokenizer has {len(task.tokenizer)} tokens; use another "
            "tokenizer or a base model with a larger embedding"
        )
    known = [*(["accuracy"] if task.measure == "accuracy" else []), "loss", "token_accuracy", *METRICS]
    if config.train.best is not None and config.train.best not in known:
        raise ConfigError(f"train.best={config.train.best}: no such validation metric; choose from {', '.join(known)}")
    if armt.segment_alignment != "left" and task.pads():
        raise ConfigError(
            f"model.segment_alignment={armt.segment_alignment}: samples of data.task={config.data.task} may be padded, "
            "and where they are cut would depend on their batch; set left"
        )
    if task.size("train") == 0:
        raise ConfigError(f"data.{config.data.task}: no sample is left to train on; hold out fewer for validation")


def check_curriculum(config: RunConfig, task: Task, armt: ARMTConfig) -> None:
    """Check that the task can make the samples of every stage, and that they fill the ranks. Raises ConfigError."""
    name = f"task={config.data.task}"
    for i, stage in enumerate(config.curriculum):
        if stage.unit != task.unit:
            raise ConfigError(f"curriculum.{i}.{stage.unit}={stage.length}: {name} counts {task.unit}")
        task.sequence_tokens(stage.length)
        if isinstance(task, Retrieval):
            task.key_count(stage.length, **stage.keys)
        for key, value in stage.keys.items():
            if value is not None and not isinstance(task, Retrieval):
                raise ConfigError(f"curriculum.{i}.{key}={value}: {name} has no keys; remove it")
        if stage.until is not None and task.measure != "accuracy":
            raise ConfigError(f"curriculum.{i}.until: {name} has no accuracy; use patience")
        shortest = task.sequence_tokens(stage.difficulty.minimum)
        segments = len(segment_lengths(shortest, armt.segment_tokens, armt.segment_alignment))
        check_blocks(config, i, segments)
        check_loss(config.loss, i, segments)


def check_blocks(config: RunConfig, stage: int, segments: int) -> None:
    """Check that the shortest samples of a stage have a segment for every block. Raises ConfigError."""
    sp, rounds = config.parallel.sp, config.parallel.rounds
    if segments < sp * rounds:
        raise ConfigError(
            f"parallel.sp={sp} x parallel.rounds={rounds} = {sp * rounds} blocks: curriculum.{stage} may draw samples "
            f"of {segments} segments; raise its at_least, or lower sp or rounds"
        )


def build_runner(config: RunConfig, setup: Setup) -> ScheduledLM:
    """Build the partitioned model, and the links between the ranks of an sp group. Collective."""
    batches, prepared = setup.batches, setup.prepared
    model = build_model(config.model, batches.armt, prepared.ds_config, config.train.seed)
    link: Local | Wire = Local()
    if batches.mesh.sp > 1:
        link = Wire(*ring(batches.mesh, config.parallel.timeout_s), batches.device)
    return ScheduledLM(model, states=config.bptt.states, offload=prepared.offload_activations, link=link)
