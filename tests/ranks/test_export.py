"""Export: what plain transformers loads from the folder is the model that was trained."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.commands import call_script
from support.hostile import make_hashes_fit
from support.ranks import spawn

from armt_dist.checkpoint.export import PREFIX, export
from armt_dist.config import ConfigError

pytestmark = pytest.mark.slow

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
# Name -> base, tied embeddings, frozen memory, bf16.
RUNS = {
    "gpt2_tied_frozen": (GPT2, True, True, False),
    "gpt2_untied": (GPT2, False, False, False),
    "llama_tied": (LLAMA, True, False, False),
    "llama_untied_bf16": (LLAMA, False, False, True),
}
TEST_IDS = torch.randint(0, 12, (2, 11), generator=torch.Generator().manual_seed(0))
# The logits of every folder, by transformers alone.
FRESH = """
import sys, torch
sys.modules["armt_dist"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
ids, *folders = torch.load(sys.argv[1])
logits = {}
for folder in folders:
    model, loading = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(loading.values()), loading
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        logits[folder] = model.eval()(ids).logits
torch.save(logits, sys.argv[2])
"""


def train(ranks, root, names):
    """A run of two steps for each of `names`. Returns the trained models' logits."""
    from armt_dist.config import validate
    from armt_dist.monitoring.lease import Lease
    from armt_dist.training.run_config import RunConfig
    from armt_dist.training.trainer import Trainer

    logits = {}
    for name in names:
        base, tied, frozen, bf16 = RUNS[name]
        model = {"base_config": {**base, "tie_word_embeddings": tied}, "num_mem_tokens": 2, "d_mem": 4}
        config = {
            "model": {**model, "freeze_mem": frozen},
            "data": {"task": "rewrite", "retrieval": {"symbols": 8}},
            "train": {"save_every": 1, "validate_every": 2, "validation_steps": 1},
            "curriculum": [{"pairs": 2, "steps": 2}],
        }
        ds = {"train_batch_size": 4, "zero_optimization": {"stage": 3}, "bf16": {"enabled": bf16}}
        trainer = Trainer(validate(RunConfig, config), ds, root / name, ranks, torch.device("cpu"), Lease(root / name))
        assert trainer.run("never") == 0
        trainer.engine.eval()
        with torch.no_grad():
            logits[name] = trainer.runner.model(TEST_IDS).logits
        trainer.engine.destroy()
    return logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of runs, and the trained models' logits by run."""
    root = tmp_path_factory.mktemp("runs")
    first, second = spawn(2, train, root, list(RUNS), timeout_s=300)
    for name in RUNS:
        assert torch.equal(first[name], second[name])
    (root / "one").mkdir()
    (alone,) = spawn(1, train, root / "one", ["gpt2_tied_frozen"])
    return root, {**first, "one/gpt2_tied_frozen": alone["gpt2_tied_frozen"]}


def plain_logits(folders, tmp_path):
    """By transformers in a fresh process that cannot import armt_dist."""
    torch.save([TEST_IDS, *map(str, folders)], tmp_path / "in.pt")
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FRESH, tmp_path / "in.pt", tmp_path / "out.pt"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "out.pt")


def test_logits_equal_the_trained_models(trained, tmp_path):
    root, logits = trained
    for i, name in enumerate(logits):
        # In the dtype of training, so that the trained model's own rounding is in both.
        dtype = "bfloat16" if name.endswith("bf16") else "float32"
        # A tiny size makes many files and an index.
        export(root / name, tmp_path / str(i), "latest", dtype, "5GB" if i % 2 else "2KB")
    assert (tmp_path / "0" / "model.safetensors.index.json").exists() and (tmp_path / "1/model.safetensors").exists()
    found = plain_logits([tmp_path / str(i) for i in range(len(logits))], tmp_path)
    for (name, expected), actual in zip(logits.items(), found.values(), strict=True):
        assert actual.dtype == expected.dtype, name
        assert (actual - expected).abs().max() <= 1e-5, name


def test_master_weights_are_exported_bit_for_bit(trained, tmp_path):
    """The fp32 weights of a bf16 run, against DeepSpeed's own reader."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    run = trained[0] / "llama_untied_bf16"
    export(run, tmp_path / "out", "latest")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    expected = get_fp32_state_dict_from_zero_checkpoint(run / "checkpoints", "step_00000002")
    assert {PREFIX + name for name in exported} == set(expected)
    for name, tensor in exported.items():
        assert torch.equal(tensor, expected[PREFIX + name]), name
        assert tensor.dtype == torch.float32


def test_folder_is_as_save_pretrained_writes_it(trained, tmp_path):
    from armt_dist.model.modeling_armt import ARMTForCausalLM

    run = trained[0] / "gpt2_tied_frozen"
    export(run, tmp_path / "out")
    ARMTForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "again")]
    assert configs[0] == configs[1]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    code = {"modeling_armt.py", "configuration_armt.py", "memory.py", "backbone.py"}
    assert code | {"tokenizer.json", "generation_config.json", "README.md", "armt_task.json"} <= names
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| task | rewrite |" in card and "## Validation" in card and "| step | 2 |" in card


def test_tags(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained[0] / "gpt2_untied", run)
    checkpoints = run / "checkpoints"

    def exported(source, tag):
        found = export(source, tmp_path / "out", tag)
        shutil.rmtree(tmp_path / "out")
        return found.checkpoint.name

    (checkpoints / "best").write_text("step_00000001")
    assert exported(run, None) == exported(run, "best") == "step_00000001"
    assert exported(run, "latest") == exported(checkpoints, "step_00000002") == "step_00000002"
    assert exported(checkpoints / "step_00000002", None) == "step_00000002"
    # The best checkpoint of an earlier stage may have been pruned.
    (checkpoints / "best").write_text("step_00000009")
    assert exported(run, None) == "step_00000002"
    with pytest.raises(ConfigError, match="tag=step_3: no such checkpoint; choose from .*step_00000001"):
        export(run, tmp_path / "out", "step_3")


STEP_2 = "checkpoints/step_00000002"
OPTIMIZER_1 = f"{STEP_2}/zero_pp_rank_1_mp_rank_00_optim_states.pt"
MANIFEST = f"{STEP_2}/manifest.json"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shorten_groups(path):
    content = torch.load(path, weights_only=False)
    groups = content["optimizer_state_dict"]["fp32_flat_groups"]
    groups[0] = groups[0][:-1].clone()
    torch.save(content, path)


def change_width(path):
    config = json.loads(path.read_text())
    config["d_mem"] = 6
    path.write_text(json.dumps(config))


# What the error says -> damage done to a run: [(file, what is done to it)].
DAMAGE = {
    "no readable manifest.json": [(MANIFEST, Path.unlink)],
    "optim_states.pt of rank 1 is missing": [(OPTIMIZER_1, Path.unlink), (STEP_2, make_hashes_fit)],
    "truncated or not a DeepSpeed file": [(OPTIMIZER_1, truncate), (STEP_2, make_hashes_fit)],
    "do not fit together": [(OPTIMIZER_1, shorten_groups), (STEP_2, make_hashes_fit)],
    "_optim_states.pt is missing": [(OPTIMIZER_1, Path.unlink)],
    "_optim_states.pt has [0-9]+ bytes, not": [(OPTIMIZER_1, truncate)],
    "is damaged": [(OPTIMIZER_1, flip_a_bit)],
    "no checkpoint in": [("checkpoints", shutil.rmtree)],
    "no model/config.json": [("model", shutil.rmtree)],
    "memory.W_mq.weight is of shape": [("model/config.json", change_width)],
}


@pytest.mark.parametrize("says", DAMAGE)
def test_a_damaged_run_is_named_and_nothing_is_written(says, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained[0] / "gpt2_untied", run)
    for file, damage in DAMAGE[says]:
        damage(run / file)
    with pytest.raises(ConfigError, match=says) as error:
        export(run, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_failed_write_leaves_nothing(trained, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("armt_dist.checkpoint.export.lay_out", full)
    with pytest.raises(ConfigError, match="out=.*cannot be written .*No space left"):
        export(trained[0] / "gpt2_untied", tmp_path / "new" / "out")
    assert not list((tmp_path / "new").iterdir())


BAD_ARGUMENTS = {
    "run=nowhere: no such folder": ["nowhere", "--out", "out"],
    "out=full: exists and is not an empty folder": ["RUN", "--out", "full"],
    "out=full/file/out: cannot be written": ["RUN", "--out", "full/file/out"],
    "tag=step_7: no such checkpoint": ["RUN", "--out", "out", "--tag", "step_7"],
    "dtype=int8: one of": ["RUN", "--out", "out", "--dtype", "int8"],
    "max_shard_size=lots": ["RUN", "--out", "out", "--max-shard-size", "lots"],
}


@pytest.mark.parametrize("says", BAD_ARGUMENTS)
def test_bad_arguments_are_one_line(says, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/file").touch()
    arguments = [trained[0] / "gpt2_untied" if word == "RUN" else word for word in BAD_ARGUMENTS[says]]
    code, _, stderr = call_script("consolidate.py", arguments, monkeypatch, capsys)
    assert code == 2 and stderr.startswith(f"error: {says}") and stderr.count("\n") == 1
    assert {path.name for path in tmp_path.rglob("*")} == {"full", "file"}


def test_commands_in_a_row(trained, tmp_path, monkeypatch, capsys):
    """consolidate, then evaluate, which knows the task from the folder; an empty folder may be there already."""
    out = tmp_path / "out"
    out.mkdir()
    code, stdout, _ = call_script("consolidate.py", [trained[0] / "llama_tied", "--out", out], monkeypatch, capsys)
    assert code == 0 and f"launch/evaluate.py --model {out}" in stdout
    code, stdout, _ = call_script("evaluate.py", ["--model", out, "--samples", 8], monkeypatch, capsys)
    assert code == 0 and stdout.splitlines()[0].split()[:2] == ["pairs", "samples"]
    result = json.loads((out / "evaluation" / "evaluation.json").read_text())
    assert [row["length"] for row in result["rows"]] == [5, 10, 20, 50]
    assert result["data"]["retrieval"]["symbols"] == 8
    assert (out / "evaluation" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
