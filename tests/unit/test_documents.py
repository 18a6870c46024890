"""Packed documents do not see each other: on every path, with every memory, within segments and across them."""

import json

import pytest
import torch
from support.golden import TOLERANCES, assert_close, assert_gradients
from support.models import small_model
from support.oracle import GRID, oracle, random_batch, random_starts, scheduled_loss, shifted

from armt_dist.config import validate
from armt_dist.data.lengths import Difficulty
from armt_dist.data.sections import DataConfig
from armt_dist.data.task import IGNORE
from armt_dist.data.tasks import make_task
from armt_dist.evaluation.evaluate import score
from armt_dist.model.modeling_armt import ARMTCache
from armt_dist.runtime.executor import ScheduledLM
from armt_dist.runtime.piece import cut_piece

SEGMENT = 8
MODELS = {
    "llama": dict(),
    "gpt2_sink": dict(family="gpt2", sink=2),
    # Two channels a head would leave z·q close to 0, where float32 gradients mean nothing.
    "gpt_neox_heads": dict(family="gpt_neox", n_heads=2, d_mem=16),
    "no_denominator": dict(use_denom=False, correction=False),
    "window": dict(sliding_window=5, sink=1),
    "window_detached": dict(family="gpt_neox", sliding_window=SEGMENT, detach_window=True),
    "window_restart": dict(sliding_window=SEGMENT, sink=1, window_positions="restart"),
    "rmt": dict(memory_kind="rmt"),
    "rmt_gpt2": dict(family="gpt2", memory_kind="rmt"),
    "rmt_window": dict(memory_kind="rmt", sliding_window=5),
    "transformer_xl": dict(memory_kind="transformer_xl"),
}
models = pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)


@models
@pytest.mark.parametrize("states", ["store", "rebuild", "recompute"])
def test_the_scheduled_gradients_are_those_of_the_plain_forward(options, states):
    model, batch = small_model(**options).eval(), random_batch()
    starts = random_starts(batch[0])
    loss, gradients = oracle(model, *batch, starts)
    assert loss != oracle(model, *batch)[0], "the documents change nothing"
    for chunks in (1, 3):
        found = scheduled_loss(model, *batch, starts, grid=GRID._replace(chunks=chunks), states=states)
        assert_close("loss", found[0], loss, TOLERANCES["loss"])
        assert_gradients(found[1], gradients)


@torch.no_grad()
@models
def test_the_cache_gives_the_logits_of_the_plain_forward(options):
    model, ids = small_model(**options).eval(), random_batch(tokens=37, pad=0)[0]
    starts = random_starts(ids)
    whole = model(ids, document_starts=starts).logits
    for pieces in ([37], [1] * 37, [8, 8, 8, 8, 5], [3, 10, 1, 22, 1]):
        cache, logits = ARMTCache(model.initial_states(len(ids))), []
        for part, begins in zip(ids.split(pieces, 1), starts.split(pieces, 1), strict=True):
            # Where none begins, none need be given.
            logits.append(model(part, cache=cache, document_starts=begins if begins.any() else None).logits)
        assert_close(f"logits in {pieces}", torch.cat(logits, 1), whole, TOLERANCES["logits"])


def losses(model, ids, starts, path):
    """The loss of every token that is predicted, [B, N - 1], the same bits whatever the others are."""
    labels = shifted(ids.masked_fill(starts, IGNORE))
    if path == "scheduled":
        found = torch.zeros(ids.shape)
        # One token is scored at a time, so that no sum mixes documents.
        for row, place in (labels != IGNORE).nonzero().tolist():
            one = torch.full_like(labels, IGNORE)
            one[row, place] = labels[row, place]
            grid = GRID._replace(layers=model.config.num_hidden_layers)
            piece = cut_piece(ids, one, None, model.config, grid, document_starts=starts)
            found[row, place] = ScheduledLM(model)(piece).nll
        return found
    if path == "cached":
        cache = ARMTCache(model.initial_states(len(ids)))
        steps = zip(ids.split(5, 1), starts.split(5, 1), strict=True)
        logits = torch.cat([model(part, cache=cache, document_starts=begins).logits for part, begins in steps], 1)
    else:
        logits = model(ids, document_starts=starts).logits
    nll = -logits.log_softmax(-1).gather(2, labels.clamp_min(0)[..., None]).squeeze(-1)
    return nll.masked_fill(labels == IGNORE, 0)


@torch.no_grad()
@models
@pytest.mark.parametrize("path", ["plain", "cached", pytest.param("scheduled", marks=pytest.mark.slow)])
def test_no_document_changes_the_loss_of_another(options, path):
    """Not by one bit: borders within segments, at their ends, and several in one."""
    model = small_model(**options).eval()
    ids = random_batch(tokens=30, batch=1, pad=0)[0]
    begins = [0, 5, 7, 16, 27]
    starts = torch.zeros(1, 30, dtype=torch.bool)
    starts[0, begins[1:]] = True
    document = starts[0].long().cumsum(0)
    before = losses(model, ids, starts, path)
    for changed in range(len(begins)):
        other = torch.where(document == changed, (ids + 7) % 50, ids)
        after = losses(model, other, starts, path)
        same = document != changed
        assert torch.equal(before[0, same], after[0, same]), f"document {changed} changes others"
        assert not torch.equal(before[0, ~same], after[0, ~same]), f"document {changed} does not change itself"


@torch.no_grad()
@models
def test_documents_that_fill_segments_are_as_alone(options):
    model, ids = small_model(**options).eval(), random_batch(tokens=6 * SEGMENT, batch=2, pad=0)[0]
    starts = torch.zeros_like(ids)
    starts[:, [2 * SEGMENT, 5 * SEGMENT]] = 1
    packed = model(ids, document_starts=starts).logits
    alone = [model(part).logits for part in ids.split([2 * SEGMENT, 3 * SEGMENT, SEGMENT], 1)]
    assert_close("logits", packed, torch.cat(alone, 1), TOLERANCES["logits"])


def test_the_first_token_of_a_document_is_not_predicted_from_the_one_before():
    model, (ids, labels, mask) = small_model().eval(), random_batch()
    starts = random_starts(ids)
    labelled = model(ids, attention_mask=mask, labels=labels, document_starts=starts).loss
    masked = model(ids, attention_mask=mask, labels=labels.masked_fill(starts, IGNORE), document_starts=starts).loss
    assert torch.equal(labelled, masked)
    with pytest.raises(ValueError, match=r"document_starts of shape \[4, 3\]: must be that of input_ids, \[4, 29\]"):
        model(ids, document_starts=starts[:, :3])


@pytest.fixture
def books(tmp_path):
    """Five short texts in one file."""
    path = tmp_path / "books.jsonl"
    texts = [letter * count for letter, count in zip("abcde", (30, 7, 50, 41, 33), strict=True)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


@pytest.mark.parametrize("streaming", [True, False])
def test_packed_batches_say_where_texts_begin(streaming, books):
    dataset = {"name": "json", "data_files": str(books), "streaming": streaming, "validation_split": "train"}
    fields = {"dataset": dataset, "sequence_tokens": 64, "pack": True}
    for cross in (False, True):
        tree = {"task": "text", "text": {**fields, "cross_documents": cross}}
        task = make_task(validate(DataConfig, tree), 16, global_batch=2)
        batch = task.batch("train", 0, range(2), Difficulty.fixed(4))
        starts = batch.document_starts
        mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
        if cross:
            assert starts is None and (batch.labels >= 0).sum() == (mask.sum(1) - 1).sum()
            continue
        for ids, labels, row, real in zip(batch.input_ids, batch.labels, starts, mask.bool(), strict=True):
            # After an end of text, but never at the beginning of a row.
            assert row.tolist() == [False, *((ids[:-1] == 257) & real[1:]).tolist()]
            scored = real[1:] & ~row[1:]
            assert (labels[:-1][~scored] == IGNORE).all() and torch.equal(labels[:-1][scored], ids[1:][scored])
    # A shorter sample is a window of the piece.
    short = task.batch("train", 0, range(2), Difficulty.fixed(2))
    assert short.input_ids.shape == (2, 32)


def test_evaluation_keeps_documents_apart(books):
    dataset = {"name": "json", "data_files": str(books), "validation_split": "train"}
    tree = {"task": "text", "text": {"dataset": dataset, "sequence_tokens": 64, "pack": True}}
    task = make_task(validate(DataConfig, tree), SEGMENT, global_batch=2)
    batch = task.batch("validation", 0, range(2), Difficulty.fixed(8))
    model = small_model(base=dict(vocab_size=259)).eval()
    with torch.no_grad():
        labels = torch.cat([torch.full_like(batch.labels[:, :1], IGNORE), batch.labels[:, :-1]], 1)
        out = model(batch.input_ids, batch.attention_mask, labels=labels, document_starts=batch.document_starts)
    found = score(model, batch, zero_memory=False)
    assert (found.nll.sum() / found.scored.sum()).item() == pytest.approx(out.loss.item(), rel=1e-5)
