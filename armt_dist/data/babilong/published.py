"""The published question sets, read with the `datasets` library, as stories like the generated ones.

RMT-team/babilong (arXiv 2406.10149)  {"input": text with the facts in it, "question": ..., "target": answer}
facebook/babi_qa  (arXiv 1502.05698)  {"story": {"id", "type", "text", "supporting_ids", "answer"}}: lists
                                      with one entry per line; type 0 is a fact, 1 a question on all earlier facts
"""

from collections.abc import Iterator
from typing import Literal

from ...config import ConfigError, Section, one_line
from ..sampling import Split
from .stories import Story

# `datasets` no longer runs the set's loading script, so the Hub's conversion to Parquet is read.
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
    """Load all stories of one task. Raises ConfigError if the set cannot be read or has another format."""
    # The import takes a second, which generated stories should not pay.
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
        raise ConfigError(f"published.set={config.set} ({task}): a row has another format: {error!r}") from None


def parse(row: dict) -> Iterator[Story]:
    """Yield the stories of one row in either format. A BABILong input counts as one long fact."""
    if "story" in row:
        yield from parse_babi_qa(row["story"])
    else:
        yield Story([row["input"].strip()], row["question"].strip(), row["target"].strip(), [])


def parse_babi_qa(story: dict) -> Iterator[Story]:
    """Yield one story for each question, with the facts before it."""
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
