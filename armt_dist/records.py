"""JSON, JSON lines and tables that a run leaves behind: one reader and one writer each."""

import json
import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import files
from .config import ConfigError, one_line

# The resolved configuration: the first file that a run writes, so that a folder with it holds a run.
RUN_CONFIG = "config.yaml"


def check_links(run: Path) -> None:
    """Raise ConfigError for a link or a FIFO in a run folder, maybe a stranger's, before it is written into."""
    for folder, folders, names in os.walk(run):
        for path in (Path(folder, name) for name in (*folders, *names)):
            mode, shown = path.lstat().st_mode, path.relative_to(run)
            if stat.S_ISLNK(mode):
                raise ConfigError(
                    f"out={run}: {shown} is a link, and what is written there would land elsewhere; remove it, or give "
                    "another --out"
                )
            if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
                raise ConfigError(f"out={run}: {shown} is no regular file; remove it")


def read_json(path: Path) -> dict:
    """Return a JSON object; empty if the file is missing, damaged or holds something else."""
    try:
        found = files.read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, content: dict, sort_keys: bool = False) -> None:
    """Write a JSON object for people to read. Raises OSError."""
    path.write_text(json.dumps(content, indent=2, sort_keys=sort_keys) + "\n", encoding="utf-8")


def read_json_lines(path: Path) -> list[dict]:
    """Return the complete records of a file with one JSON object per line. Raises OSError and ValueError.

    A run that was killed, or is still writing, may have left half a line: it is skipped.
    """
    with files.open_regular(path) as content:
        lines = iter(lambda: content.readline(files.MIB), b"")
        return [record_of(line) for line in lines if line.rstrip().endswith(b"}")]


def record_of(line: bytes) -> dict:
    """Return the JSON object in a line. Raises ValueError."""
    found = files.parse_json(line.decode("utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"a line is not an object but {one_line(found)}")
    return found


def read_metrics(run: Path) -> list[dict]:
    """Return the records of the run's metrics.jsonl. Raises ConfigError if there is no readable one."""
    try:
        return read_json_lines(run / "metrics.jsonl")
    except (OSError, ValueError) as error:
        raise ConfigError(f"run={run}: no readable metrics.jsonl ({one_line(error)})") from None


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
