"""What is wrong with a run, as far as its configuration tells: known in a fraction of a second, without torch.

What only the loaded base model, tokenizer and data tell is checked in `setup`.
"""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..config import ConfigError, one_line
from ..data.lengths import (
    Lengths,
    PairLengths,
    babilong_lengths,
    instruction_lengths,
    mixed_lengths,
    pair_lengths,
    text_lengths,
)
from ..data.sections import BabilongConfig, DataConfig, InstructionsConfig, MixtureConfig, RetrievalConfig, TextConfig
from ..data.text.files import check_files
from ..distributed.launchers import check_groups
from ..hub import check_names
from ..schedule.planned_run import RunTree, batch_sizes, planned_run
from ..zero3.sections import ModelConfig
from .run_config import LossConfig, RunConfig, carry_probability, resolved

# Tokenizers that the tasks build themselves.
BUILT_IN = ("byte", "word")
# What every validation measures; a task with answers measures their accuracy too.
METRICS = ("loss", "token_accuracy")


def check_run(config: RunConfig, out: Path, world: int | None = None) -> None:
    """Check the run folder's name, paths, sizes and the curriculum. Raises ConfigError.

    world: number of ranks; None: not known, so that batch and model are not checked.
    """
    check_out(out)
    if world is not None:
        check_groups(world, config.parallel.sp)
    for part in config.data.parts:
        check_paths(part)
    check_peft(config.model)
    check_trackers(config.train.trackers)
    check_weights(config.model.base)
    check_names(hub_names(config), any(map(fetches_data, config.data.parts)))
    lengths = lengths_of(config.data, getattr(config.model, "segment_tokens", None))
    if lengths is not None:
        check_curriculum(config, lengths)
        if not config.extensions:
            check_best(config.train.best, lengths)
    if world is not None:
        check_sizes(config, world)


def check_out(out: Path) -> None:
    """Check that the run folder exists, or can be made. Raises ConfigError."""
    for folder in (out, *out.absolute().parents):
        try:
            folder.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ConfigError(f"out={out}: {error.strerror}; give --out another folder") from None
        break
    if not folder.is_dir():
        raise ConfigError(f"out={out}: {folder} is not a folder; give --out another one")
    most = os.pathconf(folder, "PC_NAME_MAX")
    for part in out.parts:
        if len(os.fsencode(part)) > most:
            raise ConfigError(f"out={out}: a name in it has more than {most} bytes; shorten it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"out={out}: no permission to write in {folder}; give --out another folder")


def check_paths(data: DataConfig) -> None:
    """Check that the text files exist. Raises ConfigError."""
    section = data.section
    if isinstance(section, TextConfig | InstructionsConfig):
        named = {"files": section.files, "validation_files": section.validation_files}
    elif isinstance(section, BabilongConfig):
        named = {"background": section.background, "validation_background": section.validation_background}
    else:
        return
    for name, entries in named.items():
        if entries is not None:
            check_files(entries, f"data.{data.task}.{name}")


def check_peft(model: ModelConfig) -> None:
    """Check that what adapters need is installed. Raises ConfigError."""
    if model.lora is not None and not is_installed("peft"):
        raise ConfigError("model.lora: needs the package peft; install it with: pip install 'peft>=0.21,<0.22'")


def check_trackers(names: Sequence[str]) -> None:
    """Check that what trackers need is installed. Raises ConfigError."""
    if "wandb" in names and not is_installed("wandb"):
        raise ConfigError(
            "train.trackers=wandb: needs the package wandb; install it with: pip install 'wandb>=0.31,<0.32', or leave "
            "it out"
        )


def is_installed(package: str) -> bool:
    """Tell whether a package is there, and is more than a folder of that name, such as the one that wandb writes."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def check_weights(base: str | None) -> None:
    """Check that the weights in a base model's folder are whole: their headers tell how long they are.

    Raises ConfigError.
    """
    for file in sorted(Path(base).glob("*.safetensors")) if base is not None else ():
        try:
            with safe_open(file, "numpy"):
                pass
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"model.base={base}: {file.name} cannot be read ({one_line(error)}); fetch or copy it again"
            ) from None


def hub_names(config: RunConfig) -> dict[str, str]:
    """Return what may have to be fetched from the Hugging Face Hub, by field."""
    names = {} if config.model.base is None else {"model.base": config.model.base}
    for part in config.data.parts:
        section = part.section
        if isinstance(section, TextConfig | BabilongConfig | InstructionsConfig) and section.tokenizer not in BUILT_IN:
            names[f"data.{part.task}.tokenizer"] = section.tokenizer
    return names


def fetches_data(data: DataConfig) -> bool:
    """Return whether a data set may have to be fetched from the Hub."""
    section = data.section
    if isinstance(section, TextConfig | InstructionsConfig) and section.dataset is not None:
        return section.dataset.data_files is None and not Path(section.dataset.name).exists()
    return isinstance(section, BabilongConfig) and section.published is not None and section.published.files is None


def check_sizes(config: RunConfig, world: int) -> None:
    """Check the batch and, unless it has to be fetched or is an extension's, what the model is made of.

    Raises ConfigError.
    """
    base, sp = config.model.base, config.parallel.sp
    batch_sizes(config.ds_config, world // sp)
    if (base is None or Path(base, "config.json").is_file()) and config.data.options is None:
        tree = resolved(config)
        if base is None:
            # Unless the tokenizer says more.
            tree["model"]["base_config"] = {"vocab_size": 1, **tree["model"]["base_config"]}
        planned_run(RunTree(tree, config.ds_config), world)


def lengths_of(data: DataConfig, segment_tokens: int | None) -> Lengths | None:
    """Return the lengths of the samples; None for a task of an extension. Raises ConfigError as the task would."""
    section = data.section
    if isinstance(section, RetrievalConfig):
        return pair_lengths(section, data.task == "remember", segment_tokens)
    if isinstance(section, TextConfig):
        return text_lengths(section, segment_tokens)
    if isinstance(section, InstructionsConfig):
        return instruction_lengths(section, segment_tokens)
    if isinstance(section, MixtureConfig):
        parts = [lengths_of(part, segment_tokens) for part in section.sections]
        known = [part for part in parts if part is not None]
        return mixed_lengths(known) if len(known) == len(parts) else None
    return babilong_lengths(segment_tokens) if isinstance(section, BabilongConfig) else None


def check_best(best: str | None, lengths: Lengths, others: tuple[str, ...] = ()) -> None:
    """Check the metric that decides which checkpoint is best; others: metrics of extensions. Raises ConfigError."""
    known = [*(["accuracy"] if lengths.measure == "accuracy" else []), *METRICS, *others]
    if best is not None and best not in known:
        raise ConfigError(f"train.best={best}: no such validation metric; choose from {', '.join(known)}")


def check_curriculum(config: RunConfig, lengths: Lengths) -> None:
    """Check that the task can make the samples of every stage, and that they fill the ranks. Raises ConfigError."""
    name = f"task={config.data.task}"
    check_carried(config, lengths)
    for i, stage in enumerate(config.curriculum):
        if stage.unit != lengths.unit:
            raise ConfigError(f"curriculum.{i}.{stage.unit}={stage.length}: {name} counts {lengths.unit}")
        lengths.sequence_tokens(stage.length)
        for key, value in stage.keys.items():
            if value is not None and lengths.unit != "pairs":
                raise ConfigError(f"curriculum.{i}.{key}={value}: {name} has no keys; remove it")
        if isinstance(lengths, PairLengths):
            lengths.key_count(stage.length, **stage.keys)
        if stage.until is not None and lengths.measure != "accuracy":
            raise ConfigError(f"curriculum.{i}.until: {name} has no accuracy; use patience")
        segments = -(-lengths.sequence_tokens(stage.difficulty.minimum) // lengths.segment_tokens)
        check_blocks(config, i, segments)
        check_loss(config.loss, i, segments)


def check_carried(config: RunConfig, lengths: Lengths) -> None:
    """Check that rows may start from the memory of others, or continue. Raises ConfigError."""
    memory = config.data.carry_memory
    for i, stage in enumerate(config.curriculum):
        carry = carry_probability(config.train, stage)
        name = "train.carry_state" if stage.carry_state is None else f"curriculum.{i}.carry_state"
        if carry and memory:
            raise ConfigError(
                f"{name}={carry}: with data.carry_memory=true every row continues its own text; set one of them"
            )
        if carry and not getattr(lengths, "carries", True):
            raise ConfigError(
                f"{name}={carry}: data.task={config.data.task} forbids it, as its answers depend on all that was read "
                "before; set 0"
            )
        if memory and stage.at_least != 1:
            raise ConfigError(
                f"curriculum.{i}.at_least={stage.at_least}: with data.carry_memory=true all steps of a stage read as "
                "many segments; set 1.0"
            )


def check_blocks(config: RunConfig, stage: int, segments: int) -> None:
    """Check that the shortest samples of a stage have a segment for every block. Raises ConfigError."""
    sp, rounds = config.parallel.sp, config.parallel.rounds
    if segments < sp * rounds:
        raise ConfigError(
            f"parallel.sp={sp} x parallel.rounds={rounds} = {sp * rounds} blocks: curriculum.{stage} may draw samples "
            f"of {segments} segments; raise its at_least, or lower sp or rounds"
        )


def check_loss(loss: LossConfig, stage: int, segments: int) -> None:
    """Raise ConfigError where the shortest samples of a stage, of `segments` segments, would have no scored token."""
    if loss.skip_first_segment and segments < 2:
        raise ConfigError(
            f"loss.skip_first_segment=true: curriculum.{stage} may draw samples of one segment, which would not be "
            "scored at all; raise its at_least"
        )
