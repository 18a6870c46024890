"""A mistake in a configuration is answered at once: before torch is loaded, in one line, with nothing written."""

import resource

import pytest
import torch
from support.commands import run_script
from support.paths import ROOT
from transformers import AutoConfig, AutoModelForCausalLM

LIMIT_S = 2.0
HEAVY = ("torch", "transformers", "deepspeed", "datasets")
GPT2 = "model.base_config={model_type: gpt2, n_embd: 16, n_layer: 2, n_head: 2}"
PLAYS = ("--config", ROOT / "launch/configs/plays_cpu.yaml")
BASE = ("model.base={folder}", "model.base_config=null", "model.init=null")
MISTAKES = {
    "config={folder}/none.yaml: No such file": ["--config", "{folder}/none.yaml"],
    "ds_config={folder}/none.json: No such file": ["--ds_config", "{folder}/none.json"],
    "override='lr': expected key=value": ["lr"],
    "train.steps=3: unknown key; known here: ": ["train.steps=3"],
    "train.max_steps=soon: Input should be a valid integer": ["train.max_steps=soon"],
    "curriculum.0.steps: missing; set it": ["curriculum=[{pairs: 3}]"],
    "data.text.files.0=3: Input should be a valid string": ["data.task=text", "data.text={files: [3]}"],
    "data.text.files=3: Input should be a valid string or a valid list": ["data.task=text", "data.text={files: 3}"],
    "ds_config fp16={'enabled': True}: not honoured; use bf16": ["ds_config.fp16.enabled=true"],
    "ds_config train_batch_size=-4: Input should be greater than or equal to 1": ["ds_config.train_batch_size=-4"],
    "parallel.sp=3 does not divide the world of 4 ranks": [
        "--check", "4", "parallel.sp=3", "curriculum=[{pairs: 9, at_least: 1.0, steps: 2}]"
    ],
    "curriculum.0.segments=4: task=rewrite counts pairs": ["curriculum=[{segments: 4, steps: 2}]"],
    "curriculum.0.until: task=text has no accuracy": [
        *PLAYS, "curriculum=[{segments: 2, steps: 2, until: {accuracy: 0.5}}]"
    ],
    "train.carry_state=1.5: Input should be less than or equal to 1": ["train.carry_state=1.5"],
    "train.carry_state=-0.1: Input should be greater than or equal to 0": ["train.carry_state=-0.1"],
    "train.carry_state=0.5: with data.carry_memory=true every row": [
        *PLAYS, "data.carry_memory=true", "train.carry_state=0.5"
    ],
    "data.carry_memory=true: samples of data.task=rewrite have no continuation": ["data.carry_memory=true"],
    "curriculum.0.at_least=0.0: with data.carry_memory=true all steps of a stage": [
        *PLAYS, "data.carry_memory=true", "curriculum=[{segments: 4, steps: 2}]"
    ],
    "model.state_decay=0.0: above 0 and at most 1": ["model.state_decay=0.0"],
    "model.state_decay=1.5: above 0 and at most 1": ["model.state_decay=1.5"],
    "parallel.sp=4 x parallel.rounds=1 = 4 blocks: curriculum.0 may draw": ["--check", "4", "parallel.sp=4"],
    "segments=9999 of": [*PLAYS, "curriculum=[{segments: 9999, steps: 2}]"],
    "data.text.files={folder}/none*: no such file": [*PLAYS, "data.text.files={folder}/none*"],
    "data.instructions.files={folder}/none*: no such file": [
        *PLAYS, "data={task: instructions, instructions: {files: '{folder}/none*'}}"
    ],
    "data.mixture.parts.1: text.files=3: Input should be": [
        *PLAYS, "data={task: mixture, mixture: {parts: [{}, {task: text, text: {files: 3}}]}}"
    ],
    "data.mixture.parts.1: its unit is segments, and that of parts.0 is pairs": [
        *PLAYS, "model.segment_tokens=4",
        "data={task: mixture, mixture: {parts: [{}, {task: text, text: {files: {folder}, sequence_tokens: 64}}]}}"
    ],
    "train.epochs=2.0: every stage has steps": ["train.epochs=2"],
    "train.trackers=wandb: needs the package wandb; install it with: pip": ["train.trackers=[tensorboard, wandb]"],
    "model.lora: needs the package peft; install it with: pip": ["model.lora={targets: [q_proj]}"],
    "train.best=nonsense: no such validation metric": ["train.best=nonsense"],
    "base_config.num_attention_heads=3 does not divide hidden_size=16": [GPT2, "model.base_config.n_head=3"],
    "model_type=gpt5: no such backbone": ["model.base_config.model_type=gpt5"],
    "x: File name too long; give --out another folder": ["--out", "{folder}/" + 300 * "x"],
    "a name in it has more than 255 bytes; shorten it": ["--out", "{folder}/new/" + 300 * "x"],
    "{folder}/config.json is not a folder": ["--out", "{folder}/config.json/run"],
    "model.base={folder}: model.safetensors cannot be read (Error while des": [*PLAYS, *BASE],
    "model.base=a/b/c: neither a folder nor a name of the Hugging Face Hub": [*BASE[1:], "model.base=a/b/c"],
    "model.base=nobody/nothing: neither a folder nor in the cache {folder}/hub, and http://127.0.0.1:9 cannot be "
    "reached (Connection refused); give a folder, or fetch": [*BASE[1:], "model.base=nobody/nothing"],
    "data.text.tokenizer=nobody/nothing: neither a folder nor in": [*PLAYS, "data.text.tokenizer=nobody/nothing"],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model whose weights are cut, and packages without which only a real start can do."""
    folder = tmp_path_factory.mktemp("base")
    config = AutoConfig.for_model("gpt2", n_embd=16, n_layer=2, n_head=2, vocab_size=300, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    for name in HEAVY:
        (folder / "fake" / name).mkdir(parents=True)
        (folder / "fake" / name / "__init__.py").write_text("raise SystemExit('too early')\n")
    # These are not installed.
    (folder / "fake/sitecustomize.py").write_text("import sys\nsys.modules.update(wandb=None, peft=None)\n")
    return folder


@pytest.mark.parametrize("says", MISTAKES)
def test_a_mistake_is_named_before_torch_is_loaded(says, folder, tmp_path):
    arguments = [str(argument).replace("{folder}", str(folder)) for argument in MISTAKES[says]]
    arguments += [] if "--out" in arguments else ["--out", tmp_path / "run"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run_script(
        "train.py", *arguments, PYTHONPATH=f"{folder / 'fake'}:{ROOT}", HF_ENDPOINT="http://127.0.0.1:9",
        HF_HOME=str(folder), HF_HUB_OFFLINE="0",
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1 and says.replace("{folder}", str(folder)) in result.stderr
    assert not list(tmp_path.iterdir()), "nothing is written"
    assert took < LIMIT_S, f"{took:.1f} s of the processor"


@pytest.mark.parametrize("freeze", ["[nothing]", "['*']"])
def test_what_cannot_be_frozen_is_named_before_the_model_is_built(freeze, tmp_path):
    result = run_script("train.py", "--out", tmp_path / "run", f"train.freeze={freeze}")
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    assert result.returncode == 2 and len(errors) == 1, result.stderr
    assert f"train.freeze={freeze if '*' in freeze else 'nothing'}: " in errors[0] and "optimizer" not in result.stdout
    assert not (tmp_path / "run/config.yaml").exists()


def test_a_right_configuration_loads_torch(folder, tmp_path):
    """The packages above would be noticed."""
    result = run_script("train.py", "--out", tmp_path / "run", PYTHONPATH=f"{folder / 'fake'}:{ROOT}")
    assert result.returncode == 1 and "too early" in result.stderr


def test_a_right_configuration_is_checked_for_any_number_of_ranks(tmp_path):
    result = run_script("train.py", "--check", 64, "--out", tmp_path / "run", "ds_config.train_batch_size=128")
    assert result.returncode == 0 and not result.stdout and not result.stderr
    assert not list(tmp_path.iterdir())


def test_a_model_that_no_machine_holds_is_refused(tmp_path):
    result = run_script("train.py", "--out", tmp_path / "run", "model.base_config.hidden_size=10000000")
    assert result.returncode == 2 and "GB on each of 1 ranks for weights, gradients and optimizer" in result.stderr
    assert "has " in result.stderr and "use more ranks, a smaller model or an offload" in result.stderr
    assert torch.cuda.is_available() or len([x for x in result.stderr.splitlines() if x.startswith("error")]) == 1
