"""JSON, JSON lines and tables that a run leaves behind: one reader and one writer each."""

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from . import files
from .config import ConfigError, one_line

# The resolved configuration: the first file that a run writes, so that a folder with it holds a run.
RUN_CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
# Where wandb keeps each run in a folder of its own, new at every start, with links to its logs.
WANDB = "wandb"
# Bytes that are read at a time from the end of a file.
BLOCK = 2**16


def check_links(run: Path) -> None:
    """Raise ConfigError for a link or a FIFO in a run folder, maybe a stranger's, before it is written into."""
    for folder, folders, names in os.walk(run):
        for path in (Path(folder, name) for name in (*folders, *names)):
            try:
                mode, shown = path.lstat().st_mode, path.relative_to(run)
            except FileNotFoundError:
                # Another rank ends, and has removed what only lives as long as it does.
                continue
            if stat.S_ISLNK(mode):
                raise ConfigError(
                    f"out={run}: {shown} is a link, and what is written there would land elsewhere; remove it, or give "
                    "another --out"
                )
            if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
                raise ConfigError(f"out={run}: {shown} is no regular file; remove it")
        if Path(folder) == run / WANDB:
            folders.clear()


def read_json(path: Path) -> dict:
    """Return a JSON object; empty if the file is missing, damaged or holds something else."""
    try:
        found = files.read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, content: dict, sort_keys: bool = False) -> None:
    """Write a JSON object for people to read, at once. Raises OSError."""
    files.write_atomically(path, json.dumps(content, indent=2, sort_keys=sort_keys) + "\n")


def read_json_lines(path: Path) -> Iterator[dict]:
    """Yield the complete records of a file with one JSON object per line. Raises OSError and ValueError.

    A run that was killed, or is still writing, may have left half a line: it is skipped.
    """
    with files.open_regular(path) as content:
        for line in iter(lambda: content.readline(files.MIB), b""):
            if is_complete(line):
                yield record_of(line)


def is_complete(line: bytes) -> bool:
    """Tell whether a line may hold a whole record."""
    return line.rstrip().endswith(b"}")


def record_of(line: bytes) -> dict:
    """Return the JSON object in a line. Raises ValueError."""
    found = files.parse_json(line.decode("utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"a line is not an object but {one_line(found)}")
    return found


def read_metrics(run: Path) -> Iterator[dict]:
    """Yield the records of the run's metrics.jsonl. Raises ConfigError if there is no readable one."""
    with readable_metrics(run):
        yield from read_json_lines(run / METRICS)


def cut_metrics(run: Path, done: int) -> None:
    """Cut the run's metrics.jsonl, if there is one, after the last record of its first `done` steps.

    What precedes that record is neither read nor written, also where it tells of later steps, which a rollback undid.
    A process that is killed here leaves the file as it was before or after. Raises ConfigError if it is not readable.
    """
    path = run / METRICS
    if not path.exists():
        return
    with readable_metrics(run), files.open_regular(path) as content:
        size = os.fstat(content.fileno()).st_size
        ends = (end for end, line in lines_backwards(content, size) if is_complete(line) and is_of(line, done))
        end = next(ends, -1)
        # With its line end, which is missing only where a process was killed before it.
        os.truncate(path, min(end + 1, size))
    if end == size:
        with path.open("ab") as content:
            content.write(b"\n")


@contextmanager
def readable_metrics(run: Path) -> Iterator[None]:
    """Turn the errors of reading metrics.jsonl into ConfigError."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ConfigError(f"run={run}: no readable {METRICS} ({one_line(error)})") from None


def is_of(line: bytes, done: int) -> bool:
    """Tell whether the record in a line is of one of the first `done` steps. Raises ValueError."""
    step = record_of(line).get("step")
    return isinstance(step, int) and step <= done


def lines_backwards(content: BinaryIO, size: int) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file of `size` bytes, last first, each after the place where it ends.

    A line of more than a MiB comes in parts.
    """
    start, rest = size, b""
    while start:
        length = min(BLOCK, start)
        start -= length
        content.seek(start)
        block = content.read(length) + rest
        end = start + len(block)
        rest, *lines = block.split(b"\n")
        for line in reversed(lines):
            yield end, line
            end -= len(line) + 1
        if len(rest) > files.MIB:
            yield end, rest
            rest = b""
    yield len(rest), rest


def markdown_table(rows: Iterable[dict]) -> str:
    """Format rows as a Markdown table; its columns are the keys of all rows in order of first appearance."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([format_cell(row.get(name)) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def format_cell(value: object) -> str:
    """Format a value for a Markdown cell: four digits of a float, JSON for a mapping or list."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list | tuple | bool) else str(value)
    return text.replace("|", "\\|")


def markdown_text(value: object) -> str:
    """Return any value on one line that Markdown shows as it is, for names and values that others have chosen.

    In a cell of a table `format_cell` escapes the bars.
    """
    line = one_line("".join(c if c.isprintable() else " " for c in str(value)), limit=1000)
    return re.sub(r"([\\`<\[$*])", r"\\\1", line)


def code_block(text: str, language: str) -> str:
    """Return a fenced block of Markdown, with a fence that the text does not contain."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}{fence}"


def text_table(lines: Sequence[Sequence[str]]) -> str:
    """Format cells as right-aligned columns for a terminal; the first line is the header."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
