"""Reads files that a stranger may have written: regular files only, and YAML and JSON of limited extent.

A FIFO would be waited for, a few aliases of YAML stand for gigabytes, and deep nesting exhausts Python's stack. Whoever
calls this turns OSError and ValueError, whose texts are short, into a line that names the field. Files of our own are
written whole or not at all.
"""

import errno
import json
import os
import stat
from collections import Counter
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import yaml

MIB = 2**20
# Of a JSON file: a manifest has an entry for each file of each rank.
JSON_BYTES = 64 * MIB
YAML_BYTES = MIB
# Values after aliases have been replaced by what they stand for; YAML is read by Python code, ten times as slowly.
JSON_NODES, YAML_NODES = 1_000_000, 50_000
# A long text counts as one value for each of so many characters, since aliases repeat it.
TEXT_NODE = 100
DEPTH = 50
DIGITS = 100


def open_regular(path: str | Path) -> BufferedReader:
    """Open a file to read its bytes. Raises OSError, also for what is no regular file, which is never waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_bytes(path: str | Path, most: int = JSON_BYTES) -> bytes:
    """Return the content of a regular file of at most `most` bytes. Raises OSError."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(most + 1) if size <= most else b""
    if max(size, len(content)) > most:
        raise OSError(errno.EFBIG, f"more than {most} bytes", str(path))
    return content


def read_text(path: str | Path, most: int = JSON_BYTES) -> str:
    """Return the text of a regular file of at most `most` bytes of UTF-8. Raises OSError and ValueError."""
    return read_bytes(path, most).decode("utf-8")


def write_atomically(path: Path, text: str) -> None:
    """Write a file that holds either the old or the new content at any moment.

    Raises OSError, for example on a full disk, which leaves the old content.
    """
    staged = path.with_name(f".{path.name}.tmp")
    with staged.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)
    sync(path.parent)


def sync(folder: Path) -> None:
    """Make renames in `folder` durable, if the file system supports it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file. Raises OSError and ValueError."""
    return parse_json(read_text(path))


def parse_json(text: str) -> Any:
    """Return the value of a JSON text. Raises ValueError, also for a key given twice and for what is too large."""
    # Each value but the first follows one of these, so they are no fewer than the values.
    if text.count(",") + text.count("[") + text.count("{") > JSON_NODES:
        raise ValueError(f"more than {JSON_NODES} values")
    try:
        found = json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise ValueError(f"nested more than {DEPTH} deep") from None
    check_depth(found, DEPTH)
    return found


def once(pairs: list[tuple[str, Any]]) -> dict:
    """Return a JSON object. Raises ValueError for a key that is given twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {name[:TEXT_NODE]!r} is given twice")
    return found


def check_depth(value: Any, left: int) -> None:
    """Raise ValueError for mappings and lists that are nested more than `left` deep."""
    if isinstance(value, dict | list):
        if left == 0:
            raise ValueError(f"nested more than {DEPTH} deep")
        for child in value.values() if isinstance(value, dict) else value:
            check_depth(child, left - 1)


def read_yaml(path: str | Path) -> Any:
    """Return the content of a YAML file. Raises OSError and ValueError."""
    return parse_yaml(read_text(path, YAML_BYTES))


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text. Raises ValueError, also for a key given twice and for what is too large."""
    try:
        return yaml.load(text, Limited)
    # For values that do not fit their tags, such as `!!int ""`, the reader raises many exceptions.
    except Exception as error:
        raise ValueError(str(error)) from None


class Extent(NamedTuple):
    """Values in a node, and how deep they are nested, after aliases have been replaced."""

    nodes: int
    depth: int


class Limited(yaml.SafeLoader):
    """Reads YAML as yaml.SafeLoader does, within limits, and without keys that are given twice."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self.extents: dict[int, Extent] = {}
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the next node, whose extent is known then. Raises ValueError and YAMLError."""
        if self.check_event(yaml.AliasEvent):
            target = self.anchors.get(self.peek_event().anchor)
            if target is not None and id(target) not in self.extents:
                raise ValueError("contains itself; write its values out")
        self.depth += 1
        if self.depth > DEPTH:
            raise ValueError(f"nested more than {DEPTH} deep")
        if len(self.extents) > YAML_NODES:
            raise ValueError(f"more than {YAML_NODES} values")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if id(node) not in self.extents:
            self.extents[id(node)] = self.measure(node)
        return node

    def measure(self, node: Any) -> Extent:
        """Return the extent of a node whose children are known. Raises ValueError and YAMLError."""
        if isinstance(node, yaml.ScalarNode):
            if node.tag.endswith((":int", ":float")) and len(node.value) > DIGITS:
                raise ValueError(f"a number of {len(node.value)} characters")
            return Extent(1 + len(node.value) // TEXT_NODE, 0)
        pairs = isinstance(node, yaml.MappingNode)
        if pairs:
            check_keys(node)
        children = [self.extents[id(child)] for entry in node.value for child in (entry if pairs else (entry,))]
        nodes = 1 + sum(child.nodes for child in children)
        depth = 1 + max((child.depth for child in children), default=0)
        if nodes > YAML_NODES:
            raise ValueError(f"more than {YAML_NODES} values, aliases counted as what they stand for")
        if depth > DEPTH:
            raise ValueError(f"nested more than {DEPTH} deep")
        return Extent(nodes, depth)


def check_keys(node: yaml.MappingNode) -> None:
    """Raise ConstructorError, with the place, for a key that is given twice."""
    seen = set()
    for key, _ in node.value:
        name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
        if name in seen and name is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key.value[:TEXT_NODE]!r} is given twice; remove one", key.start_mark
            )
        seen.add(name)
