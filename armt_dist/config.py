"""Strict configuration: defaults < YAML file < ``key=value``; an unknown key is an error.

Each room declares its sections of the run configuration in its `sections.py`, without torch; this file only fills one
and describes in one line what is wrong with it.
"""

import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from . import files

Positive = Annotated[int, Field(ge=1)]
# Generators take seeds of 64 bits, and a rank's seed is a multiple of the run's.
Seed = Annotated[int, Field(ge=0, le=2**40)]
USER_ERROR = 2
RANK_0_SPEAKS_S = 15.0
# Of numbers and of texts inside other values in messages.
LARGEST_BITS, LONGEST = 1000, 20_000


class ConfigError(ValueError):
    """A user's mistake. The message is one line that names field, value and remedy."""


class Section(BaseModel):
    """Base of every configuration section: frozen, no unknown keys, defaults validated too.

    The docstring below a field is its description, and may end with "Example: VALUE"; docs/config.md and ``--help KEY``
    show both.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


S = TypeVar("S", bound=Section)


def load_config(schema: type[S], yaml_file: str | Path | None = None, overrides: Iterable[str] = ()) -> S:
    """Fill `schema` from its defaults, then `yaml_file`, then ``a.b=value`` overrides (values are YAML).

    Raises ConfigError for an unreadable file, an unknown key, a wrong type or an override without ``=``.
    """
    return validate(schema, read_tree(yaml_file, overrides))


def read_tree(yaml_file: str | Path | None, overrides: Iterable[str]) -> dict:
    """Read `yaml_file`, or nothing, and set ``a.b=value`` overrides in it. Raises ConfigError as `load_config`."""
    tree = read_yaml(yaml_file) if yaml_file is not None else {}
    for override in overrides:
        assign(tree, override)
    return tree


def validate(schema: type[S], tree: dict) -> S:
    """Validate a nested dict against `schema`; the first problem becomes a one-line ConfigError."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(describe_errors(error.errors(), schema)) from None


def read_yaml(path: str | Path) -> dict:
    """Read a YAML file as a dict (empty file: empty dict). Raises ConfigError naming the file."""
    try:
        tree = files.read_yaml(path)
    except OSError as error:
        raise ConfigError(f"config={path}: {error.strerror}; give a readable YAML file") from None
    except ValueError as error:
        raise ConfigError(f"config={path}: not valid YAML ({one_line(error)})") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"config={path}: expected a mapping of sections, got {type(tree).__name__}")
    return tree


def read_object(path: Path, field: str, remedy: str = "give a readable JSON file") -> dict:
    """Read a JSON object. Raises ConfigError naming `field`, with `remedy` where the file cannot be opened."""
    try:
        found = files.read_json(path)
    except OSError as error:
        raise ConfigError(f"{field}={path}: {error.strerror}; {remedy}") from None
    except ValueError as error:
        raise ConfigError(f"{field}={path}: not valid JSON ({one_line(error)})") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{field}={path}: expected a JSON object, got {type(found).__name__}")
    return found


def assign(tree: dict, override: str) -> None:
    """Set one ``a.b=value`` in a nested dict, in place; the value is parsed as YAML."""
    path, separator, text = override.partition("=")
    keys = path.split(".")
    if not separator or not all(keys) or len(keys) > files.DEPTH:
        raise ConfigError(f"override={one_line(repr(override))}: expected key=value, for example train.max_steps=100")
    node: Any = tree
    for i, key in enumerate(keys[:-1]):
        entry = entry_of(node, key, override, keys[:i])
        if isinstance(node, dict) and node.get(entry) is None:
            node[entry] = {}
        node = node[entry]
    node[entry_of(node, keys[-1], override, keys[:-1])] = parse_value(path, text)


def entry_of(node: Any, key: str, override: str, above: list[str]) -> str | int:
    """Return `key` as `node` takes it: text for a mapping, an index for a list (``curriculum.0.steps``)."""
    if isinstance(node, list):
        if not key.isdecimal() or int(key) >= len(node):
            raise ConfigError(f"{one_line(override)}: {key!r} is not one of the list's 0..{len(node) - 1}")
        return int(key)
    if not isinstance(node, dict):
        raise ConfigError(f"{one_line(override)}: {above[-1]!r} holds {one_line(node)}, not a section")
    return key


def parse_value(path: str, text: str) -> Any:
    """Parse the value of a ``path=text`` override as YAML. Raises ConfigError."""
    try:
        value = files.parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path}={one_line(repr(text))}: not a valid YAML value ({one_line(error)})") from None
    return as_number(value) if isinstance(value, str) else value


def as_number(text: str) -> str | float:
    """Return 1e-4 for ``"1e-4"``, which YAML 1.1 reads as text; any other text unchanged."""
    try:
        return float(text) if text[:1] in "+-.0123456789" else text
    except ValueError:
        return text


def describe_errors(errors: Sequence[ErrorDetails], schema: type[BaseModel]) -> str:
    """Describe the first mistake as ``field=value: what is wrong``, with the known keys for an unknown one.

    A value that fits no type of a union has an error for each of them; those furthest into the value say most.
    """
    first = place_of(errors[0], schema)
    same = [error for error in errors if place_of(error, schema)[: len(first)] == first]
    deepest = max(len(place_of(error, schema)) for error in same)
    error, *others = (error for error in same if len(place_of(error, schema)) == deepest)
    field = ".".join(map(str, place_of(error, schema)))
    message = error["msg"].removeprefix("Value error, ")
    message = " or ".join([message, *(other["msg"].removeprefix("Input should be ") for other in others)])
    if error["type"] == "model_type":
        message = "expected a section of keys"
    if error["type"] == "missing":
        return f"{field}: missing; set it"
    if error["type"] == "extra_forbidden":
        known = ", ".join(known_keys(schema, error["loc"]))
        return f"{field}={one_line(error['input'])}: unknown key; known here: {known}"
    if not field:
        return one_line(message, limit=1000)
    return f"{field}={one_line(error['input'])}: {one_line(message, limit=600)}"


def place_of(error: ErrorDetails, schema: type[BaseModel]) -> tuple[int | str, ...]:
    """Return the path of an error's field, without the types that pydantic puts behind the name of a union's field."""
    *above, last = error["loc"] or [""]
    unknown = error["type"] == "extra_forbidden"
    path = [*above] if unknown else [*error["loc"]]
    found = [part for i, part in enumerate(path) if isinstance(part, int) or part in known_keys(schema, path[: i + 1])]
    return (*found, last) if unknown else (*found,)


def known_keys(schema: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """List the keys that the section around `location` accepts."""
    for part in location[:-1]:
        field = schema.model_fields.get(part) if isinstance(part, str) else None
        candidates = [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        schema = nested[0] if nested else schema
    return sorted(schema.model_fields)


def one_line(value: object, limit: int = 120) -> str:
    """Return any value as text on a single line of at most `limit` characters, without making more text than that."""
    text, length = list[str](), 0
    for part in parts_of(value):
        text.append(part[: 10 * limit])
        length += len(text[-1])
        if length > 10 * limit:
            break
    line = " ".join("".join(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def parts_of(value: object) -> Iterator[str]:
    """Yield the text of a value piece by piece, as str() and repr() write it."""
    if isinstance(value, dict):
        for i, (key, child) in enumerate(value.items()):
            yield ", " if i else "{"
            yield from quoted(key)
            yield ": "
            yield from quoted(child)
        yield "}" if value else "{}"
    elif isinstance(value, list):
        for i, child in enumerate(value):
            yield ", " if i else "["
            yield from quoted(child)
        yield "]" if value else "[]"
    elif isinstance(value, int) and value.bit_length() > LARGEST_BITS:
        # Python refuses to write it.
        yield f"a number of {value.bit_length()} bits"
    else:
        yield str(value)


def quoted(value: object) -> Iterator[str]:
    """Yield the text of a value inside another."""
    if isinstance(value, str):
        yield repr(value[:LONGEST])
    elif isinstance(value, dict | list | int):
        yield from parts_of(value)
    else:
        yield repr(value)


def run_main(main: Callable[[], int | None], rank: int, leave: Callable[[], bool] = lambda: True) -> None:
    """Run a command's `main` and exit: a ConfigError is one line on stderr and exit code 2.

    Rank 0 prints at once. The others wait first: rank 0 may be about to meet the same error, but still in a collective
    that fails if they leave, and a launcher ends all ranks as soon as one has exited. They print if they are still
    alive then: the error was theirs alone. Whatever is wrong is printed before this process leaves the others. `leave`
    returns whether it has left; if not, the process ends without clean-up.
    """
    try:
        code = main() or 0
    except ConfigError as error:
        code, line = USER_ERROR, f"error{f' (rank {rank})' if rank else ''}: {one_line(error, limit=2000)}"
        if rank != 0:
            time.sleep(RANK_0_SPEAKS_S)
        print(line, file=sys.stderr, flush=True)
    if not leave():
        sys.stdout.flush()
        os._exit(code)
    # A Parquet stream that is open when the interpreter ends hangs or aborts it (pyarrow 26, apache/arrow#45214).
    gc.collect()
    sys.exit(code)


@contextmanager
def ended_by_error() -> Iterator[None]:
    """Print any error but a user's mistake, and end the process at once, without clean-up: other ranks may wait."""
    try:
        yield
    except (ConfigError, SystemExit):
        raise
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
