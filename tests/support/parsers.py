"""Every parser of ours that reads what others wrote, as a function of bytes: it returns, or raises ConfigError.

Seeds are in tests/fuzz_corpus/NAME, beside the inputs that once made a parser fail.
"""

import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from armt_dist.checkpoint.folder import read_manifest
from armt_dist.config import ConfigError, assign, read_object, read_yaml, validate
from armt_dist.data.babilong.published import stories_of
from armt_dist.data.text.files import read_text
from armt_dist.distributed.launchers import discover
from armt_dist.evaluation.exported import read_task
from armt_dist.evaluation.run_report import write_run_report
from armt_dist.monitoring.lease import Held
from armt_dist.schedule.planned_run import RunTree, planned_run
from armt_dist.training.progress import Progress
from armt_dist.training.run_config import RunConfig, load_run
from armt_dist.zero3.ds_config import read_ds_config

CORPUS = Path(__file__).parents[1] / "fuzz_corpus"
NO_DS_CONFIG = Path("none.json")


def in_file(name: str, parse: Callable[[Path], object]) -> Callable[[bytes], object]:
    """Return a parser of bytes from one that reads a file."""

    def parser(content: bytes) -> object:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(content)
            return parse(path)

    return parser


def text_of(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")


def environment(content: bytes) -> dict[str, str]:
    """Return the variables that lines of NAME=VALUE give."""
    lines = (line.partition("=") for line in text_of(content).splitlines())
    return {name: value for name, separator, value in lines if separator}


def override(content: bytes) -> object:
    tree = {"model": {"base": "gpt2"}, "curriculum": [{"pairs": 3, "steps": 2}]}
    assign(tree, text_of(content))
    return validate(RunConfig, tree)


def progress(content: bytes) -> object:
    try:
        saved = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return Progress.restored(saved) if isinstance(saved, dict) else None


def rows(content: bytes) -> object:
    try:
        found = [json.loads(line) for line in content.splitlines()]
    except (ValueError, RecursionError):
        return None
    return stories_of(found, "rows") if all(isinstance(row, dict) for row in found) else None


def plan(path: Path) -> object:
    return planned_run(RunTree(read_yaml(path), {"train_batch_size": 8}), 2)


PARSERS: dict[str, Callable[[bytes], object]] = {
    "recipe": in_file("recipe.yaml", lambda path: load_run(path, None, NO_DS_CONFIG)),
    "override": override,
    "plan": in_file("recipe.yaml", plan),
    "json": in_file("file.json", lambda path: read_object(path, "ds_config")),
    "ds_config": in_file("ds.json", read_ds_config),
    "manifest": in_file("manifest.json", lambda path: read_manifest(path.parent)),
    "progress": progress,
    "metrics": in_file("metrics.jsonl", lambda path: write_run_report(path.parent)),
    "task": in_file("armt_task.json", lambda path: read_task(path.parent, None, [])),
    "lease": Held.decode,
    "launcher": lambda content: discover(environment(content)),
    "text": in_file("a.txt", read_text),
    "stories": rows,
}


def run_parser(name: str, content: bytes) -> None:
    """Parse `content`. Raises whatever is not a ConfigError."""
    with suppress(ConfigError):
        PARSERS[name](content)
