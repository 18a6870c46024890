"""The published question sets, through the `datasets` library, as the same stories that `babi` tells.

RMT-team/babilong (arXiv 2406.10149)  {"input": text with the facts in it, "question": ..., "target": answer}
facebook/babi_qa  (arXiv 1502.05698)  {"story": {"id", "type", "text", "supporting_ids", "answer"}}: lists of one
                                      entry a line; type 0 is a fact, 1 a question on all facts before it
"""

from collections.abc import Iterator
from typing import Literal

from ...config import ConfigError, Section, one_line
from ..sampling import Split
from .stories import Story

# The set has a loading script, which `datasets` no longer runs; this is the Hub's own conversion of it.
BABI_QA = "hf://datasets/facebook/babi_qa@refs/convert/parquet/en-10k-{task}/{split}/*.parquet"
BABI_QA_SPLITS = {"train": "train", "validation": "test"}
QUESTION = 1


class PublishedConfig(Section):
    """Which set; `files` are copies of it on this machine (JSON), with ``{task}`` in the name for the task."""

    set: Literal["RMT-team/babilong", "facebook/babi_qa"]
    """Name of the set on the Hugging Face Hub. Example: facebook/babi_qa"""
    length: str = "0k"
    """Configuration of RMT-team/babilong: 0k (facts alone), 1k, 2k, 4k, ... 1M tokens. Example: 4k"""
    files: str | None = None
    """Local JSON copies of the set, with `{task}` for the task's name. Example: babi/{task}.jsonl"""


def load_published(config: PublishedConfig, task: str, split: Split) -> list[Story]:
    """All stories of one task. Raises ConfigError where the set cannot be read or has another format."""
    # Its import takes a second that generated stories should not pay.
    import datasets

    if config.files is not None:
        arguments = {"path": "json", "data_files": config.files.format(task=task), "split": "train"}
    elif config.set == "facebook/babi_qa":
        files = BABI_QA.format(task=task, split=BABI_QA_SPLITS[split])
        arguments = {"path": "parquet", "data_files": files, "split": "train"}
    else:
        arguments = {"path": config.set, "name": config.length, "split": task}
    try:
        rows = list(datasets.load_dataset(**arguments, streaming=True))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = one_line(error, limit=300)
        raise ConfigError(f"published.set={config.set} ({task}): cannot be read: {reason}") from None
    try:
        return [story for row in rows for story in parse(row)]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"published.set={config.set} ({task}): a row is not in its format: {error!r}") from None


def parse(row: dict) -> Iterator[Story]:
    """The stories of one row in either format. A BABILong input is one long fact without supporting ones."""
    if "story" in row:
        yield from parse_babi_qa(row["story"])
    else:
        yield Story([row["input"].strip()], row["question"].strip(), row["target"].strip(), [])


def parse_babi_qa(story: dict) -> Iterator[Story]:
    """One story for each question, with the facts told before it."""
    facts: list[str] = []
    number: dict[str, int] = {}
    for line, kind in enumerate(story["type"]):
        text = story["text"][line].strip()
        if kind == QUESTION:
            supporting = sorted(number[line_id] for line_id in story["supporting_ids"][line])
            yield Story(list(facts), text, story["answer"][line], supporting)
        else:
            number[story["id"][line]] = len(facts)
            facts.append(text)
