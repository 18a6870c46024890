"""Explains the configuration: docs/config.md, and the text of ``launch/train.py --help``.

    python -m armt_dist.training.config_docs            # writes docs/config.md; a test compares the file

Everything is read from the sections' classes and docstrings; see `config_keys`.
"""

import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path

from ..records import markdown_table
from .config_keys import Key, all_keys, find_key

FILE = Path(__file__).resolve().parents[2] / "docs/config.md"
WIDTH = 100
INTRODUCTION = """\
# Configuration

Written by `python -m armt_dist.training.config_docs` from the docstrings of the configuration classes; change those,
then run it again. `python launch/train.py --help KEY` shows one key; `--show-config` prints the complete configuration
of a run without starting it.

## Where values come from

A run is described by a recipe, the YAML file of `--config` (left out: `launch/configs/default.yaml`), and by
DeepSpeed's JSON file of `--ds_config` (left out: `ds_configs/zero3.json`). From weak to strong:

1. the defaults below;
2. the file of `--ds_config`, for everything under `ds_config`;
3. the recipe; its `ds_config` section is merged over the file, key by key, so that
   `ds_config: {optimizer: {params: {lr: 1.0e-4}}}` changes the rate alone. Another `optimizer.type` than the file's
   replaces the whole optimizer, and a list replaces a list;
4. `key=value` on the command line, for example `train.max_steps=100 ds_config.train_batch_size=64`. The value is YAML
   and replaces what was there: after `ds_config.optimizer.params={lr: 1.0e-4}` the rate is the only parameter.
   `curriculum.0.steps` belongs to the first stage.

A recipe says what is trained (batch, rate), the file how (precision, offload), so the recipe wins, also over a file
that was given by name. A value that both set is therefore changed in the recipe or on the command line.

A `ds_config` section with `zero_optimization.stage` is complete: without `--ds_config` no file is read. `--show-config`
and the `config.yaml` of a run folder have such a section, so that `--config runs/NAME/config.yaml` alone gives the same
configuration. With `--ds_config` as well, the file adds the keys that the section does not have.

An unknown key, or one that would have no effect, is an error in one line with exit code 2, in a recipe's `ds_config`
section as in the file.
"""


def render() -> str:
    """Return the content of docs/config.md."""
    keys = all_keys()
    parts = [INTRODUCTION, "## Run\n", "Keys at the top level.\n", table(below("", keys))]
    for key in keys:
        if key.section is None:
            continue
        level = "#" * (2 + plain_depth(key))
        parts += [f"{level} `{key.path}`\n", f"{about(key)}\n", table(below(key.path, keys))]
    return "\n".join(parts)


def below(path: str, keys: list[Key]) -> list[Key]:
    """Return the keys that stand directly in the section `path`; "" is the top level."""
    return [key for key in keys if key.section_path == path]


def plain_depth(key: Key) -> int:
    """Return how many sections a key stands in."""
    return len([part for part in key.section_path.split(".") if part not in ("", "N")])


def about(key: Key) -> str:
    """Return what a section is: its class's docstring in Markdown, or else the description of its key."""
    doc = inspect.cleandoc(key.section.__doc__) if key.section is not None and key.section.__doc__ else ""
    return " ".join(doc.split()) or key.description


def table(keys: list[Key]) -> str:
    """Return a Markdown table of keys."""
    rows = [
        {
            "key": f"`{key.path}`",
            "type": key.kind,
            "default": f"`{key.default}`" if key.default not in ("required", "its defaults") else key.default,
            "range": key.range,
            "description": key.description,
            "example": f"`{key.assignment}`",
        }
        for key in keys
    ]
    return markdown_table(rows) + "\n"


def help_sections() -> str:
    """Return the sections with one line each, for --help without a key."""
    top = below("", all_keys())
    width = max(len(key.path) for key in top)
    lines = [f"  {key.path.ljust(width)}  {key.description}" for key in top]
    return "\n".join(["configuration (--help SECTION or --help SECTION.KEY explains; all: docs/config.md):", *lines])


def help_key(path: str) -> str:
    """Return the explanation of one key or section. Raises ConfigError for an unknown one, with near matches."""
    return "\n".join(explain(find_key(path)))


def explain(key: Key) -> Iterator[str]:
    """Yield the lines that explain a key; a section's keys follow."""
    yield key.path
    yield from textwrap.wrap(key.description, WIDTH, initial_indent="  ", subsequent_indent="  ")
    for name, value in (
        ("type", key.kind),
        ("default", key.default),
        ("range", key.range),
        ("example", key.assignment),
    ):
        if value:
            yield f"  {name.ljust(7)}  {value}"
    if key.section is None:
        return
    if about(key) != key.description:
        yield from ("", *textwrap.wrap(about(key), WIDTH, initial_indent="  ", subsequent_indent="  "))
    children = [child for child in all_keys() if child.section_path == key.path]
    width = max(len(child.name) for child in children)
    yield from ("", "  keys:")
    yield from (f"    {child.name.ljust(width)}  {child.description}" for child in children)


def main() -> None:
    """Write docs/config.md."""
    FILE.write_text(render(), encoding="utf-8")
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
