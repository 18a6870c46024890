"""The data section of the run configuration, and the tasks that it can name."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from pydantic import model_validator
from transformers import PreTrainedTokenizerBase

from ..config import ConfigError, Section, Seed, validate
from . import retrieval
from .babilong import task as babilong
from .babilong.task import Babilong, BabilongConfig
from .retrieval import Retrieval, RetrievalConfig
from .task import Run, Task
from .text.task import Text, TextConfig
from .tokenizers import load_tokenizer


class Kind(NamedTuple):
    """How a task is built from the section that configures it, which is one of SCHEMAS."""

    section: str
    tokenizer: Callable[[Any], PreTrainedTokenizerBase]
    build: Callable[[Any, PreTrainedTokenizerBase, Run], Task]


KINDS = {
    "rewrite": Kind("retrieval", retrieval.retrieval_tokenizer, partial(Retrieval, unique_keys=False)),
    "remember": Kind("retrieval", retrieval.retrieval_tokenizer, partial(Retrieval, unique_keys=True)),
    "text": Kind("text", lambda config: load_tokenizer(config.tokenizer), Text),
    "babilong": Kind("babilong", babilong.babilong_tokenizer, Babilong),
}


class DataConfig(Section):
    """`task` and its own section; the section of another task is an error."""

    task: str = "rewrite"
    """Task: rewrite (retrieval, repeated keys), remember (unique), text, babilong, or an extension's. Example: text"""
    seed: Seed = 42
    """Seed of samples and their order. Example: 1"""
    retrieval: RetrievalConfig | None = None
    """Settings of the tasks rewrite and remember. Example: {key_length: 2, symbols: 16}"""
    text: TextConfig | None = None
    """Settings of the task text. Example: {files: benchmarks/data/plays}"""
    babilong: BabilongConfig | None = None
    """Settings of the task babilong. Example: {tasks: [qa1], facts: 4}"""
    options: dict[str, Any] | None = None
    """Settings of a task that an extension registers. Example: {length: 8}"""

    @model_validator(mode="after")
    def sections_fit_the_task(self) -> "DataConfig":
        """Check that there is no section of another task."""
        if self.task not in KINDS:
            raise ValueError(
                f"data.task={self.task}: no such task; one of {', '.join(KINDS)}, or name the module that registers it "
                "in extensions"
            )
        own = field_of(self.task)
        for section in sorted({field_of(task) for task in KINDS} | {"options"}):
            if section != own and getattr(self, section) is not None:
                raise ValueError(f"{section} does not belong to task={self.task}; remove it or change task")
        return self

    @property
    def section(self) -> Section:
        """The section of the task, with its defaults if it was left out."""
        given = getattr(self, field_of(self.task))
        if isinstance(given, Section):
            return given
        return validate(SCHEMAS[KINDS[self.task].section], given or {})


def field_of(task: str) -> str:
    """Return the field of the data section that configures a task: `options` for one of an extension."""
    section = KINDS[task].section
    return section if section in DataConfig.model_fields else "options"


SCHEMAS: dict[str, type[Section]] = {"retrieval": RetrievalConfig, "text": TextConfig, "babilong": BabilongConfig}


def make_task(
    config: DataConfig,
    segment_tokens: int | None = None,
    vocab_size: int | None = None,
    global_batch: int | None = None,
) -> Task:
    """Build the task that `config` describes.

    segment_tokens: tokens of a segment; None or the right number for retrieval, whose key and value lengths fix it.
    vocab_size: rows of the model's embedding; None if there is no model yet.
    global_batch: rows of a step over all ranks and accumulation steps; needed by tasks with finite samples (text).
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
    return kind.build(config.section, tokenizer, Run(config.seed, segment_tokens, global_batch))
