"""The audit of a memory, against plain loops, and what it says."""

import json

import pytest
import torch
from support.commands import call_script
from support.models import small_model
from torch.nn.functional import cross_entropy

from armt_dist.config import ConfigError, validate
from armt_dist.data.lengths import Difficulty
from armt_dist.data.sections import DataConfig
from armt_dist.data.tasks import make_task
from armt_dist.evaluation import credit as credit_audit
from armt_dist.evaluation.audit import Audit, LayerAudit, audit, by_age, read, watch
from armt_dist.evaluation.audit_report import sentence

PAIRS, SAMPLES, T = 20, 6, 4
KINDS = {"armt": {}, "decay": dict(state_decay=0.9), "window": dict(sliding_window=4, n_heads=2)}


def model_and_task(name, task="rewrite"):
    model = small_model(segment_tokens=T, base=dict(initializer_range=0.1), **KINDS[name]).eval()
    return model, make_task(validate(DataConfig, {"task": task}), T, 50, SAMPLES)


def batch_of(task):
    return task.batch("validation", 0, range(SAMPLES), Difficulty.fixed(PAIRS))


@pytest.mark.parametrize("name", KINDS)
def test_states_by_segment(name):
    model, task = model_and_task(name)
    found = audit(model, task, PAIRS, SAMPLES)
    assert (found.segments, found.recent, found.measure, len(found.layers)) == (PAIRS + 1, 5, "accuracy", 2)
    batch, states = batch_of(task), model.initial_states(SAMPLES)
    with torch.no_grad():
        for s, ids in enumerate(batch.input_ids[:, :-T].split(T, 1)):
            _, states = model.segment(ids, states)
            for layer, state in zip(found.layers, states, strict=False):
                mean = state.A.mean(0)
                assert layer.mean[s] == pytest.approx(mean.norm().item(), rel=1e-4)
                spread = sum((A - mean).norm().item() ** 2 for A in state.A) / SAMPLES
                assert layer.deviation[s] == pytest.approx(spread**0.5, rel=1e-4)
    for layer in found.layers:
        assert len(layer.mean) == PAIRS and sum(layer.gates) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_the_needed_write(name):
    """What is left of it: the difference of the state with and without that segment's write, faded since."""
    model, task = model_and_task(name)
    batch = batch_of(task)
    needed = batch.needed // T
    with torch.inference_mode():
        seen = watch(model, batch, [T] * (PAIRS + 1), PAIRS, needed)
    decay = model.config.state_decay or 1.0
    states, written = model.initial_states(SAMPLES), []
    with torch.no_grad():
        for ids in batch.input_ids[:, :-T].split(T, 1):
            _, following = model.segment(ids, states)
            written.append([after.A - decay * before.A for before, after in zip(states[:2], following, strict=False)])
            states = following
    for row, s in enumerate(needed.tolist()):
        # The key of the question is that of the needed segment.
        assert batch.input_ids[row, s * T] == batch.input_ids[row, -T]
        for i, signal in enumerate(seen.signals):
            expected = written[s][i][row] * decay ** (PAIRS - 1 - s)
            assert torch.allclose(signal.A[row], expected, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_credit_is_the_gradient_of_the_state(name):
    """By autograd through the plain loop."""
    model, task = model_and_task(name)
    batch = batch_of(task)
    found = credit_audit.credit(model, batch, [T] * (PAIRS + 1))
    states, entered = model.initial_states(SAMPLES), []
    for ids in batch.input_ids.split(T, 1):
        states = [type(s)(*(t if t.requires_grad else t.clone().requires_grad_() for t in s)) for s in states]
        entered.append([(state.A, state.z) for state in states[:2]])
        hidden, states = model.segment(ids, states)
    loss = cross_entropy(
        model.backbone.head(hidden).flatten(0, 1), batch.labels[:, -T:].flatten(), ignore_index=-100, reduction="sum"
    )
    for i in range(2):
        for lag in range(1, PAIRS + 1):
            A, z = torch.autograd.grad(loss, entered[PAIRS + 1 - lag][i], retain_graph=True)
            expected = (A.flatten(1).square().sum(1) + z.flatten(1).square().sum(1)).sqrt().mean().item()
            assert found[i][lag - 1] == pytest.approx(expected, rel=1e-3, abs=1e-9), (i, lag)
    assert all(p.grad is None for p in model.parameters())


def test_documents_of_a_packed_batch_do_not_see_each_other():
    """Norms, the question and the gradients are those after the document's own beginning."""
    model, task = model_and_task("decay")
    lengths, batch = [T] * (PAIRS + 1), batch_of(task)
    starts = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    starts[:, 12 * T] = True
    packed = batch._replace(document_starts=starts)
    with torch.inference_mode():
        seen = watch(model, packed, lengths, PAIRS, None)
        alone = read(model, batch, lengths, range(12, PAIRS))
    for state, expected in zip(seen.states[:2], alone, strict=False):
        assert torch.allclose(state.A, expected.A, atol=1e-5)
    found = credit_audit.credit(model, packed, lengths)
    assert all(norms[PAIRS - 12] == 0 and norms[0] > 0 for norms in found), found


def test_where_a_needed_fact_is_not_known(monkeypatch):
    model, task = model_and_task("armt")
    batch = batch_of(task)
    unknown = batch._replace(needed=torch.full_like(batch.needed, -1))
    monkeypatch.setattr(task, "batch", lambda *_: unknown)
    found = audit(model, task, PAIRS, SAMPLES)
    assert found.samples == SAMPLES and not found.ages and found.layers[0].signal is None


def test_accuracy_by_age():
    right = torch.tensor([True, False, True, True, False])
    ages = by_age(right, torch.tensor([1, 2, 3, 4, 9]))
    assert [tuple(age) for age in ages] == [(1, 1, 1.0), (2, 1, 0.0), (4, 2, 1.0), (16, 1, 0.0)]


def layer(with_recent):
    return LayerAudit([1.0] * 25 + [4.0], [2.0] * 26, [1, 0, 0, 0, 0], 0.5, 0.1, with_recent, [])


def test_what_it_says():
    found = Audit("accuracy", 27, 64, 6, 0.41, [layer(0.42), layer(0.99)], [])
    assert sentence(found) == (
        "Layer 1 is at fault: with its memory of the last 6 segments alone, accuracy is 0.990 instead of 0.410. From "
        "segment 6 to 26 the mean of its states grows 4.0 times, the deviation from it 1.0 times."
    )
    assert sentence(found._replace(layers=[layer(0.40), layer(0.42)])).startswith("No layer's memory does harm at 27")
    text = found._replace(measure="loss", value=2.0, layers=[layer(1.5), layer(1.995)])
    assert sentence(text).startswith("Layer 0 is at fault: with its memory of the last 6 segments alone, loss is 1.500")


def test_what_cannot_be_audited():
    model, task = model_and_task("armt")
    with pytest.raises(ConfigError, match="audit length=5: too short to tell; give --lengths with at least 12"):
        audit(model, task, 5, SAMPLES)
    rmt = small_model(memory_kind="rmt", segment_tokens=T)
    with pytest.raises(ConfigError, match="memory_kind=rmt has no associations; audit an ARMT"):
        audit(rmt, task, PAIRS, SAMPLES)


def test_the_command(tmp_path, monkeypatch, capsys):
    """On text too, where nobody knows what is needed."""
    model = small_model("gpt2", base=dict(vocab_size=300), segment_tokens=T)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("To be, or not to be, that is the question. " * 40)
    text = [
        "--task",
        "text",
        "--data",
        f"data.text.files={tmp_path}/a.txt",
        f"data.text.validation_files={tmp_path}/a.txt",
    ]
    more = ["data.text.sequence_tokens=128", "data.text.tokenizer=byte", "--lengths", 16, "--samples", 4]
    (tmp_path / "b.txt").write_text("Whether 'tis nobler in the mind to suffer " * 40)
    text[3] = f"data.text.files=[{tmp_path}/a.txt, {tmp_path}/b.txt]"
    arguments = ["--model", tmp_path / "model", "--audit", "--out", tmp_path / "out", "--no-self-check"]
    code, out, errors = call_script("evaluate.py", [*arguments, *text, *more], monkeypatch, capsys)
    assert code == 0, errors
    found = json.loads((tmp_path / "out/audit_text.json").read_text())
    assert found["measure"] == "loss" and found["says"] in out and len(found["layers"]) == 2 and not found["ages"]
    assert (tmp_path / "out/audit_text.png").stat().st_size > 10_000
