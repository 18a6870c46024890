"""What an export publishes of a run, whose folder may be a stranger's: known files, no code, and names without paths.

Whoever loads the export with trust_remote_code runs the Python files in it: they are ours alone.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..config import ConfigError, read_object
from ..records import write_json

# What transformers writes for a configuration and a tokenizer, and is no code.
KNOWN = re.compile(
    r"(generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|preprocessor_config)\.json"
    r"|(merges|vocab)\.txt|chat_template\.(jinja|json)|.*\.(model|tiktoken)"
)
# Larger than any tokenizer.
MOST_BYTES = 2**28
# Keys of these files that make transformers import code, or say where something once was.
CODE = ("auto_map", "custom_generate", "custom_pipelines")
PLACE = ("_name_or_path", "name_or_path")


def copy_known_files(source: Path, target: Path) -> list[str]:
    """Copy the known files of a run's model folder, and return the names of all others but config.json and ours.

    Links are not followed. Raises ConfigError for a known file that is none, or too large, and OSError.
    """
    left_out = []
    for entry in sorted(os.scandir(source), key=lambda entry: entry.name):
        if not KNOWN.fullmatch(entry.name):
            left_out.append(entry.name)
            continue
        if not entry.is_file(follow_symlinks=False) or entry.stat(follow_symlinks=False).st_size > MOST_BYTES:
            raise ConfigError(
                f"run={source}: {entry.name} is no regular file of at most {MOST_BYTES >> 20} MB; put a copy there"
            )
        if entry.name.endswith("_config.json"):
            write_json(target / entry.name, without_code(read_object(Path(entry.path), "run")))
        else:
            shutil.copyfile(entry.path, target / entry.name, follow_symlinks=False)
    return left_out


def without_code(value: Any) -> Any:
    """Return nested mappings without the keys that make transformers import code, and with empty places."""
    if isinstance(value, dict):
        return {key: "" if key in PLACE else without_code(child) for key, child in value.items() if key not in CODE}
    return [without_code(child) for child in value] if isinstance(value, list) else value


def public(value: Any) -> Any:
    """Return nested mappings and lists whose texts name no folder, user or password."""
    if isinstance(value, dict):
        return {key: public(child) for key, child in value.items()}
    if isinstance(value, list):
        return [public(child) for child in value]
    return public_name(value) if isinstance(value, str) else value


def public_name(text: str) -> str:
    """Return a URL without user, password and query, the last part of a path that leads elsewhere, or the text."""
    if "://" in text:
        parts = urlsplit(text)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
    if text.startswith(("/", "~")) or ".." in Path(text).parts:
        return Path(text).name
    return text
