"""The data section of the run configuration, and the task it describes."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..config import ConfigError, Section
from .batch import Task
from .retrieval import Retrieval, RetrievalConfig

# Which section configures which task.
SECTIONS = {"rewrite": "retrieval", "remember": "retrieval"}


class DataConfig(Section):
    """`task` and its own section; the section of another task is an error, not ignored."""

    task: Literal["rewrite", "remember"] = "rewrite"
    seed: Annotated[int, Field(ge=0)] = 42
    retrieval: RetrievalConfig | None = None

    @model_validator(mode="after")
    def sections_fit_the_task(self) -> "DataConfig":
        for section in set(SECTIONS.values()) - {SECTIONS[self.task]}:
            if getattr(self, section) is not None:
                raise ValueError(f"{section} does not belong to task={self.task}; remove it or change task")
        return self


def make_task(
    config: DataConfig,
    segment_tokens: int | None = None,
    vocab_size: int | None = None,
    global_batch: int | None = None,
) -> Task:
    """The task that `config` describes.

    `segment_tokens`: tokens of a segment; retrieval fixes it by its key and value lengths (None, or equal to that).
    `vocab_size`: rows of the model's embedding, None where there is no model yet.
    `global_batch`: rows of a step over all ranks, needed where samples are counted (text).
    Raises ConfigError where these do not fit.
    """
    task = Retrieval(config.retrieval or RetrievalConfig(), config.seed, unique_keys=config.task == "remember")
    if segment_tokens not in (None, task.segment_tokens):
        raise ConfigError(
            f"segment_tokens={segment_tokens}: task={config.task} makes segments of {task.segment_tokens} tokens; "
            f"use {task.segment_tokens} or leave it out"
        )
    if vocab_size is not None and task.vocab_size > vocab_size:
        raise ConfigError(
            f"vocab_size={vocab_size}: the tokenizer of task={config.task} has {task.vocab_size} tokens; "
            f"enlarge the embedding to at least {task.vocab_size} or use another tokenizer"
        )
    return task
