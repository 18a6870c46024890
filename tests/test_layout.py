"""Imports go one way, and what is exported with a model stands alone."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "armt_dist"

# Each module may import those on lines above its own.
ORDER = """
config
versions
exported_code
schedule
timeline
verify
simulator
sizes
hardware
planner
rmt
memory backbone
window cache configuration_armt tested
generation
modeling_armt
reference offload watchdog determinism allocator
bptt parallel loss
handoff trace traffic digest health
executor preflight
engine vitals
build
data
curriculum batches
run checkpoint zero_shards metrics rng
saver resume
model_card
export
evaluate exported
plots
report plateau
reporter
trainer
"""
LEVEL = {module: level for level, line in enumerate(ORDER.split("\n")) for module in line.split()}
# Folders written by save_pretrained carry these; they are loaded where armt_dist is not installed.
EXPORTED = (
    "rmt",
    "memory",
    "backbone",
    "window",
    "cache",
    "configuration_armt",
    "tested",
    "generation",
    "modeling_armt",
)
WITHOUT_TORCH = ("config", "versions", "schedule", "timeline", "verify", "simulator", "sizes", "hardware", "planner")
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path):
    """`data/text.py` belongs to `data`."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path):
    """(relative?, dotted name) of everything that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((False, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is None:
            # from . import a, b
            yield from ((True, "." * node.level + alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield bool(node.level), "." * node.level + node.module


def internal(path):
    """The modules of armt_dist that a file imports."""
    for relative, name in imports(path):
        if not relative:
            assert name.split(".")[0] != "armt_dist", f"{path.name}: import {name} relatively"
            continue
        dots = len(name) - len(name.lstrip("."))
        depth = len(path.relative_to(PACKAGE).parts)
        # A relative import that stays within a sub-package is that package's own affair.
        if dots == depth:
            yield name.strip(".").split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    module = module_of(path)
    if module == "__init__":
        assert not list(internal(path)), "importing the package must stay free"
        return
    assert module in LEVEL, f"{module} has no place in ORDER"
    for imported in internal(path):
        assert imported in LEVEL, f"{module} imports {imported}, which has no place in ORDER"
        assert LEVEL[imported] < LEVEL[module], f"{module} imports {imported}, which comes after it"


@pytest.mark.parametrize("module", EXPORTED)
def test_exported_files_stand_alone(module):
    for relative, name in imports(PACKAGE / f"{module}.py"):
        if relative:
            assert name.strip(".") in EXPORTED, f"{module} imports {name}, which an exported folder does not carry"
        else:
            top = name.split(".")[0]
            assert top in {"torch", "transformers"} | sys.stdlib_module_names, f"{module} imports {name}"


@pytest.mark.parametrize("path", [path for path in FILES if module_of(path) in WITHOUT_TORCH], ids=module_of)
def test_planning_needs_no_torch(path):
    for _, name in imports(path):
        assert name.split(".")[0] not in {"torch", "transformers", "deepspeed"}, f"{path.name} imports {name}"
