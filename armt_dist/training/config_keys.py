"""Every key of the run configuration as a row: type, default, range, description and example, read from the sections.

A section's class is the only source. The exception is the model section, whose fields are those of ARMTFields: their
defaults, ranges and docstrings stand there.
"""

import ast
import inspect
import json
import shlex
from collections.abc import Iterator
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..config import ConfigError
from ..model.configuration_armt import KNOWN, MEMORIES
from ..model.fields import LEAST, ARMTFields
from ..zero3.ds_config_keys import DsConfigKeys, OpenSection
from ..zero3.sections import BaseSection
from .run_config import RunConfig

EXAMPLE = "Example:"
# The entry of a list, in a key's path: curriculum.N.steps.
ENTRY = "N"
NAMES = {int: "integer", float: "number", bool: "true or false", str: "text", dict: "mapping", NoneType: "null"}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


class Key(NamedTuple):
    """One key: where it stands and what it takes, as text."""

    path: str
    kind: str
    default: str
    range: str
    description: str
    example: str
    section: type[BaseModel] | None  # the keys below it
    open: bool  # whether keys that are not listed may stand below it
    annotation: Any

    @property
    def name(self) -> str:
        """Return its name in its section."""
        return self.path.rpartition(".")[2]

    @property
    def section_path(self) -> str:
        """Return the path of the section that it stands in; "" at the top level."""
        return self.path.rpartition(".")[0].removesuffix(f".{ENTRY}")

    @property
    def assignment(self) -> str:
        """Return the example as an argument of launch/train.py."""
        return shlex.quote(f"{self.path.replace(f'.{ENTRY}.', '.0.')}={self.example}")


def all_keys() -> list[Key]:
    """Return every key in the order of the sections, a section before what stands in it."""
    return list(keys_of(RunConfig))


def keys_of(schema: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Yield the keys of a section and of those below it."""
    armt = docs_of(ARMTFields) if issubclass(schema, BaseSection) else {}
    for name, field in schema.model_fields.items():
        path = f"{prefix}{name}"
        key = armt_key(path, name, armt[name]) if name in armt and not field.description else field_key(path, field)
        if path == "ds_config":
            key = key._replace(section=DsConfigKeys, kind="section", open=False)
        yield key
        if key.section is not None:
            is_list = key.kind.startswith("list")
            yield from keys_of(key.section, f"{path}.{ENTRY}." if is_list else f"{path}.")


def field_key(path: str, field: FieldInfo) -> Key:
    """Describe one field of a section."""
    annotation = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    kinds = [kind for kind, _ in leaves(annotation)]
    description, example = split_doc(field.description or "")
    default = "required" if field.is_required() else as_text(field.get_default(call_default_factory=True))
    limits = ", ".join(limit for kind, metadata in leaves(annotation) for limit in limits_of(kind, metadata))
    example = example or other_value(annotation, None if field.is_required() else field.default)
    section = next((kind for kind in kinds if is_section(kind)), None)
    is_open = any(kind is dict or (is_section(kind) and issubclass(kind, OpenSection)) for kind in kinds)
    return Key(path, type_text(annotation), default, limits, description, example, section, is_open, annotation)


def armt_key(path: str, name: str, doc: str) -> Key:
    """Describe one field of ARMTFields as a key of the model section."""
    annotation, default = ARMTFields.__annotations__[name], getattr(ARMTFields, name)
    limits = [f"≥ {LEAST[name]}"] if name in LEAST else []
    limits += [", ".join(KNOWN[name])] if name in KNOWN else []
    owners = [kind for kind, memory in MEMORIES.items() if name in memory.own_fields]
    limits += [f"only memory_kind={', '.join(owners)}"] if owners else []
    limits += [f"not memory_kind={kind}" for kind, memory in MEMORIES.items() if name in memory.refused_fields]
    description, example = split_doc(doc)
    others = [choice for choice in KNOWN.get(name, ()) if choice != default]
    example = example or (others[0] if others else other_value(annotation, default))
    kind = "choice" if name in KNOWN else type_text(annotation)
    return Key(path, kind, as_text(default), "; ".join(limits), description, example, None, False, annotation | None)


def docs_of(schema: type) -> dict[str, str]:
    """Return the docstrings below the annotated fields of a class, by field."""
    (body,) = ast.parse(inspect.getsource(schema)).body
    assert isinstance(body, ast.ClassDef), f"{schema} is a class"
    found = {}
    for field, doc in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(doc, ast.Expr):
            found[field.target.id] = inspect.cleandoc(str(ast.literal_eval(doc.value)))
    return found


def split_doc(doc: str) -> tuple[str, str]:
    """Split a field's docstring into its description and the example at its end, if any."""
    description, _, example = " ".join(doc.split()).partition(EXAMPLE)
    return description.strip(), example.strip()


def is_section(kind: Any) -> bool:
    """Tell whether a type is a section."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def leaves(annotation: Any, metadata: tuple = ()) -> Iterator[tuple[Any, tuple]]:
    """Yield the plain types of an annotation with the constraints on them; a list before its entries."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        extra = [one for more in arguments[1:] for one in (more.metadata if isinstance(more, FieldInfo) else [more])]
        yield from leaves(arguments[0], (*metadata, *extra))
    elif origin in (Union, UnionType):
        for argument in arguments:
            yield from leaves(argument, metadata)
    elif origin is list:
        yield list, metadata
        yield from leaves(arguments[0])
    else:
        yield (annotation if origin is Literal else origin or annotation), metadata


def type_text(annotation: Any) -> str:
    """Name an annotation for people."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(map(type_text, arguments))
    if origin is list:
        return f"list of {type_text(arguments[0]).replace('section', 'sections')}"
    if origin is Literal:
        return "choice"
    return "section" if is_section(annotation) else NAMES[origin or annotation]


def limits_of(kind: Any, metadata: tuple) -> Iterator[str]:
    """Yield the limits of one plain type as text."""
    if get_origin(kind) is Literal:
        yield ", ".join(map(str, get_args(kind)))
    for constraint in metadata:
        for name, sign in BOUNDS.items():
            if getattr(constraint, name, None) is not None:
                yield f"{sign} {getattr(constraint, name)}"
        if kind is list and getattr(constraint, "min_length", None):
            yield "not empty"


def other_value(annotation: Any, default: Any) -> str:
    """Return an example of a value that is not the default; empty where the type tells none."""
    choices = [choice for kind, _ in leaves(annotation) if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices:
        return str(next((choice for choice in choices if choice != default), choices[0]))
    if isinstance(default, bool):
        return as_text(not default)
    return as_text(2 * default) if isinstance(default, int | float) else ""


def as_text(value: Any) -> str:
    """Return a value as YAML on one line; a section's defaults stand with its keys."""
    if isinstance(value, BaseModel):
        return "its defaults"
    return value if isinstance(value, str) else json.dumps(value)


def find_key(path: str) -> Key:
    """Return a key by its path, in which entries of lists may be numbered. Raises ConfigError with near matches."""
    keys = {plain_path(key.path): key for key in all_keys()}
    wanted = plain_path(path)
    if wanted in keys:
        return keys[wanted]
    above = wanted
    while "." in above:
        above = above.rpartition(".")[0]
        if above in keys and keys[above].open:
            return keys[above]
    name = wanted.rpartition(".")[2]
    near = [other for other in keys if other.rpartition(".")[2] == name]
    near += [other for other in get_close_matches(wanted, keys, n=3) if other not in near]
    hint = f"did you mean {', '.join(keys[other].path for other in near[:5])}?" if near else "see docs/config.md"
    raise ConfigError(f"help={path}: no such key; {hint}")


def plain_path(path: str) -> str:
    """Return a key's path without the entries of lists."""
    return ".".join(part for part in path.split(".") if part != ENTRY and not part.isdecimal())
