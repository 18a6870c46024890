"""Texts that are read on from step to step."""

import numpy as np
import pytest
import torch

from armt_dist.config import ConfigError, validate
from armt_dist.data.lengths import Difficulty
from armt_dist.data.sampling import permutation
from armt_dist.data.sections import DataConfig
from armt_dist.data.tasks import make_task
from armt_dist.data.text.lanes import Lanes
from armt_dist.data.text.token_store import TokenStore

SEED, ROWS, TOKENS = 3, 4, 10
LENGTHS = (37, 1, 92, 8, 55, 120, 2, 61)


def some_lanes():
    """Return lanes whose tokens all differ, and the tokens of an epoch end to end with the places where texts begin."""
    ends = np.cumsum(LENGTHS)
    texts = [np.arange(end - n, end, dtype=np.int32) for n, end in zip(LENGTHS, ends, strict=True)]

    def joined(epoch):
        order = permutation(len(texts), SEED, epoch)
        begins = np.cumsum([0, *(len(texts[i]) for i in order)])[:-1]
        return np.concatenate([texts[i] for i in order]), set(begins.tolist())

    return Lanes(TokenStore(np.concatenate(texts), ends), SEED, ROWS), joined


@pytest.mark.parametrize("apart", [True, False])
def test_every_row_goes_on_where_it_ended(apart):
    """For two epochs: tokens, labels (that of the last position too) and the places where memory starts anew."""
    lanes, joined = some_lanes()
    length = sum(LENGTHS) // ROWS
    steps = length // TOKENS
    for epoch in range(2):
        stream, begins = joined(epoch)
        for position in range(steps):
            batch = lanes.batch(epoch * steps + position, range(ROWS), TOKENS, apart)
            starts = torch.zeros(ROWS, TOKENS) if batch.document_starts is None else batch.document_starts
            for row in range(ROWS):
                first = row * length + position * TOKENS
                assert batch.input_ids[row].tolist() == stream[first : first + TOKENS].tolist()
                for i in range(TOKENS):
                    at = first + i
                    anew = (apart and at in begins) or (position == 0 and i == 0)
                    assert bool(starts[row, i]) == anew, (epoch, position, row, i)
                    known = at + 1 < len(stream) and not (apart and at + 1 in begins)
                    assert batch.labels[row, i] == (stream[at + 1] if known else -100)


def test_a_row_depends_on_nothing_but_step_and_row():
    lanes, _ = some_lanes()
    whole = [lanes.batch(step, range(ROWS), TOKENS, True) for step in range(20)]
    for step in (13, 2, 19, 0):
        part = lanes.batch(step, range(1, 3), TOKENS, True)
        assert part.input_ids.equal(whole[step].input_ids[1:3]) and part.labels.equal(whole[step].labels[1:3])
        assert part.sample_ids == whole[step].sample_ids[1:3]


def config(folder, **fields):
    text = {"files": str(folder), "validation_fraction": 0.0, "sequence_tokens": 64}
    return validate(DataConfig, {"task": "text", "carry_memory": True, "text": text | fields})


def test_the_task_reads_on(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghijklmnopqrstuvwxyz" * 40)
    task = make_task(config(tmp_path), 16, None, 2)
    batches = [task.batch("train", step, range(2), Difficulty.fixed(2)) for step in range(3)]
    read = torch.cat([batch.input_ids for batch in batches], 1)
    assert task.tokenizer.decode(read[0][1:]).startswith("bcdefghijklmnopqrstuvwxyzabc")
    assert torch.cat([batch.labels for batch in batches], 1)[:, :-1].equal(read[:, 1:])
    assert not task.pads() and task.size("train") is None


def test_too_little_text(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    task = make_task(config(tmp_path), 16, None, 2)
    with pytest.raises(ConfigError, match="a step reads 2 x 64 tokens, and the texts for training have 6; give more"):
        task.batch("train", 0, range(2), Difficulty.fixed(4))


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"task": "rewrite", "carry_memory": True}, "data.task=rewrite have no continuation"),
        (
            {"task": "text", "carry_memory": True, "text": {"files": "a", "min_tokens": 9}},
            "min_tokens=9: has no effect",
        ),
        (
            {"task": "text", "carry_memory": True, "text": {"dataset": {"name": "a"}}},
            "set text.dataset.streaming=false",
        ),
    ],
)
def test_what_cannot_continue(tree, message):
    with pytest.raises(ConfigError, match=message):
        validate(DataConfig, tree)
