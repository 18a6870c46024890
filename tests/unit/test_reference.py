"""Bad input to the import of the authors' checkpoints: exit code 2, one line on stderr, nothing written."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.golden import GOLDEN
from transformers.utils.logging import set_verbosity_warning

from armt_dist import reference
from armt_dist.config import run_main

CASE = GOLDEN / "armt_v2_llama_base"
LAYER = "memory_cell.model.model.layers.0."
HEAD = "memory_cell.model.lm_head.weight"


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """Runs the command on altered copies of a good case; returns its one line."""

    def run(options=None, tensors=None, **arguments):
        arguments = {"config": tmp_path / "config.json", "weights": tmp_path / "weights", "out": tmp_path / "out"} | {
            name: tmp_path / value for name, value in arguments.items()
        }
        (tmp_path / "config.json").write_text(
            json.dumps(json.loads((CASE / "config.json").read_text()) | (options or {}))
        )
        altered = load_file(CASE / "weights.safetensors") | (tensors or {})
        save_file({name: t.contiguous() for name, t in altered.items() if t is not None}, tmp_path / "weights")
        (tmp_path / "text").write_text("not what you think")
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        command = [str(word) for name, value in arguments.items() for word in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["reference", *command])
        with pytest.raises(SystemExit) as stopped:
            run_main(reference.main, rank=0)
        assert stopped.value.code == 2
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before, "something was written"
        line = capfd.readouterr().err
        assert line.startswith("error: ") and line.count("\n") == 1, line
        return line

    return run


OPTIONS = {
    "model_family=GRU": dict(model_family="GRU"),
    "memory_tokens.sink is missing": dict(use_sink=True),
    "hf_config: missing": dict(hf_config=None),
    "segment_size: missing": dict(segment_size=None),
    "num_mem_tokens: missing": dict(num_mem_tokens=None),
    "d_mem: missing": dict(d_mem=None),
    "segment_tokens=0": dict(segment_size=0),
    "num_mem_tokens='4'": dict(num_mem_tokens="4"),
    "n_heads=3": dict(n_heads_memory=3),
    "n_heads=2: maths=paper": dict(n_heads_memory=2, l2_normalised_features=False),
    "wrap_pos=true: llama": dict(wrap_pos=True),
    "base_config.model_type=t5": dict(hf_config=dict(model_type="t5")),
    "base_config.model_type=None": dict(hf_config={}),
    "'hidden_size'": dict(hf_config=dict(model_type="llama", hidden_size="wide")),
    "does not fit": dict(d_mem=4),
}
TENSORS = {
    "unknown tensor 'head.weight'": {"head.weight": torch.zeros(1)},
    "base.model.layers.0.memory.W_mk.weight is missing": {f"{LAYER}W_mk.weight": None},
    "base.model.layers.0.memory.W_mk.weight [8, 31] does not fit": {f"{LAYER}W_mk.weight": torch.zeros(8, 31)},
    "no such tensor": {f"{LAYER}layer.extra.weight": torch.zeros(1)},
    "is torch.float64": {f"{LAYER}W_mk.weight": torch.zeros(8, 32, dtype=torch.float64)},
    "but the config ties them": {HEAD: torch.zeros(97, 32)},
}
FILES = {
    "config=": dict(config="nowhere"),
    "not a readable JSON file": dict(config="text"),
    "weights=": dict(weights="nowhere"),
    "not a readable safetensors file": dict(weights="text"),
    "exists and is not an empty folder": dict(out="text"),
    "cannot be written": dict(out="text/below"),
}


@pytest.mark.parametrize("message", OPTIONS)
def test_bad_options(refused, message):
    assert message in refused(options=OPTIONS[message])


@pytest.mark.parametrize("message", TENSORS)
def test_bad_tensors(refused, message):
    assert message in refused(tensors=TENSORS[message])


@pytest.mark.parametrize("message", FILES)
def test_bad_files(refused, message):
    assert message in refused(**FILES[message])


def test_warnings_of_others_are_not_shown(refused, caplog):
    """Hugging Face has something to say about this configuration."""
    set_verbosity_warning()
    base = json.loads((CASE / "config.json").read_text())["hf_config"] | {"bos_token_id": 50256}
    refused(options=dict(hf_config=base), tensors={HEAD: torch.zeros(97, 32)})
    assert not caplog.messages


def test_a_json_list_is_no_configuration(refused, tmp_path):
    (tmp_path / "list.json").write_text("[]")
    assert "expected a JSON object" in refused(config="list.json")


def test_truncated_weights(refused, tmp_path):
    (tmp_path / "short").write_bytes((CASE / "weights.safetensors").read_bytes()[:-100])
    assert "not a readable safetensors file" in refused(weights="short")


def test_a_folder_with_files_is_not_written_to(refused, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert "exists and is not an empty folder" in refused(out="mine")
