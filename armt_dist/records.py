"""Files that a run leaves behind: JSON, metrics.jsonl and Markdown tables, read and written in one place."""

import json
from collections.abc import Iterable
from pathlib import Path

from .config import ConfigError, one_line


def read_records(path: Path) -> list[dict]:
    """The complete lines of metrics.jsonl. Raises ConfigError where there is none."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    except (OSError, ValueError) as error:
        raise ConfigError(f"run={path.parent}: no readable metrics.jsonl ({one_line(error)})") from None


def table(rows: Iterable[dict]) -> str:
    """Markdown; the columns of all rows in order of appearance."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([cell(row.get(name)) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def read_json(path: Path) -> dict:
    """A JSON object; empty where there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
