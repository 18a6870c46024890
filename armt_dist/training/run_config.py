"""The run configuration, and how it is put together from a recipe, a ds_config file and the command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from ..config import Positive, Section, Seed, read_tree, validate
from ..data.sections import DataConfig
from ..monitoring.sections import Rollback, WatchdogConfig
from ..runtime.sections import BPTTConfig, ParallelConfig
from ..zero3.ds_config import complete_ds_config, split_overrides
from ..zero3.sections import ModelConfig, OptimizerGroup
from .curriculum import Fraction, Stage


class TrainConfig(Section):
    """Training loop: seed, logs, validations, checkpoints."""

    seed: Seed = 0
    """Seed of the initial weights and of dropout. Example: 1"""
    max_steps: Positive | None = None
    """Number of optimizer steps after which the run ends, in whatever stage; null: no limit. Example: 1000"""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over a finite training set in each stage without `steps`; null: all stages have them. Example: 3"""
    log_every: Positive = 10
    """Steps between two lines of the log; metrics.jsonl has every step. Example: 50"""
    trackers: list[Literal["tensorboard", "wandb"]] = ["tensorboard"]
    """Where metrics go beside metrics.jsonl: `tensorboard`, files in the run folder; `wandb`, Weights & Biases, which
    needs the package wandb and obeys its WANDB_ variables. Example: [tensorboard, wandb]"""
    save_every: Positive = 500
    """Steps between two checkpoints. Example: 1000"""
    keep_last: Positive = 2
    """Number of newest checkpoints that are kept. Example: 5"""
    keep_every: Positive | None = None
    """Interval in steps of checkpoints that are kept for good; null: none but the newest and the best. Example: 5000"""
    save_in_background: bool = False
    """Whether training continues while a checkpoint's files are written, from a copy in host memory."""
    validate_every: Positive = 200
    """Steps between two validations. Example: 500"""
    validation_steps: Positive = 4
    """Global batches of one validation; fewer if the validation data end earlier. Example: 16"""
    patience: Positive | None = None
    """Number of validations without a new best after which a stage ends; null: no limit. Example: 10"""
    best: str | None = None
    """Validation metric that decides which checkpoint is best; null: accuracy if any, else loss. Example: loss"""
    carry_state: Fraction = 0.0
    """Probability that a row starts from the memory with which another row ended a step earlier, in stages that do not
    say another. Example: 0.9"""
    freeze: Literal["base"] | Annotated[list[str], Field(min_length=1)] | None = None
    """Parameters that are not trained: `base`, all but the memory, or patterns of names of an export, where `*` stands
    for anything and `base` may be one of them. Example: ['*.embed_tokens.weight', '*.layers.0.*']"""
    optimizer_groups: list[OptimizerGroup] = []
    """Parameters with a rate or a weight decay of their own. Example: [{match: ['*.memory.*'], lr_scale: 10}]"""
    max_skipped: Positive = 5
    """Number of consecutive skipped steps (non-finite loss or gradients) that ends the run, exit code 1. Example: 10"""
    rollback: Rollback | None = None
    """Return to the last checkpoint, and other samples, when the loss jumps; null: none. Example: {over: 50}"""


def carry_probability(config: TrainConfig, stage: Stage) -> float:
    """Return the probability that a row of a stage starts from the memory of another one."""
    return config.carry_state if stage.carry_state is None else stage.carry_state


class DistillConfig(Section):
    """Distillation from the frozen base, which reads more tokens than a segment, with full attention and no memory."""

    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the divergence KL(base || model) in the training loss; the rest is that of the next token. Example: 1"""
    window: Annotated[int, Field(ge=2)]
    """Tokens that the base reads at once, at least two segments. Windows overlap by half, so that it predicts every
    token from the half of one at least, or from all that is before. Example: 4096"""


class LossConfig(Section):
    """Which segments are scored, in training and validation, and what the model is to come close to in training."""

    skip_first_segment: bool = False
    """Whether the loss leaves out the first segment, which has no memory to read (the authors' choice for text)."""
    last_segment_only: bool = False
    """Whether the loss counts each sample's last segment only."""
    distill: DistillConfig | None = None
    """Distillation from the base's own full attention; the base must be frozen. Example: {weight: 0.5, window: 4096}"""

    @model_validator(mode="after")
    def one_of_them(self) -> "LossConfig":
        """Refuse both: the last segment is never the first where the first is left out."""
        if self.skip_first_segment and self.last_segment_only:
            raise ValueError("loss: set skip_first_segment or last_segment_only, not both")
        return self


class RunConfig(Section):
    """One training run."""

    extensions: list[str] = []
    """Python modules, or entry points, that register tasks, transforms and metrics. Example: [my_module]"""
    model: ModelConfig
    """Base model, memory and segments; retrieval tasks fix segment_tokens. Example: {base: gpt2, num_mem_tokens: 16}"""
    data: DataConfig = DataConfig()
    """Task and its samples. Example: {task: rewrite}"""
    loss: LossConfig = LossConfig()
    """Which segments are scored, and distillation. Example: {skip_first_segment: true}"""
    bptt: BPTTConfig = BPTTConfig()
    """Backward pass through the segments. Example: {states: rebuild}"""
    parallel: ParallelConfig = ParallelConfig()
    """Distribution of one sequence over ranks, and the order of the work. Example: {sp: 8, chunks: 2}"""
    train: TrainConfig = TrainConfig()
    """Training loop: seed, logs, validations, checkpoints. Example: {max_steps: 1000, save_every: 500}"""
    curriculum: Annotated[list[Stage], Field(min_length=1)]
    """Stages of training in their order: sample length, steps, learning rate. Example: [{pairs: 5, steps: 700}]"""
    watchdog: WatchdogConfig = WatchdogConfig()
    """Time limits after which a stuck rank ends the run. Example: {step_s: 1200}"""
    ds_config: dict[str, Any] = {}
    """Batch, precision, optimizer, ZeRO, offload; merged over the --ds_config file. Example: {train_batch_size: 64}"""
    profile: bool = False
    """Whether a timeline of all ranks, a picture and a Chrome trace, is written after the third step."""
    deterministic: bool = False
    """Whether only kernels that give the same bits in every run are used; slower."""
    digests: bool = False
    """Whether digests of all memory states are written, for `python -m armt_dist.digest RUN_A RUN_B`; slow."""

    @model_validator(mode="after")
    def teacher_stays(self) -> "RunConfig":
        """Check that the teacher is frozen, and that no memory carries what it does not read."""
        if self.loss.distill is None:
            return self
        freeze = self.train.freeze
        if self.model.lora is None and freeze != "base" and "base" not in (freeze or ()):
            raise ValueError(
                "loss.distill: the base is its own teacher and must not change; set train.freeze=base, or model.lora"
            )
        if self.data.carry_memory:
            raise ValueError(
                "loss.distill: the base reads no text of earlier steps, which the memory carries; set "
                "data.carry_memory=false"
            )
        return self

    @model_validator(mode="after")
    def every_stage_ends(self) -> "RunConfig":
        """Check that the steps of every stage are given, or follow from the epochs."""
        open_ended = [i for i, stage in enumerate(self.curriculum) if stage.steps is None]
        if open_ended and self.train.epochs is None:
            raise ValueError(
                f"curriculum.{open_ended[0]}.steps: missing; set it, or train.epochs for a finite training set"
            )
        if self.train.epochs is not None and not open_ended:
            raise ValueError(f"train.epochs={self.train.epochs}: every stage has steps; remove it, or a stage's steps")
        return self


def load_run(config: Path, ds_config: Path | None, default_ds_config: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration of the run that would start; its `ds_config` is complete.

    The recipe `config` is merged over the file `ds_config`, or over `default_ds_config` where none was given and the
    recipe does not stand alone (`is_whole`); ``ds_config.key=value`` overrides both. Raises ConfigError.
    """
    of_recipe, of_ds_config = split_overrides(overrides)
    tree = read_tree(config, of_recipe)
    load_extensions(tree.get("extensions"))
    run = validate(RunConfig, tree)
    complete = complete_ds_config(run.ds_config, config, ds_config, default_ds_config, of_ds_config)
    return run.model_copy(update={"ds_config": complete})


def load_extensions(names: object) -> None:
    """Import a run's extensions, which add to its tasks. Other values than a list of names are left to the schema."""
    if names and isinstance(names, list) and all(isinstance(name, str) for name in names):
        # The import loads torch, which a mistake in a configuration without extensions should not wait for.
        from ..data import extensions

        extensions.load_extensions(names)


def resolved(config: RunConfig) -> dict:
    """Return the configuration with its defaults, as plain values."""
    return config.model_dump(mode="json")


def as_yaml(config: RunConfig) -> str:
    """Return the configuration with its defaults as YAML, which --config accepts."""
    return yaml.safe_dump(resolved(config), sort_keys=False)
