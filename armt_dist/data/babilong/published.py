"""The published question sets, read with the `datasets` library, as stories like the generated ones.

RMT-team/babilong (arXiv 2406.10149)  {"input": text with the facts in it, "question": ..., "target": answer}
facebook/babi_qa  (arXiv 1502.05698)  {"story": {"id", "type", "text", "supporting_ids", "answer"}}: lists
                                      with one entry per line; type 0 is a fact, 1 a question on all earlier facts
"""

import json
from collections.abc import Iterable, Iterator

from ...config import ConfigError, one_line
from ..sampling import SPLITS, Split, place
from ..sections import PublishedConfig
from .stories import Story

# `datasets` no longer runs the set's loading script, so the Hub's conversion to Parquet is read.
BABI_QA = "hf://datasets/facebook/babi_qa@refs/convert/parquet/en-10k-{task}/{split}/*.parquet"
BABI_QA_SPLITS = {"train": "train", "validation": "test"}
QUESTION = 1


def load_published(config: PublishedConfig, task: str) -> dict[Split, list[Story]]:
    """Load the stories of one task by split. Raises ConfigError if the set cannot be read or has another format.

    facebook/babi_qa has two splits, and so have files with `{split}` in their name. Elsewhere a hash of each row says
    which split it belongs to, so that all questions on one story do.
    """
    where = f"published.set={config.set} ({task})"
    if config.files is None and config.set == "facebook/babi_qa" or "{split}" in (config.files or ""):
        return {split: stories_of(read_rows(source(config, task, split), where), where) for split in SPLITS}
    rows = read_rows(source(config, task, "train"), where)
    held_out = [place(json.dumps(row, sort_keys=True)) < config.validation_fraction for row in rows]
    return {
        "train": stories_of((row for row, held in zip(rows, held_out, strict=True) if not held), where),
        "validation": stories_of((row for row, held in zip(rows, held_out, strict=True) if held), where),
    }


def source(config: PublishedConfig, task: str, split: Split) -> dict[str, str]:
    """Return the arguments of `datasets.load_dataset`."""
    if config.files is not None:
        files = config.files.replace("{task}", task).replace("{split}", split)
        return {"path": "json", "data_files": files, "split": "train"}
    if config.set == "facebook/babi_qa":
        files = BABI_QA.format(task=task, split=BABI_QA_SPLITS[split])
        return {"path": "parquet", "data_files": files, "split": "train"}
    return {"path": config.set, "name": config.length, "split": task}


def read_rows(arguments: dict[str, str], where: str) -> list[dict]:
    """Read all rows of one file set. Raises ConfigError, whose message begins with `where`."""
    # The import takes a second, which generated stories should not pay.
    import datasets

    try:
        return list(datasets.load_dataset(**arguments, streaming=True))
    # StopIteration: the library's answer to a name that is no pattern.
    except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f"{where}: cannot be read: {one_line(str(error) or repr(error), limit=300)}") from None


def stories_of(rows: Iterable[dict], where: str) -> list[Story]:
    """Return all stories of some rows. Raises ConfigError, whose message begins with `where`, for another format."""
    try:
        return [story for row in rows for story in parse(row)]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where}: a row has another format: {one_line(repr(error))}") from None


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
