"""Exports of a stranger's run: links, code that would run when the export is loaded, and what an export tells."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from support.commands import call_script
from support.hostile import make_hashes_fit
from support.models import small_model

from armt_dist.checkpoint import export as export_module
from armt_dist.checkpoint.published import copy_known_files, public_name, without_code
from armt_dist.checkpoint.zero_shards import StoredCheckpoint, StoredParameter
from armt_dist.config import ConfigError
from armt_dist.data.tokenizers import byte_tokenizer

SECRET = "the victim's secret"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder whose checkpoint is a small model's weights."""
    model = small_model("gpt2", base=dict(vocab_size=300), segment_tokens=4)
    folder = tmp_path / "run"
    model.config.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "checkpoints/step_00000001").mkdir(parents=True)
    stored = {
        export_module.PREFIX + name: StoredParameter(tensor.shape, [tensor.detach().flatten()])
        for name, tensor in model.state_dict().items()
    }
    monkeypatch.setattr(export_module, "is_checkpoint", lambda path: path.name.startswith("step_"))
    monkeypatch.setattr(export_module, "open_checkpoint", lambda path: StoredCheckpoint(stored, {}))
    (folder / "checkpoints/step_00000001/any").touch()
    make_hashes_fit(folder / "checkpoints/step_00000001")
    return folder


def consolidated(run, monkeypatch, capsys):
    return call_script("consolidate.py", [run, "--out", run.parent / "out"], monkeypatch, capsys)


@pytest.mark.parametrize("target", ["file", "/dev/zero", "folder"])
def test_a_link_in_place_of_a_known_file(run, target, monkeypatch, capsys):
    (run.parent / "file").write_text(SECRET)
    (run.parent / "folder").mkdir()
    (run / "model/vocab.json").unlink(missing_ok=True)
    (run / "model/vocab.json").symlink_to(run.parent / target)
    code, _, errors = consolidated(run, monkeypatch, capsys)
    assert code == 2 and "vocab.json is no regular file" in errors.splitlines()[-1]
    assert not (run.parent / "out").exists()


def test_a_fifo_does_not_hang(run):
    os.mkfifo(run / "model/merges.txt")
    with pytest.raises(ConfigError, match="merges.txt is no regular file"):
        copy_known_files(run / "model", run.parent)


def test_planted_code_does_not_reach_the_export(run, monkeypatch, capsys):
    """Nor links and folders of other names; what is left out is said, and the export loads and runs our code alone."""
    evil = f"import os\nos.mkdir({str(run.parent / 'ran')!r})\n"
    (run / "model/evil_tok.py").write_text(evil)
    (run / "model/modeling_armt.py").write_text(evil)
    (run / "model/custom_generate").mkdir()
    (run / "model/custom_generate/generate.py").write_text(evil)
    (run / "model/home").symlink_to("/etc")
    code = {
        "AutoTokenizer": ["evil_tok.Evil", None],
        "AutoModelForCausalLM": "evil_tok.Evil",
        "AutoModel": "evil_tok.E",
    }
    for name in ("config.json", "tokenizer_config.json"):
        tree = json.loads((run / "model" / name).read_text())
        tree |= {"auto_map": code, "custom_pipelines": {"text-generation": {"impl": "evil_tok.E"}}}
        if "base_config" in tree:
            tree["base_config"] |= {"auto_map": code, "_name_or_path": "/home/me/models/base"}
        (run / "model" / name).write_text(json.dumps(tree))
    code, out, errors = consolidated(run, monkeypatch, capsys)
    assert code == 0, errors
    found = run.parent / "out"
    assert "left out of" in out and "custom_generate, evil_tok.py, home" in out, out
    assert not [path for path in found.rglob("*") if path.is_symlink() or "evil" in path.name or path.is_dir()]
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        text = (found / name).read_text() if (found / name).exists() else ""
        assert "evil" not in text and "custom_pipelines" not in text and "/home/me" not in text
    assert json.loads((found / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_armt.ARMTConfig",
        "AutoModelForCausalLM": "modeling_armt.ARMTForCausalLM",
    }
    load = "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; import sys; p = sys.argv[1]; "
    load += "M.from_pretrained(p, trust_remote_code=True); T.from_pretrained(p, trust_remote_code=True)"
    result = subprocess.run([sys.executable, "-c", load, str(found)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert not (run.parent / "ran").exists()
    assert all(torch.isfinite(tensor).all() for tensor in load_file(found / "model.safetensors").values())


def test_what_an_export_tells_of_the_run(run, monkeypatch, capsys):
    text = {"files": ["/home/me/secret/books", "plays"], "tokenizer": "https://me:password@host/tok?key=1"}
    tree = {"data": {"task": "text", "text": text}, "model": {"base": "/home/me/models/llama"}}
    (run / "config.yaml").write_text(json.dumps(tree))
    code, out, errors = consolidated(run, monkeypatch, capsys)
    assert code == 0, errors
    found = run.parent / "out"
    for path in found.iterdir():
        content = path.read_bytes()
        assert not any(word in content for word in (b"/home/me", b"password", b"key=1")), path
    saved = json.loads((found / "armt_task.json").read_text())["data"]["text"]
    assert saved == {"files": ["books", "plays"], "tokenizer": "https://host/tok"}
    assert "| started from | llama |" in (found / "README.md").read_text()
    (published,) = [line for line in out.splitlines() if line.startswith("published: ")]
    assert set(published.removeprefix("published: ").split(", ")) == {path.name for path in found.iterdir()}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plays/a.txt", "plays/a.txt"),
        ("gpt2", "gpt2"),
        ("/a/b/c", "c"),
        ("~/c.txt", "c.txt"),
        ("../x/c", "c"),
        ("s3://key:secret@bucket/a.txt?token=1#x", "s3://bucket/a.txt"),
    ],
)
def test_names(text, shown):
    assert public_name(text) == shown


def test_keys_of_code_at_any_depth():
    tree = {"a": [{"auto_map": 1, "b": 2}], "custom_generate": "x", "_name_or_path": "/x"}
    assert without_code(tree) == {"a": [{"b": 2}], "_name_or_path": ""}
