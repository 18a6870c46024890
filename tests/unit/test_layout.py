"""The layout: rooms that import one way, a model that stands alone, and the tree that docs/design.md shows."""

import ast
import sys

import pytest
from support.paths import ROOT

PACKAGE = ROOT / "armt_dist"
MODEL = sorted((PACKAGE / "model").glob("*.py"))


def imports(path):
    """(level, dotted name) of everything that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or node.names[0].name


@pytest.mark.parametrize("path", MODEL, ids=lambda path: path.name)
def test_an_export_needs_torch_and_transformers_only(path):
    """Folders written by save_pretrained carry these files; they are loaded where armt_dist is not installed."""
    for level, name in imports(path):
        if level:
            assert level == 1 and (PACKAGE / "model" / f"{name}.py").is_file(), f"{path.name} imports {name}"
        else:
            known = {"torch", "transformers"} | sys.stdlib_module_names
            assert name.split(".")[0] in known, f"{path.name} imports {name}"


def test_the_tree_in_the_docs_is_the_one_on_disk():
    """Each room and file of the package stands in docs/design.md with a line about it, and nothing else does."""
    text = (PACKAGE.parent / "docs" / "design.md").read_text()
    block = text[text.index("```\narmt_dist/") :].split("```")[1]
    shown, folders = set(), [PACKAGE]
    for line in block.strip().splitlines()[1:]:
        name, about = line.split(None, 1)
        depth = (len(line) - len(line.lstrip())) // 2
        assert about.strip(), f"{name} has no line about it"
        folders = [*folders[:depth], folders[depth - 1] / name.strip("/")]
        if not name.endswith("/"):
            shown.add(folders[-1])
    files = {path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    assert shown == files, f"docs/design.md: too much {shown - files}, missing {files - shown}"
