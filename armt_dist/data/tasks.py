"""The tasks that the data section of a run configuration can name."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..config import ConfigError
from . import mixture, retrieval
from .babilong import task as babilong
from .babilong.task import Babilong
from .instructions.task import Instructions
from .retrieval import Retrieval
from .sections import DataConfig, MixtureConfig
from .task import Run, Task
from .text.task import Text
from .tokenizers import load_tokenizer


class Kind(NamedTuple):
    """How a task is built from the section that configures it, its entry in `sections.SCHEMAS`."""

    tokenizer: Callable[[Any], PreTrainedTokenizerBase]
    build: Callable[[Any, PreTrainedTokenizerBase, Run], Task]


def mixture_tokenizer(config: MixtureConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer of all parts. Raises ConfigError if they differ."""
    return mixture.common_tokenizer([KINDS[part.task].tokenizer(part.section) for part in config.sections])


def build_mixture(config: MixtureConfig, tokenizer: PreTrainedTokenizerBase, run: Run) -> Task:
    """Build the tasks of a mixture, and the mixture. Raises ConfigError as they do."""
    tasks, names = [], []
    for i, part in enumerate(config.sections):
        # Parts of one kind would otherwise draw alike.
        tasks.append(KINDS[part.task].build(part.section, tokenizer, run._replace(seed=run.seed + i)))
        names.append(f"parts.{i} ({part.task})")
    return mixture.Mixture(names, tasks, config.weights, run)


KINDS = {
    "rewrite": Kind(retrieval.retrieval_tokenizer, partial(Retrieval, unique_keys=False)),
    "remember": Kind(retrieval.retrieval_tokenizer, partial(Retrieval, unique_keys=True)),
    "text": Kind(lambda config: load_tokenizer(config.tokenizer), Text),
    "babilong": Kind(babilong.babilong_tokenizer, Babilong),
    "instructions": Kind(lambda config: load_tokenizer(config.tokenizer), Instructions),
    "mixture": Kind(mixture_tokenizer, build_mixture),
}


def make_task(
    config: DataConfig,
    segment_tokens: int | None = None,
    vocab_size: int | None = None,
    global_batch: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Task:
    """Build the task that `config` describes.

    segment_tokens: tokens of a segment; None or the right number for retrieval, whose key and value lengths fix it.
    vocab_size: rows of the model's embedding; None if there is no model yet.
    global_batch: rows of a step over all ranks and accumulation steps; needed by tasks with finite samples (text).
    progress: called with a line while tokenising texts gets on.
    Raises ConfigError if these do not fit together or the data cannot be read.
    """
    kind = KINDS[config.task]
    tokenizer = kind.tokenizer(config.section)
    # Checked first: reading texts may take minutes.
    if vocab_size is not None and len(tokenizer) > vocab_size:
        raise ConfigError(
            f"vocab_size={vocab_size}: the tokenizer of task={config.task} has {len(tokenizer)} tokens; "
            f"enlarge the embedding to at least {len(tokenizer)} or use another tokenizer"
        )
    run = Run(config.seed, segment_tokens, global_batch, config.carry_memory, progress)
    return kind.build(config.section, tokenizer, run)
