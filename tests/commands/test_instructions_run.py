"""Chats through the real commands: two ranks train for epochs, stop and resume; export, evaluation; a mistake."""

import json

import pytest
import yaml
from support.chats import chat_tokenizer
from support.commands import records, run_script, train
from support.paths import FP32

MODEL = {
    "base_config": {
        **{"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128},
    },
    "init": {"linear_std": 0.05, "embedding_std": 0.05, "memory_std": 0.05},
    **{"segment_tokens": 16, "num_mem_tokens": 4, "d_mem": 8},
}


def chats(path, count):
    turns = [("user", "What is {} plus 1?"), ("assistant", "{}.")]
    rows = [[{"role": role, "content": text.format(i)} for role, text in turns] for i in range(count)]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe that trains for two epochs on 20 chats, in batches of 4."""
    folder = tmp_path_factory.mktemp("chats")
    section = {
        "files": chats(folder / "chats.jsonl", 20),
        "validation_files": chats(folder / "held_out.jsonl", 3),
        "tokenizer": chat_tokenizer(folder / "tokenizer"),
        **{"sequence_tokens": 64, "cache": str(folder / "cache")},
    }
    tree = {
        "model": MODEL,
        "data": {"task": "instructions", "instructions": section},
        "train": {"epochs": 2, "validate_every": 5},
        "curriculum": [{"segments": 4, "lr": 1.0e-3}],
        "ds_config": {"train_batch_size": 4},
    }
    path = folder / "chats.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def run(recipe):
    """A run that was stopped after three steps and resumed; its folder and what both starts printed."""
    folder, printed = recipe.parent / "run", []
    for limit in (["train.max_steps=3"], []):
        result = train("--ds_config", FP32, "--config", recipe, "--out", folder, *limit)
        assert result.returncode == 0, result.stderr[-3000:]
        printed.append(result.stdout)
    return folder, printed


def test_epochs_decide_the_steps_and_a_resume_goes_on(run):
    folder, (first, second) = run
    assert "train: 20 rows of messages, 20 samples; the loss counts the assistant's turns" in first
    assert "curriculum.0: 10 steps of 4 samples, 2 epochs of the 20 for training" in first
    assert "at step 3" in second and "done: 10 steps" in second
    assert [record["step"] for record in records(folder)] == list(range(1, 11))
    (*_, last) = records(folder, "validation")
    assert last["step"] == 10 and {"loss", "accuracy", "token_accuracy"} <= last.keys()


def test_an_export_is_evaluated_on_chats_held_out(run, tmp_path):
    folder, _ = run
    export = run_script("consolidate.py", folder, "--out", tmp_path / "model", "--tag", "latest")
    assert export.returncode == 0, export.stderr[-2000:]
    found = run_script("evaluate.py", "--model", tmp_path / "model", "--trust-data", "--lengths", "3", "--data",
                       f"data.instructions.files={folder.parent / 'chats.jsonl'}",
                       f"data.instructions.validation_files={folder.parent / 'held_out.jsonl'}")  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    (row,) = json.loads((tmp_path / "model/evaluation/evaluation.json").read_text())["rows"]
    (*_, last) = records(folder, "validation")
    assert row["samples"] == 3 and row["loss"] == pytest.approx(last["loss"], rel=1e-4)
    assert "accuracy" in found.stdout


def test_a_mixture_with_plays_trains(recipe, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("To be, or not to be. " * 30)
    tree = yaml.safe_load(recipe.read_text())
    chat = {"weight": 3, **tree["data"]}
    text = {"files": str(tmp_path / "*.txt"), "sequence_tokens": 64, "cache": str(tmp_path / "cache")}
    tree["data"] = {"task": "mixture", "mixture": {"parts": [{"task": "text", "text": text}, chat]}}
    tree["train"] = {"max_steps": 3}
    tree["curriculum"][0]["steps"] = 3
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(tree))
    result = train("--ds_config", FP32, "--config", tmp_path / "mixture.yaml", "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "25.0% parts.0 (text), 75.0% parts.1 (instructions)" in result.stdout
    assert records(tmp_path / "run", "validation")


def test_a_mistake_in_a_row_ends_all_ranks_in_one_line(recipe, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": 5}\n')
    data = [f"data.instructions.files={bad}", "data.instructions.validation_fraction=0"]
    data += ["data.instructions.validation_files=null"]
    result = train("--ds_config", FP32, "--config", recipe, "--out", tmp_path / "run", *data)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert errors == [f"error: data.instructions.files={bad}, line 2, completion: expected text, got int 5; correct it"]
    assert result.returncode == 2 and not (tmp_path / "run").exists()
