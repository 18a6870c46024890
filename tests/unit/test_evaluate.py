"""Evaluation: streamed, and yet what the plain forward says of whole sequences."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch
from support.commands import call_script
from support.models import confident_model
from support.paths import ROOT

from armt_dist.checkpoint.export import TASK_FILE
from armt_dist.config import validate
from armt_dist.data.lengths import Difficulty
from armt_dist.data.sections import DataConfig
from armt_dist.data.tasks import make_task
from armt_dist.data.tokenizers import byte_tokenizer
from armt_dist.evaluation.evaluate import evaluate, score, scored_bytes
from armt_dist.evaluation.exported import default_lengths, load_model, read_task

TEXTS = ("To be, or not to be.", "Whether 'tis nobler — in the mind", "to suffer the slings and arrows of fortune")
# A tiny model's loss differs in the last bits of float32 between one call of the head and one for each segment.
TOLERANCE = 1e-5


@pytest.fixture
def text_settings(tmp_path):
    """Three short held-out texts of different lengths, so that most rows are padded; the longest fills its sequence."""
    for folder, texts in (("train", TEXTS[:1]), ("held_out", TEXTS)):
        (tmp_path / folder).mkdir()
        for i, text in enumerate(texts):
            (tmp_path / folder / f"{i}.txt").write_text(text)
    files = {"files": str(tmp_path / "train"), "validation_files": str(tmp_path / "held_out"), "sequence_tokens": 40}
    return {"task": "text", "text": files}


def whole(model, batch):
    """The oracle: mean loss, hits and where scored, from one forward over whole sequences."""
    # Labels of a Hugging Face model are not shifted.
    labels = torch.cat([torch.full_like(batch.labels[:, :1], -100), batch.labels[:, :-1]], dim=1)
    with torch.no_grad():
        out = model(batch.input_ids, attention_mask=batch.attention_mask, labels=labels)
    scored = batch.labels != -100
    return out.loss.item(), (out.logits.argmax(-1) == batch.labels) & scored, scored


@pytest.mark.parametrize("alignment", ["left", "right", "center"])
def test_text_equals_the_plain_forward(text_settings, alignment):
    model = confident_model(259, 8, segment_alignment=alignment)
    task = make_task(validate(DataConfig, text_settings), 8, 259, global_batch=8)
    batch = task.batch("validation", 0, range(task.size("validation")), Difficulty.fixed(5))
    # Padding within a segment, segments of padding alone, and a row without.
    assert sorted(batch.attention_mask.sum(1).tolist()) == [3, 21, 36, 40]
    loss, right, scored = whole(model, batch)
    # Three rows at a time: the last batch is filled up with rows that do not count.
    task = make_task(validate(DataConfig, text_settings), 8, 259, global_batch=3)
    (row,) = evaluate(model, task, [5], samples=100, batch=3)
    assert abs(row.loss - loss) <= TOLERANCE
    assert row.token_accuracy == right.sum().item() / scored.sum().item()
    assert row.samples == len(batch.input_ids) == task.size("validation")
    for i, nll in enumerate(score(model, batch, False).nll.sum(1).tolist()):
        one = batch._replace(**{name: getattr(batch, name)[i : i + 1] for name in ("input_ids", "labels")})
        one = one._replace(attention_mask=batch.attention_mask[i : i + 1])
        loss_i, _, scored_i = whole(model, one)
        assert abs(nll / scored_i.sum().item() - loss_i) <= TOLERANCE, f"row {i}"
    assert row.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    # Every byte but the first of each piece is predicted, eos is no byte; a piece's last token is the next one's first.
    spelled = sum(len(text.encode()) for text in TEXTS) - task.size("validation")
    nats = row.loss * scored.sum().item()
    assert row.bits_per_byte == pytest.approx(nats / math.log(2) / spelled, rel=1e-6)


def test_loss_by_segment(text_settings):
    model = confident_model(259, 8)
    task = make_task(validate(DataConfig, text_settings), 8, 259, global_batch=8)
    batch = task.batch("validation", 0, range(task.size("validation")), Difficulty.fixed(5))
    (row,) = evaluate(model, task, [5], samples=100, batch=8)
    assert len(row.by_segment) == 5
    for s, loss in enumerate(row.by_segment):
        labels = torch.full_like(batch.labels, -100)
        labels[:, 8 * s : 8 * s + 8] = batch.labels[:, 8 * s : 8 * s + 8]
        assert abs(loss - whole(model, batch._replace(labels=labels))[0]) <= TOLERANCE, f"segment {s}"


class Told:
    """A task whose answers are in part what the model says: all in rows 0, 3, ..., the first in rows 1, 4, ..."""

    def __init__(self, task, model):
        self.task, self.model = task, model

    def __getattr__(self, name):
        return getattr(self.task, name)

    def batch(self, *where):
        batch = self.task.batch(*where)
        with torch.no_grad():
            said = self.model(batch.input_ids).logits.argmax(-1)
        taken = batch.labels != -100
        taken[1::3] &= taken[1::3].cumsum(1) == 1
        taken[2::3] = False
        labels = torch.where(taken, said, batch.labels)
        # Nothing else is right by chance.
        labels = torch.where((labels == said) & ~taken, (said + 1) % 6, labels)
        return batch._replace(labels=labels)


def test_accuracy_counts_whole_answers():
    model = confident_model(6, 5)
    settings = {"task": "rewrite", "retrieval": {"symbols": 2, "value_length": 2}}
    task = Told(make_task(validate(DataConfig, settings), None, 6), model)
    for row in evaluate(model, task, [1, 3], samples=50, batch=16):
        # Batches of 16, 16, 16 and 2 rows; three tokens of each are scored.
        whole_answers, first_tokens = 3 * 6 + 1, 3 * 5 + 1
        assert row.accuracy == whole_answers / 50
        assert row.token_accuracy == (3 * whole_answers + first_tokens) / 150
        assert row.samples == 50 and row.tokens == 5 * (row.length + 1) and row.bits_per_byte is None


def test_retrieval_equals_the_plain_forward():
    task = make_task(DataConfig(), None, 20)
    model = confident_model(20, 4)
    (row,) = evaluate(model, task, [3], samples=20, batch=16)
    # Batch by batch: a step's samples are its own.
    batches = [task.batch("validation", step, range(n), Difficulty.fixed(3)) for step, n in enumerate((16, 4))]
    losses = [whole(model, batch)[0] for batch in batches]
    assert abs(row.loss - (16 * losses[0] + 4 * losses[1]) / 20) <= TOLERANCE


def test_zero_memory_reads_every_segment_alone():
    model = confident_model(20, 4)
    batch = make_task(DataConfig(), None, 20).batch("validation", 0, range(4), Difficulty.fixed(5))
    batch = batch._replace(labels=torch.cat([batch.input_ids[:, 1:], batch.input_ids[:, :1]], dim=1))
    kept, emptied = score(model, batch, False), score(model, batch, True)
    assert torch.equal(kept.nll[:, 0], emptied.nll[:, 0])
    assert ((kept.nll[:, 1:] - emptied.nll[:, 1:]).abs() > 1e-3).all()
    for s in range(6):
        alone = score(model, batch._replace(input_ids=batch.input_ids[:, 4 * s : 4 * s + 4],
                                            labels=batch.labels[:, 4 * s : 4 * s + 4]), False)  # fmt: skip
        assert torch.equal(alone.nll[:, 0], emptied.nll[:, s])


@pytest.mark.parametrize("piece", [5, 7, 16384])
def test_bytes_are_counted_piece_by_piece(monkeypatch, piece):
    """No piece ends in the middle of a character."""
    monkeypatch.setattr("armt_dist.evaluation.evaluate.DECODED", piece)
    tokenizer, text = byte_tokenizer(), "".join(TEXTS) + "—\U0001f600é" * 9
    labels = torch.tensor([[-100, *tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    assert scored_bytes(tokenizer, labels) == len(text.encode())


RESIDENT = """
import sys
import psutil, torch
sys.path.insert(0, "tests")
from support.models import confident_model
from armt_dist.data.task import Batch
from armt_dist.evaluation.evaluate import score

torch.set_num_threads(1)
model = confident_model(50, 16)
for segments in (8, 64, 2048):
    ids = torch.randint(0, 50, (32, 16 * segments))
    found = score(model, Batch(ids, ids, None, []), False)
    # What the tokens themselves take is not the model's.
    print((found.peak_bytes - 2 * ids.numel() * 8) / 2**20)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length():
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT], cwd=ROOT, env={"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    _, short_mb, long_mb = map(float, done.stdout.split())
    # Keeping the hidden states of all segments would take 62 MB.
    assert long_mb - short_mb < 8, f"{short_mb:.0f} MB for 64 segments, {long_mb:.0f} MB for 2048"


@pytest.fixture
def exported(tmp_path):
    """A model folder as launch/consolidate.py leaves it, as far as evaluation reads it."""
    folder = tmp_path / "model"
    confident_model(20, 4).save_pretrained(folder)
    make_task(DataConfig()).tokenizer.save_pretrained(folder)
    (folder / TASK_FILE).write_text(json.dumps({"data": {"task": "rewrite", "seed": 7, "retrieval": {"symbols": 16}}}))
    return folder


def test_command(exported, tmp_path, monkeypatch, capsys):
    out = tmp_path / "results"
    arguments = ["--model", exported, "--lengths", 3, 12, "--samples", 20, "--batch", 8, "--out", out]
    code, stdout, stderr = call_script("evaluate.py", arguments, monkeypatch, capsys)
    assert code == 0 and not stderr
    assert [line.split()[:2] for line in stdout.splitlines()[1:3]] == [["3", "20"], ["12", "20"]]
    result = json.loads((out / "evaluation.json").read_text())
    task = make_task(validate(DataConfig, {"task": "rewrite", "seed": 7}), None, 20)
    expected = evaluate(load_model(exported, "cpu"), task, [3, 12], 20, 8)
    for row, found in zip(expected, result["rows"], strict=True):
        assert (row.length, row.loss, row.accuracy) == (found["length"], found["loss"], found["accuracy"])
    assert (out / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    # Two evaluations of one model stay apart.
    code, _, _ = call_script(
        "evaluate.py", ["--model", exported, "--lengths", 3, "--samples", 4, "--zero-memory"], monkeypatch, capsys
    )
    assert code == 0 and (exported / "evaluation_zero_memory" / "evaluation.png").exists()


def test_text_through_the_command(text_settings, tmp_path, monkeypatch, capsys):
    """The tokenizer of the folder is used, whatever training called it; its task can be replaced."""
    folder = tmp_path / "model"
    confident_model(259, 8).save_pretrained(folder)
    make_task(validate(DataConfig, text_settings), 8, global_batch=8).tokenizer.save_pretrained(folder)
    text_settings["text"]["tokenizer"] = "a/tokenizer/that/is/gone"
    (folder / TASK_FILE).write_text(json.dumps({"data": text_settings}))
    code, stdout, stderr = call_script("evaluate.py", ["--model", folder, "--trust-data"], monkeypatch, capsys)
    assert code == 0, stderr
    assert [line.split()[0] for line in stdout.splitlines()[:4]] == ["segments", "1", "2", "4"]
    assert "bits_per_byte" in stdout
    changed = ["--task", "babilong", "--data", "data.babilong.tasks=[qa1, qa2]", "data.seed=1"]
    changed += ["--samples", 2, "--lengths", 200, 210]
    code, stdout, stderr = call_script("evaluate.py", ["--model", folder, *changed], monkeypatch, capsys)
    assert code == 0, stderr
    result = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    data = result["data"]
    assert data["task"] == "babilong" and data["babilong"]["tasks"] == ["qa1", "qa2"] and data["seed"] == 1
    # One task at a time, and a heat map.
    assert [(row["task"], row["length"]) for row in result["rows"]] == [
        ("qa1", 200), ("qa1", 210), ("qa2", 200), ("qa2", 210)
    ]  # fmt: skip
    assert (folder / "evaluation" / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_default_lengths_are_those_that_the_task_has():
    settings = {"task": "remember", "retrieval": {"symbols": 16}}
    assert default_lengths(make_task(validate(DataConfig, settings))) == [5, 10]


def test_a_missing_weight_is_not_made_up(exported):
    from safetensors.torch import load_file, save_file

    from armt_dist.config import ConfigError

    weights = load_file(exported / "model.safetensors")
    del weights["memory_tokens.weight"]
    save_file(weights, exported / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="memory_tokens.weight"):
        load_model(exported)


def small_embedding(folder):
    confident_model(10, 4).save_pretrained(folder)


def other_model(folder):
    (folder / "config.json").write_text('{"model_type": "gpt2"}')


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def run_folder(folder):
    (folder / "config.json").unlink()
    (folder / "checkpoints").mkdir()


def no_task(folder):
    (folder / TASK_FILE).unlink()


def broken_task(folder):
    (folder / TASK_FILE).write_text("{")


BAD = {
    "vocab_size=10: the tokenizer of task=rewrite has 20": (small_embedding, []),
    "model=.*model_type is gpt2": (other_model, []),
    "model=.*cannot be loaded": (truncated, []),
    "model=.*no config.json in it; export it": (run_folder, []),
    "task: .*does not say": (no_task, []),
    "model=.*armt_task.json: not readable": (broken_task, []),
    "model=nowhere: no config.json": (None, ["--model", "nowhere"]),
    "task=sing: no such task; one of rewrite": (None, ["--task", "sing"]),
    "lengths: none given": (None, ["--lengths"]),
    "lengths=0: must be at least 1": (None, ["--lengths", "0"]),
    "samples=0": (None, ["--samples", "0"]),
    "batch=-1": (None, ["--batch", "-1"]),
    "pairs=17: only 16": (None, ["--task", "remember", "--lengths", "17"]),
    "data.retrieval.symbol=3: unknown key": (None, ["--data", "data.retrieval.symbol=3"]),
    "override='symbols'": (None, ["--data", "symbols"]),
    "device=warp": (None, ["--device", "warp"]),
    "out=.*cannot be written": (None, ["--out", "model/config.json/out"]),
}


@pytest.mark.parametrize("says", BAD)
def test_bad_input_is_one_line(says, exported, tmp_path, monkeypatch, capsys):
    damage, arguments = BAD[says]
    monkeypatch.chdir(tmp_path)
    if damage:
        damage(exported)
    before = sorted(tmp_path.rglob("*"))
    code, _, stderr = call_script("evaluate.py", ["--model", "model", *arguments], monkeypatch, capsys)
    assert code == 2 and re.match(f"error: {says}", stderr) and stderr.count("\n") == 1, stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_the_seed_of_training_is_kept(exported):
    assert read_task(exported, None, []).seed == 7
    assert read_task(exported, "remember", ["data.retrieval.symbols=9"]).retrieval.symbols == 9
