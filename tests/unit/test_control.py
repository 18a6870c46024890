"""The control of what a memory carries, against plain loops over single texts, and what it says."""

import json
import math
import random

import pytest
import torch
from support.commands import call_script
from support.models import small_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from armt_dist.config import ConfigError, validate
from armt_dist.data.sections import DataConfig
from armt_dist.data.tasks import make_task
from armt_dist.evaluation.control import (
    Control,
    Estimate,
    Position,
    batches,
    control,
    estimate,
    grouped,
    partners_of,
    score_batch,
    score_full,
)
from armt_dist.evaluation.control_report import control_table, sentence
from armt_dist.model.memory_kind import apply
from armt_dist.model.rmt import MemoryRows
from armt_dist.model.windowed_memory import WindowState

T, S, VOCABULARY = 8, 5, 259
KINDS = {
    "armt": dict(memory_kind="armt"),
    "armt_window": dict(sliding_window=4, n_heads=2),
    "rmt": dict(memory_kind="rmt"),
    "rmt_window": dict(memory_kind="rmt", sliding_window=4),
}


def text_task(folder, texts, segments=S, segment_tokens=T, batch=4):
    """A text task whose validation texts are these."""
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    held_out = [str(folder / f"{i}.txt") for i in range(len(texts))]
    (folder / "training.txt").write_text("never read " * 100)
    section = {"files": str(folder / "training.txt"), "validation_files": held_out, "tokenizer": "byte",
               "sequence_tokens": segments * segment_tokens, "cache": str(folder / "cache")}  # fmt: skip
    return make_task(validate(DataConfig, {"task": "text", "text": section}), segment_tokens, VOCABULARY, batch)


def letters(count, seed=0):
    return "".join(random.Random(seed).choices("abcdefgh ", k=count))


def model_of(kind):
    return small_model(segment_tokens=T, base=dict(vocab_size=VOCABULARY), **KINDS[kind]).eval()


def by_hand(kind, own, other):
    """State by state, with its fields written out: the memory of `other`, the window of `own`."""
    *layers, rows = zip(own, other, strict=True)
    if kind == "armt":
        return [theirs for _, theirs in layers] + [rows[0]]
    if kind == "armt_window":
        mixed = [WindowState(b.A, b.z, a.keys, a.values, a.seen) for a, b in layers]
        return [*mixed, rows[0]]
    return [a for a, _ in layers] + [MemoryRows(rows[1].rows, rows[1].written)]


def nats(model, hidden, labels):
    return cross_entropy(model.backbone.head(hidden).flatten(0, 1), labels.flatten(), ignore_index=-100,
                         reduction="sum").item()  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_losses_with_each_memory(kind, tmp_path):
    """Against one text at a time; for ARMT cell by cell."""
    model = model_of(kind)
    batch = next(batches(text_task(tmp_path, [letters(40, i) for i in range(3)]), S, 3, 4))
    partners = torch.tensor([1, 2, 0])
    found = score_batch(model, batch, partners)
    ids, labels = batch.input_ids.split(T, 1), batch.labels.split(T, 1)
    chains = [[model.initial_states(1)] for _ in range(3)]
    with torch.no_grad():
        for row, chain in enumerate(chains):
            for s in range(S):
                chain.append(model.segment(ids[s][row : row + 1], chain[-1])[1])
        for row in range(3):
            for s in range(S):
                own, other = chains[row][s], chains[partners[row]][s]
                entering = {"own": own, "other": by_hand(kind, own, other)}
                entering["none"] = by_hand(kind, own, model.initial_states(1))
                for name, states in entering.items():
                    hidden = read(model, ids[s][row : row + 1], states)
                    expected = nats(model, hidden, labels[s][row : row + 1])
                    assert found[name][row, s].item() == pytest.approx(expected, rel=1e-4), (name, row, s)
    assert torch.equal(found["own"][:, 0], found["none"][:, 0])
    assert (found["own"][:, 1:] - found["other"][:, 1:]).abs().min() > 1e-5
    assert (found["other"][:, 1:] - found["none"][:, 1:]).abs().min() > 1e-5


def read(model, ids, states):
    """Read one segment, by a plain loop over its cells unless rows are carried."""
    if model.carries_rows:
        return model.segment(ids, states)[0]
    x = model.embed_segments(ids, [T])
    context = model.context(x, None)
    for layer, state in zip(model.layers, states, strict=False):
        x, update = layer.cell(x, state, context)
        apply(state, update)
    return model.backbone.norm(x)[:, model.config.head_rows : model.config.head_rows + T]


def test_full_attention_is_the_bases_own(tmp_path):
    """As the base alone computes it, and the layers are whole again afterwards."""
    model = model_of("armt_window")
    batch = next(batches(text_task(tmp_path, [letters(40, i) for i in range(2)]), S, 2, 4))
    before = score_batch(model, batch, torch.tensor([1, 0]))
    found = score_full(model, batch, 3 * T + 1)
    alone = AutoModelForCausalLM.from_config(model.config.base).eval()
    plain = {name.removeprefix("base.").replace(".layer.", "."): value for name, value in model.state_dict().items()}
    alone.load_state_dict({name: plain[name] for name in alone.state_dict()})
    with torch.no_grad():
        logits = alone(batch.input_ids[:, : 3 * T]).logits
    losses = cross_entropy(logits.flatten(0, 1), batch.labels[:, : 3 * T].flatten(), reduction="none").view(2, 3, T)
    assert torch.allclose(found, losses.sum(2).double(), rtol=1e-4)
    assert torch.equal(score_batch(model, batch, torch.tensor([1, 0]))["own"], before["own"])


def test_sums_become_bits(tmp_path):
    """By position and over all but the first, with bytes of text that are more than its tokens' number."""
    model = model_of("armt")
    task = text_task(tmp_path, [letters(20, i) + "é" * 10 for i in range(4)])
    found = control(model, task, S, 100, 2, full_tokens=2 * T)
    assert (found.segments, found.samples, found.texts, found.same_text) == (S, 4, 4, 0)
    assert [(p.first, p.last) for p in found.positions] == [(1, 1), (2, 2), (3, 4), (5, 5)]
    rows = list(batches(task, S, 100, 2))
    assert [len(batch.sample_ids) for batch in rows] == [2, 2]
    own = sum(score_batch(model, batch, torch.tensor([1, 0]))["own"][:, 1].sum().item() for batch in rows)
    second = found.positions[1]
    assert second.bits_per_byte["own"] == pytest.approx(own / math.log(2) / (4 * T))
    assert second.bits_per_token["own"] == pytest.approx(second.bits_per_byte["own"])
    assert set(second.bits_per_byte) == {"own", "other", "none", "full"} and "full" not in found.after.bits_per_byte
    gap = found.after.bits_per_byte["other"] - found.after.bits_per_byte["own"]
    assert found.after.worse["other"].value == pytest.approx(gap)
    assert f"{second.bits_per_byte['full']:.4f}" in control_table(found)


def test_errors_are_over_texts():
    """Samples of equal size: the standard error of their mean and, where texts have several parts, of the texts'."""
    sums, size = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64), torch.full((4,), 2)
    found = estimate(sums, size, [0, 1, 2, 3])
    assert found == pytest.approx((2.0, (sums / 2).std().item() / 2, 4))
    pairs = torch.tensor([1.5, 6.5]) / 2
    assert estimate(sums, size, [7, 7, 3, 3]) == pytest.approx((2.0, pairs.std().item() / 2**0.5, 2))
    assert estimate(sums, size, [5, 5, 5, 5]) == found
    assert (
        Estimate(1.0, 0.4, 100).is_clear and not Estimate(1.0, 0.4, 3).is_clear and not Estimate(0.0, 0.0, 3).is_clear
    )


def test_partners_and_groups():
    assert partners_of([0, 1, 2]).tolist() == [1, 2, 0]
    assert partners_of([0, 0, 1, 1]).tolist() == [2, 3, 0, 1]
    assert [list(group) for group in grouped(6)] == [[0], [1], [2, 3], [4, 5]]
    assert [list(group) for group in grouped(2)] == [[0], [1]]


def test_parts_of_one_text_are_not_partners_if_there_are_others(tmp_path):
    task = text_task(tmp_path, [letters(4 * S * T, i) for i in range(2)])
    for batch in batches(task, S, 8, 4):
        texts = [task.text_of(number) for number in batch.sample_ids]
        partners = partners_of(texts).tolist()
        assert len(texts) == 4 and all(texts[i] != texts[j] for i, j in enumerate(partners)), texts


def test_an_odd_sample_is_not_alone(tmp_path):
    task = text_task(tmp_path, [letters(40, i) for i in range(5)])
    for batch in (1, 2, 3, 4):
        sizes = [len(found.sample_ids) for found in batches(task, S, 5, batch)]
        assert sum(sizes) == 5 and min(sizes) >= 2, sizes


def test_a_memory_that_carries_content(tmp_path):
    """Trained on texts that repeat a letter of their own, in segments of which each has to remember it."""
    task = text_task(tmp_path, [f".{letter}" * 6 for letter in "abcdefgh"], segments=6, segment_tokens=2, batch=8)
    model = small_model(segment_tokens=2, base=dict(vocab_size=VOCABULARY))
    batch = next(batches(task, 6, 8, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(110):
        loss = model(batch.input_ids, labels=batch.input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = control(model, task, 6, 8, 8)
    assert model.training
    assert found.after.bits_per_byte["own"] < 0.3 and found.after.worse["other"].value > 0.5
    assert sentence(found).startswith("The memory carries content: another text's in its place costs")


def test_a_memory_without_output(tmp_path):
    """Nothing that is written changes anything."""
    model = model_of("armt")
    for layer in model.layers:
        torch.nn.init.zeros_(layer.memory.W_mv.weight)
    found = control(model, text_task(tmp_path, [letters(40, i) for i in range(4)]), S, 4, 4)
    assert found.after.worse["other"][:2] == (0, 0)
    assert sentence(found) == (
        "The memory carries no content that can be told: another text's in its place costs 0.0000 ± 0.0000 bits per "
        "byte after the first segment (4 samples of 4 texts); no memory costs 0.0000 ± 0.0000."
    )


def test_what_it_says():
    def found(other, none, share=None, same=0):
        names = {"own": 2.0, "other": 2.1, "none": 2.2, "full": 1.9}
        position = Position(2, 8, names, names, {"other": Estimate(*other, 30), "none": Estimate(*none, 30)})
        return Control(8, 60, 30, same, [position], position, share)

    basis = "bits per byte after the first segment (60 samples of 30 texts)"
    assert sentence(found((0.1, 0.01), (0.2, 0.01), 0.5)) == (
        f"The memory carries content: another text's in its place costs 0.1000 ± 0.0100 {basis}; no memory costs "
        "0.2000 ± 0.0100; that is 50% of what the base with full attention has over another text's memory."
    )
    adapts = sentence(found((0.01, 0.01), (0.2, 0.01)))
    assert adapts.startswith("The memory carries no content that can be told: another text's in its place costs 0.0100")
    assert "which is what any memory gives to text that is cut up; the base with full attention is no better" in adapts
    assert sentence(found((-0.1, 0.01), (0.2, 0.01), same=2)).startswith("The memory misleads")
    assert "Of the other memories 2 are of another part" in sentence(found((-0.1, 0.01), (0.2, 0.01), same=2))


@pytest.mark.parametrize(
    "kind, texts, length, full, reason",
    [
        (
            "armt",
            1,
            S,
            None,
            "control: 1 of 1 samples has 5 segments, and another text's memory takes two; give more or",
        ),
        ("armt", 3, 1, None, "control length=1: no memory enters the first segment; give --lengths 2 or more"),
        ("armt", 3, S, 8, "full-attention=8: must be from 16, two segments, to 64, which the base can read at once"),
        ("armt", 3, S, 65, "full-attention=65: must be from 16"),
        ("xl", 3, S, None, "control: memory_kind=transformer_xl carries a window and no memory"),
    ],
)
def test_what_cannot_be_compared(kind, texts, length, full, reason, tmp_path):
    options = {**KINDS, "xl": dict(memory_kind="transformer_xl")}[kind]
    model = small_model(segment_tokens=T, base=dict(vocab_size=VOCABULARY), **options)
    with pytest.raises(ConfigError) as error:
        control(model, text_task(tmp_path, [letters(40, i) for i in range(texts)]), length, 10, 4, full_tokens=full)
    assert str(error.value).startswith(reason)


def test_a_task_without_text():
    task = make_task(validate(DataConfig, {"task": "rewrite"}), 4, 50, 4)
    with pytest.raises(ConfigError, match="control: compares how well text is predicted; give --task text"):
        control(small_model(segment_tokens=4), task, 5, 10, 4)


def test_the_command(tmp_path, monkeypatch, capsys):
    model_of("armt").save_pretrained(tmp_path / "model")
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(letters(200, i))
    data = [f"data.text.files={tmp_path}/0.txt", f"data.text.validation_files=[{tmp_path}/1.txt, {tmp_path}/2.txt]"]
    data += ["data.text.sequence_tokens=40", "data.text.tokenizer=byte"]
    arguments = ["--model", tmp_path / "model", "--task", "text", "--lengths", 2, S, "--out", tmp_path / "out",
                 "--no-self-check", "--data", *data]  # fmt: skip
    options = ["--control", "--full-attention", 40]
    code, out, errors = call_script("evaluate.py", [*arguments, *options], monkeypatch, capsys)
    assert code == 0, errors
    found = json.loads((tmp_path / "out/control_text.json").read_text())
    assert found["says"] in out and found["samples"] == 10 and found["texts"] == 2 and found["same_text"] == 0
    assert (tmp_path / "out/control_text.png").stat().st_size > 10_000
    for wrong, reason in (
        (["--full-attention", 40], "full-attention=40: is a part of --control; give both"),
        (["--control", "--zero-memory"], "control: measures what --zero-memory does, too; give one of them"),
        (["--control", "--samples", 1], "control: 1 of 1 samples has 5 segments"),
    ):
        code, _, errors = call_script("evaluate.py", [*arguments, *wrong], monkeypatch, capsys)
        assert code == 2 and reason in errors and errors.count("\n") == 1, errors
