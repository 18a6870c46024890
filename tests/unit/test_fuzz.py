"""A thousand damaged inputs: each is taken, or refused by one ConfigError line; never a traceback, nothing written."""

import copy
import hashlib
import json
import shutil
import sys

import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.golden import GOLDEN
from support.paths import ROOT

from armt_dist import reference
from armt_dist.checkpoint import folder as checkpoint
from armt_dist.config import ConfigError, load_config
from armt_dist.training.run_config import RunConfig
from armt_dist.zero3 import partitioned_model as build
from armt_dist.zero3.ds_config import prepare, read_ds_config

CASE = GOLDEN / "armt_v2_gpt2_freezemem"
KINDS = 4
EXAMPLES = 1000 // KINDS
ODD = [
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    7,
    64,
    0.5,
    -2.5,
    1e30,
    "",
    "x",
    "1",
    "../../x",
    "/",
    "\u0000",
    [],
    {},
    [1],
    {"a": 1},
]
# The first example is slow: it imports.
SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def paths(tree, here=()):
    """Every place in a nested value."""
    yield here
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from paths(value, (*here, key))


@st.composite
def mutated(draw, tree):
    """`tree` with up to three values replaced, removed, renamed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from([path for path in paths(tree) if path]))
        node = tree
        for key in way:
            node = node[key]
        action = draw(st.sampled_from(["replace", "replace", "remove", "rename", "swap"]))
        if action == "replace" or not isinstance(node, dict):
            node[last] = draw(st.sampled_from(ODD))
        elif action == "remove":
            del node[last]
        elif action == "rename":
            node[draw(st.sampled_from(["x", last.upper() if isinstance(last, str) else "y", ""]))] = node.pop(last)
        else:
            other = draw(st.sampled_from(list(node)))
            node[last], node[other] = node[other], node[last]
        if not any(paths(tree)) or len(list(paths(tree))) < 2:
            break
    return tree


@st.composite
def broken(draw, text):
    """A text with a part cut out, doubled or replaced by noise, as bytes."""
    data = bytearray(text.encode())
    start = draw(st.integers(0, len(data) - 1))
    end = draw(st.integers(start, min(len(data), start + 40)))
    data[start:end] = draw(
        st.sampled_from([b"", bytes(data[start:end] * 2), b"\x00", b"\xff\xfe", b"{", b"]", b"\t: &a *a", b"!!x"])
    )
    return bytes(data)


def inputs(tree, dump):
    """Mutated values, or text that was damaged after it was written."""
    return st.one_of(mutated(tree).map(lambda t: dump(t).encode()), broken(dump(tree)))


def taken_or_refused(use):
    """`use` works, or says in one line what is wrong."""
    try:
        use()
    except ConfigError as error:
        assert str(error) and "\n" not in str(error), repr(str(error))
        assert "Traceback" not in str(error)


RUN = yaml.safe_load((ROOT / "launch/configs/default.yaml").read_text())
DS = json.loads((ROOT / "ds_configs/zero3_offload.json").read_text())
OPTIONS = json.loads((CASE / "config.json").read_text())


@SETTINGS
@given(text=inputs(RUN, yaml.safe_dump))
def test_yaml(tmp_path, text):
    (tmp_path / "run.yaml").write_bytes(text)

    def use():
        config = load_config(RunConfig, tmp_path / "run.yaml")
        if config.model.base is None:
            build.armt_config(config.model, {"vocab_size": 32}, None)

    taken_or_refused(use)


@SETTINGS
@given(text=inputs(DS, json.dumps))
def test_ds_config(tmp_path, text):
    (tmp_path / "ds.json").write_bytes(text)

    def use():
        prepare(read_ds_config(tmp_path / "ds.json"), 2, 2, torch.device("cpu"))

    taken_or_refused(use)


CONTENTS = {"a.pt": b"one", "part/b.pt": b"two"}
MANIFEST = {
    "tag": "step_00000001",
    "world_size": 2,
    "state": {"progress": {"step": 1}, "task": {}},
    "files": {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in CONTENTS.items()},
}


@SETTINGS
@given(text=inputs(MANIFEST, json.dumps))
def test_manifest(tmp_path, text):
    folder = tmp_path / "root/step_00000001"
    (folder / "part").mkdir(parents=True, exist_ok=True)
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    (tmp_path / "x").write_text("outside")
    (folder / "manifest.json").write_bytes(text)

    def use():
        found = checkpoint.verify_checkpoint(folder)
        assert all((folder / name).resolve().is_relative_to(folder.resolve()) for name in found.files)

    taken_or_refused(use)


@SETTINGS
@given(text=inputs(OPTIONS, json.dumps), cut=st.one_of(st.none(), st.integers(0, 3000)))
def test_reference_checkpoint(tmp_path, text, cut):
    (tmp_path / "config.json").write_bytes(text)
    weights = (CASE / "weights.safetensors").read_bytes()
    (tmp_path / "weights").write_bytes(
        weights if cut is None else weights[: -cut or None] if cut % 2 else weights[:cut]
    )
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    before, sys.argv = sys.argv, ["reference"]
    for name, path in (("config", "config.json"), ("weights", "weights"), ("out", "out")):
        sys.argv += [f"--{name}", str(tmp_path / path)]
    try:
        taken_or_refused(reference.main)
    finally:
        sys.argv = before
    assert not out.exists() or (out / "model.safetensors").exists(), "half-written"
