"""Mixtures: which task makes a row, that no sample comes twice in an epoch, and what cannot be mixed."""

import json
from collections import Counter

import pytest
import torch
from support.chats import chat_tokenizer

from armt_dist.config import ConfigError, validate
from armt_dist.data.lengths import Difficulty
from armt_dist.data.mixture import BLOCK, deal, shares
from armt_dist.data.sections import DataConfig
from armt_dist.data.tasks import make_task
from armt_dist.schedule.planned_run import Samples, longest_samples
from armt_dist.training.checks import lengths_of

ROWS = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(100)]
CHATS = [{"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "y"}]} for i in range(40)]


def file_of(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def part_of(path, rows, **section):
    return {"task": "instructions", "instructions": {"files": file_of(path, rows), "sequence_tokens": 64, **section}}


def plays_of(folder):
    for i in range(4):
        (folder / f"{i}.txt").write_text("".join(f"{i}:{j} " for j in range(100)))
    return {"task": "text", "text": {"files": str(folder / "*.txt"), "sequence_tokens": 64}}


def build(parts, global_batch=8, segment_tokens=16):
    config = validate(DataConfig, {"task": "mixture", "mixture": {"parts": parts}})
    return make_task(config, segment_tokens, global_batch=global_batch)


@pytest.fixture
def mixture(tmp_path):
    """Three rows of prompts for one of chats and one of plays."""
    tokenizer = chat_tokenizer(tmp_path / "tokenizer")
    chats = part_of(tmp_path / "chats.jsonl", CHATS, tokenizer=tokenizer, validation_fraction=0)
    prompts = part_of(tmp_path / "rows.jsonl", ROWS, validation_fraction=0)
    return lambda: build([{"weight": 3, **prompts}, chats, plays_of(tmp_path)])


def test_rows_come_in_proportion_and_none_twice_in_an_epoch(mixture):
    task = mixture()
    seen = [i for step in range(20) for i in task.batch("train", step, range(8), Difficulty(4)).sample_ids]
    count = Counter(i % 3 for i in seen)
    assert abs(count[0] - 96) < 20 and count[1] > 10 and count[2] > 10
    prompts = [i // 3 for i in seen if i % 3 == 0]
    assert len(set(prompts[:100])) == min(100, len(prompts))
    notes = task.notes()
    assert "60.0% parts.0 (instructions)" in notes[-1] and any("assistant" in note for note in notes)


def test_rows_are_the_same_for_1_2_and_4_ranks(mixture):
    task = mixture()
    for step in (0, 200):
        whole = task.batch("train", step, range(8), Difficulty(4))
        for ranks in (2, 4):
            # Each rank has its own task, which was asked for nothing before.
            parts = [
                mixture().batch("train", step, range(r * 8 // ranks, (r + 1) * 8 // ranks), Difficulty(4))
                for r in range(ranks)
            ]
            assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)
            assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
            assert sum((part.sample_ids for part in parts), []) == whole.sample_ids


def test_validation_draws_from_parts_that_have_some(mixture):
    task = mixture()
    size = task.size("validation")
    assert size and task.size("train") is None
    ids = [
        i for step in range(-(-size // 8)) for i in task.batch("validation", step, range(8), Difficulty(4)).sample_ids
    ]
    assert {i % 3 for i in ids} == {2}, "prompts and chats hold nothing out"
    assert len(set(ids[:size])) == size


def test_a_block_has_the_exact_shares():
    assert shares([3, 1]) == (768, 256) and sum(shares([1, 1, 1])) == BLOCK and shares([1, 0]) == (BLOCK, 0)
    dealt = deal((768, 256), 1, "train", 0)
    assert Counter(dealt.sources.tolist()) == {0: 768, 1: 256}
    for source in range(2):
        assert (dealt.before[dealt.sources == source] == range((768, 256)[source])).all()
    assert (dealt.sources != deal((768, 256), 1, "train", 1).sources).any()
    with pytest.raises(ConfigError, match="parts.1.weight=0.0001: less than 1 row of 1024"):
        shares([1, 0.0001])


def test_synthetic_tasks_mix():
    task = build([{"task": "rewrite"}, {"task": "remember"}], segment_tokens=None)
    batch = task.batch("train", 0, range(8), Difficulty.fixed(3))
    assert batch.needed is not None and batch.input_ids.shape == (8, task.sequence_tokens(3))
    assert task.measure == "accuracy" and task.unit == "pairs"


def test_what_cannot_be_mixed(tmp_path):
    plays = plays_of(tmp_path)
    word = {"task": "babilong", "babilong": {}}
    with pytest.raises(
        ConfigError, match=r"data.mixture.parts.1: its tokenizer differs from that of parts.0 \(177 and 259"
    ):
        build([plays, word])
    pairs = validate(DataConfig, {"task": "mixture", "mixture": {"parts": [plays, {"task": "rewrite"}]}})
    with pytest.raises(ConfigError, match="data.mixture.parts.1: its unit is pairs, and that of parts.0 is segments"):
        lengths_of(pairs, 4)
    stream = {"task": "text", "text": {"dataset": {"name": "text", "data_files": "a.txt"}}}
    wrong = {
        "parts.1.weight=0: expected a number above 0": {"weight": 0},
        "parts.1.weight=x: expected": {"weight": "x"},
        "parts.1.seed: belongs to the data section": {"seed": 3},
        "parts.1.task=mixture: write its parts": {"task": "mixture"},
        "parts.1: text.files=3: Input should be": {"task": "text", "text": {"files": 3}},
        "parts.1: a stream is read in one order": stream,
        "parts.1: words=3: unknown key": {"words": 3},
    }
    for says, part in wrong.items():
        with pytest.raises(ConfigError, match=f"data.mixture.{says}") as caught:
            build([plays, part])
        assert "\n" not in str(caught.value)


def test_the_planner_takes_the_largest_of_all_parts():
    parts = [{"weight": 3, "task": "babilong"}, {"task": "instructions", "instructions": {"sequence_tokens": 64}}]
    run = {"model": {"segment_tokens": 16}, "curriculum": [{"segments": 4}]}
    found = longest_samples({**run, "data": {"task": "mixture", "mixture": {"parts": parts}}})
    assert found == Samples(16, 64, 0, 177, padded=True)
    with pytest.raises(ConfigError, match="data.instructions.sequence_tokens=64; use at most 4"):
        longest_samples({**run, "data": parts[1], "curriculum": [{"segments": 5}]})
    with pytest.raises(ConfigError, match="data.mixture.parts=3: expected a list"):
        longest_samples({**run, "data": {"task": "mixture", "mixture": {"parts": 3}}})
