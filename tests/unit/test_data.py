"""Tasks: samples are right, and a pure function of (seed, split, step, row) whatever the world size or resume."""

import json
import re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from armt_dist.config import ConfigError, validate
from armt_dist.data import retrieval
from armt_dist.data.lengths import Difficulty
from armt_dist.data.sections import DataConfig
from armt_dist.data.task import IGNORE, merged_state
from armt_dist.data.tasks import make_task
from armt_dist.data.text.dealing import BLOCK
from armt_dist.data.text.stream import merge
from armt_dist.data.tokenizers import byte_tokenizer, encode, leading_tokens, word_tokenizer

ROWS = range(8)


def task_of(tree: dict, segment_tokens=None, vocab_size=None, global_batch=8):
    return make_task(validate(DataConfig, tree), segment_tokens, vocab_size, global_batch)


def same(a, b) -> bool:
    pairs = [(a.attention_mask, b.attention_mask), (a.document_starts, b.document_starts)]
    equal = all(one is two if one is None or two is None else torch.equal(one, two) for one, two in pairs)
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and equal and a.sample_ids == b.sample_ids


def text_of(source):
    """All tokens of a source with pieces, in order."""
    return np.concatenate([piece.tokens for piece in pieces_of(source)])


def pieces_of(source):
    return [source.corpus.piece(number) for number in range(len(source.corpus))]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"word{i} " * (i % 17 + 1), "n": i}) for i in range(40)))
    return path


@pytest.fixture
def folder(tmp_path):
    for i in range(10):
        (tmp_path / f"play{i}.txt").write_text("".join(f"{i}:{j} " for j in range(20 + 7 * i)))
    return tmp_path


def trees(folder, jsonl) -> dict[str, dict]:
    """One configuration of each kind of source."""
    dataset = {"name": "json", "data_files": str(jsonl)}
    return {
        "rewrite": {"task": "rewrite"},
        "remember": {"task": "remember", "retrieval": {"key_length": 2, "value_length": 3}},
        "files": {"task": "text", "text": {"files": str(folder / "*.txt"), "sequence_tokens": 64}},
        "streaming": {"task": "text", "text": {"dataset": dataset, "sequence_tokens": 64}},
        "packed": {"task": "text", "text": {"dataset": dataset, "sequence_tokens": 64, "pack": True}},
        "in memory": {"task": "text", "text": {"dataset": {**dataset, "streaming": False}, "sequence_tokens": 64}},
    }


KINDS = list(trees(Path(), Path()))


# --- the same samples everywhere ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_the_world_size(kind, folder, jsonl):
    tree = trees(folder, jsonl)[kind]
    segment = 16 if tree["task"] == "text" else None
    whole, left, right = (task_of(tree, segment) for _ in range(3))
    for step in range(6):
        one = whole.batch("train", step, ROWS, Difficulty(4))
        a, b = (
            left.batch("train", step, range(3), Difficulty(4)),
            right.batch("train", step, range(3, 8), Difficulty(4)),
        )
        assert torch.equal(one.input_ids, torch.cat([a.input_ids, b.input_ids]))
        assert torch.equal(one.labels, torch.cat([a.labels, b.labels]))
        assert one.sample_ids == a.sample_ids + b.sample_ids


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_what_was_asked_before(kind, folder, jsonl):
    tree = trees(folder, jsonl)[kind]
    segment = 16 if tree["task"] == "text" else None
    task, jumped = task_of(tree, segment), task_of(tree, segment)
    in_order = [task.batch("train", step, ROWS, Difficulty(4)) for step in range(5)]
    for step in (4, 2, 2, 0, 3):
        assert same(jumped.batch("train", step, ROWS, Difficulty(4)), in_order[step]), f"step {step}"


def test_seed_split_step_and_row_all_matter():
    def rows(seed, split, step):
        batch = task_of({"seed": seed}).batch(split, step, ROWS, Difficulty.fixed(20))
        return {tuple(row) for row in batch.input_ids.tolist()}

    places = [(0, "train", 0), (1, "train", 0), (0, "validation", 0), (0, "train", 1)]
    assert len(set().union(*(rows(*place) for place in places))) == len(places) * len(ROWS)


def test_length_is_uniform_and_one_for_the_whole_global_batch():
    task = task_of({})
    difficulty = Difficulty.at_least(10, 0.3)
    assert difficulty == Difficulty(10, 3)
    counts = Counter()
    for step in range(800):
        batch = task.batch("train", step, range(step % 7, step % 7 + 1), difficulty)
        assert batch.input_ids.shape == task.batch("train", step, ROWS, difficulty).input_ids[:1].shape
        counts[batch.input_ids.shape[1] // task.segment_tokens - 1] += 1
    assert sorted(counts) == list(range(3, 11))
    # chi-square with 7 degrees of freedom: 29.9 is passed once in 10,000 draws, and these draws are fixed.
    assert sum((c - 100) ** 2 / 100 for c in counts.values()) < 29.9


# --- retrieval ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rewrite", "remember"])
@pytest.mark.parametrize("key_length, value_length, n", [(1, 1, 7), (2, 1, 30), (1, 3, 1), (3, 2, 200)])
def test_retrieval_answers_by_an_independent_reading(name, key_length, value_length, n):
    lengths = {"key_length": key_length, "value_length": value_length}
    task = task_of({"task": name, "retrieval": lengths})
    batch = task.batch("train", 5, range(40, 60), Difficulty.fixed(n))
    assert batch.input_ids.shape == (20, (n + 1) * (key_length + value_length + 2)) == (20, task.sequence_tokens(n))
    for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
        *pairs, question = task.tokenizer.decode(ids).removesuffix("|").split("|")
        memory = dict(pair.split(":") for pair in pairs)
        key, answer = question.split("?")
        assert memory[key] == answer
        assert [len(key), len(answer)] == [key_length, value_length]
        assert len(pairs) == n and (name == "rewrite" or len(memory) == n)
        scored = labels != IGNORE
        # Exactly the value and eos of the question are scored, each at the position before it.
        assert scored.nonzero().flatten().tolist() == list(range(len(ids) - value_length - 2, len(ids) - 1))
        assert torch.equal(labels[:-1][scored[:-1]], ids[1:][scored[:-1]])
        assert task.tokenizer.decode(labels[scored]) == answer + "|"


def test_asked_key_is_uniform_over_the_different_keys():
    task = task_of({"retrieval": {"symbols": 8}})
    excess, rank = [], []
    for ids in task.batch("train", 0, range(4000), Difficulty.fixed(12)).input_ids.reshape(4000, 13, 4):
        counts, asked = Counter(ids[:-1, 0].tolist()), int(ids[-1, 0])
        excess.append(counts[asked] - 12 / len(counts))
        rank.append((sorted(counts).index(asked) + 0.5) / len(counts) - 0.5)
    # Uniform over pairs would ask a repeated key more often: an excess of +0.5 here.
    for values in (excess, rank):
        assert abs(np.mean(values)) < 4 * np.std(values) / 4000**0.5


def test_unique_keys_are_uniform_in_every_place():
    task = task_of({"task": "remember", "retrieval": {"symbols": 5}})
    keys = task.batch("train", 0, range(5000), Difficulty.fixed(5)).input_ids.reshape(5000, 6, 4)[:, :, 0]
    for place in range(6):
        counts = torch.bincount(keys[:, place], minlength=5).double()
        # 4 degrees of freedom: passed once in 10,000.
        assert ((counts - 1000) ** 2 / 1000).sum() < 23.5, f"place {place}: {counts.tolist()}"


@pytest.mark.parametrize("name", ["rewrite", "remember"])
def test_accuracy_of_guessing_without_the_key(name):
    task = task_of({"task": name, "retrieval": {"symbols": 4, "key_length": 1 if name == "rewrite" else 2}})
    batch = task.batch("train", 3, range(64), Difficulty.fixed(6))
    expected = []
    for row in range(64):
        *pairs, question = task.tokenizer.decode(batch.input_ids[row]).removesuffix("|").split("|")
        memory = dict(pair.split(":") for pair in pairs)
        answer = question.split("?")[1]
        expected.append(list(memory.values()).count(answer) / len(memory))
    assert task.key_blind(batch) == pytest.approx(sum(expected) / 64)


def distinct_by_floyd(words, count):
    """Draw as `retrieval.distinct` does, one number after the other."""
    n = words.shape[1] // 2
    chosen = np.empty((len(words), n), dtype=np.uint64)
    for i, last in enumerate(range(count - n, count)):
        candidate = words[:, i] % np.uint64(last + 1)
        taken = (chosen[:, :i] == candidate[:, None]).any(axis=1)
        chosen[:, i] = np.where(taken, np.uint64(last), candidate)
    return np.take_along_axis(chosen, np.argsort(words[:, n:], axis=1), axis=1)


def key_blind_by_pairs(keys, values):
    """Compare every pair with every later one; the last column is the question."""
    later = keys[:, None, :-1] == keys[:, :-1, None]
    latest = ~np.triu(later, k=1).any(axis=2)
    right = (values[:, :-1] == values[:, -1:]) & latest
    return float((right.sum(axis=1) / latest.sum(axis=1)).mean())


@given(st.integers(1, 40), st.integers(0, 60), st.integers(0, 10**6))
def test_unique_keys_are_those_of_draws_one_after_the_other(n, spare, seed):
    words = np.random.default_rng(seed).integers(0, 2**63, (5, 2 * n), dtype=np.uint64)
    found = retrieval.distinct(words, n + spare)
    assert np.array_equal(found, distinct_by_floyd(words, n + spare))


@pytest.mark.parametrize("name", ["rewrite", "remember"])
@given(pairs=st.integers(1, 40), step=st.integers(0, 10**6))
def test_guessing_is_what_comparing_all_pairs_gives(name, pairs, step):
    task = task_of({"task": name, "retrieval": {"symbols": 7, "key_length": 2}})
    batch = task.batch("train", step, range(4), Difficulty.fixed(pairs))
    segments = batch.input_ids.numpy().reshape(4, -1, task.segment_tokens)
    keys, values = (retrieval.number(segments[..., part], 7) for part in (slice(2), slice(3, 4)))
    assert task.key_blind(batch) == key_blind_by_pairs(keys, values)


def test_more_pairs_than_keys():
    task = task_of({"task": "remember"})
    assert task.sequence_tokens(16) == 17 * 4
    with pytest.raises(ConfigError, match=r"pairs=17: only 16 different keys of key_length=1 exist; use at most 16"):
        task.batch("train", 0, ROWS, Difficulty.fixed(17))


@pytest.mark.parametrize("name", ["rewrite", "remember"])
def test_a_stage_may_shorten_the_keys(name):
    task = task_of({"task": name, "retrieval": {"key_length": 3}})
    batch = task.batch("train", 0, ROWS, Difficulty.fixed(16)._replace(key_length=1))
    assert batch.input_ids.shape[1] == 17 * task.segment_tokens == task.sequence_tokens(16)
    keys = {pair[:3] for row in batch.input_ids for pair in re.split(r"\|", task.tokenizer.decode(row)) if pair}
    assert keys == {f"00{symbol}" for symbol in "0123456789abcdef"}
    few = task.batch("train", 0, ROWS, Difficulty(16, 16, symbols=3))
    spelled = "".join(pair[:3] for row in few.input_ids for pair in re.split(r"\|", task.tokenizer.decode(row)))
    assert set(spelled) == set("012")
    with pytest.raises(ConfigError, match=r"^key_length=4: above data\.retrieval\.key_length=3"):
        task.batch("train", 0, ROWS, Difficulty(5, 5, key_length=4))
    if name == "remember":
        with pytest.raises(ConfigError, match=r"pairs=17: only 16 different keys of key_length=1 exist"):
            task.batch("train", 0, ROWS, Difficulty(17, 17, key_length=1))


def test_a_person_can_type_a_question():
    task = task_of({})
    batch = task.batch("train", 0, ROWS, Difficulty.fixed(2))
    shown = task.show(batch, 3)
    assert re.fullmatch(r"(\w:\w\| ){2}\w\?\w\|", shown)
    assert task.tokenizer(shown)["input_ids"] == batch.input_ids[3].tolist()
    assert task.vocab_size == len(task.tokenizer) == 20


# --- tokenizers --------------------------------------------------------------------------------------------------


@given(st.text())
def test_byte_tokenizer_is_exact(text):
    tokenizer = byte_tokenizer()
    ids = encode(tokenizer, text)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_saved_tokenizers_load_without_this_package(tmp_path):
    text = "Exeunt <eos> héé 漢字 🎉  , ' \r\n\x00"
    byte_tokenizer().save_pretrained(tmp_path / "byte")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "byte")
    assert "armt" not in type(loaded).__module__
    assert encode(loaded, text).tolist() == list(text.encode()) and loaded.decode(encode(loaded, text)) == text
    assert (len(loaded), loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (259, 258, 256, 257)

    task_of({}).tokenizer.save_pretrained(tmp_path / "retrieval")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "retrieval")
    assert loaded("3:a| 3?")["input_ids"] == [3, 16, 10, 18, 3, 17] and loaded.decode([10, 18]) == "a|"
    assert loaded.eos_token_id == 18 and loaded.pad_token_id == 19

    word_tokenizer(["Where", "is", "Mary", "?", "."]).save_pretrained(tmp_path / "word")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "word")
    assert loaded("Where is  Ann?\n")["input_ids"] == [3, 4, 2, 6] and loaded.decode([3, 4, 5]) == "Where is Mary"


# --- text --------------------------------------------------------------------------------------------------------


def text_task(folder, segment_tokens=16, global_batch=8, **fields):
    tree = {"task": "text", "text": {"files": str(folder), "sequence_tokens": 64, **fields}}
    return task_of(tree, segment_tokens, None, global_batch)


def real(batch, row):
    ids = batch.input_ids[row]
    return ids if batch.attention_mask is None else ids[batch.attention_mask[row] == 1]


def test_an_epoch_is_every_piece_once_in_another_order_each_time(folder):
    task = text_task(folder, validation_fraction=0)
    size = task.size("train")
    texts = [path.read_bytes() for path in sorted(folder.glob("*.txt"))]
    expected = sorted(
        (t + b"\0")[i : i + 64][:-1] if i + 64 > len(t) else t[i : i + 64] for t in texts for i in range(0, len(t), 64)
    )
    epochs = []
    for epoch in range(2):
        positions = range(epoch * size, (epoch + 1) * size)
        batches = {p // 8: task.batch("train", p // 8, ROWS, Difficulty.fixed(4)) for p in positions}
        pieces = [(batches[p // 8].sample_ids[p % 8], real(batches[p // 8], p % 8)) for p in positions]
        # eos closes each text; the bytes of all pieces are the files again.
        assert sorted(bytes(x for x in ids.tolist() if x < 256) for _, ids in pieces) == expected
        epochs.append([number for number, _ in pieces])
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) == list(range(size))


def test_padding_is_masked_and_not_scored(folder):
    task = text_task(folder, validation_fraction=0)
    padded = 0
    for step in range(6):
        batch = task.batch("train", step, ROWS, Difficulty.fixed(4))
        for row in range(8):
            n = len(real(batch, row))
            padded += n < 64
            assert (batch.labels[row, n - 1 :] == IGNORE).all()
            assert torch.equal(batch.labels[row, : n - 1], batch.input_ids[row, 1:n])
            assert (batch.input_ids[row, n:] == task.tokenizer.pad_token_id).all()
    assert padded > 5


def test_mask_is_none_when_nothing_is_padded(folder):
    task = text_task(folder, pack=True)
    batch = task.batch("train", 0, ROWS, Difficulty.fixed(2))
    assert batch.attention_mask is None and batch.input_ids.shape == (8, 32)


def test_a_shorter_sample_is_any_window_of_its_piece(folder):
    task = text_task(folder)
    starts = set()
    for step in range(40):
        whole, part = (task.batch("train", step, ROWS, Difficulty.fixed(n)) for n in (4, 1))
        assert part.sample_ids == whole.sample_ids
        for row in range(8):
            text, window = (bytes(real(batch, row).clamp(max=255).tolist()) for batch in (whole, part))
            assert window in text
            starts.add(text.index(window))
    assert len(starts) > 30, "windows start at few places"


def test_validation_is_other_files_and_scores_each_piece_once(folder):
    task = text_task(folder, validation_fraction=0.3)
    train, held_out = (
        set(re.findall(r"(\d):", task.tokenizer.decode(text_of(task.sources[s])))) for s in ("train", "validation")
    )
    assert 0 < len(held_out) < 6 and not train & held_out and len(train | held_out) == 10
    size = task.size("validation")
    assert size % 8, "the last step should be ragged"
    steps = -(-size // 8)
    batches = [task.batch("validation", step, ROWS, Difficulty.fixed(4)) for step in range(steps)]
    scored = [b.sample_ids[row] for b in batches for row in range(8) if (b.labels[row] != IGNORE).any()]
    assert sorted(scored) == list(range(size))
    assert same(task.batch("validation", steps, ROWS, Difficulty.fixed(4)), batches[0])


@pytest.mark.parametrize("count", [3, 20])
def test_a_further_file_moves_no_other_between_training_and_validation(count, tmp_path):
    for i in range(count):
        (tmp_path / f"book{i}.txt").write_text(f"{i}: " + "a book " * 10)
    before = text_task(tmp_path).texts()
    (tmp_path / "chapter").mkdir()
    for name in ("book", "chapter/book_a", "zebra"):
        (tmp_path / f"{name}.txt").write_text(f"{name}: a book " * 10)
    after = text_task(tmp_path).texts()
    assert before["validation"], "nothing was held out"
    for split, other in (("train", "validation"), ("validation", "train")):
        assert not {text.sha256 for text in before[split]} & {text.sha256 for text in after[other]}


def with_bos(tokenizer):
    """Make the tokenizer put its BOS before a text, as Llama's does."""
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.mark.parametrize("pack", [False, True])
def test_a_text_begins_as_the_tokenizer_begins_it(pack, folder):
    with_bos(byte_tokenizer()).save_pretrained(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert leading_tokens(tokenizer) == [256] and leading_tokens(byte_tokenizer()) == []
    fields = dict(tokenizer=str(folder / "tokenizer"), validation_fraction=0, pack=pack, sequence_tokens=64)
    for expected, option in ((True, {}), (False, {"leading_tokens": False})):
        task = task_of({"task": "text", "text": {"files": str(folder / "*.txt"), **fields, **option}}, 16)
        tokens = text_of(task.sources["train"])
        first = tokenizer((folder / "play0.txt").read_text(), add_special_tokens=expected)["input_ids"]
        assert tokens[: len(first)].tolist() == first, option
        assert (tokens == 256).sum() == 10 * expected, option


def test_named_validation_files_are_not_trained_on(folder):
    task = text_task(folder, validation_files=str(folder / "play[78].txt"))
    assert set(re.findall(r"(\d):", task.tokenizer.decode(text_of(task.sources["train"])))) == set("01234569")


def test_validation_split_does_not_move_with_the_seed(folder):
    held_out = [
        task_of({"task": "text", "seed": s, "text": {"files": str(folder)}}).sources["validation"] for s in (1, 2)
    ]
    assert np.array_equal(*map(text_of, held_out))


def test_short_pieces_are_left_out(folder):
    every, long = (text_task(folder, validation_fraction=0, min_tokens=least) for least in (2, 50))
    found = [sorted(len(piece.tokens) for piece in pieces_of(task.sources["train"])) for task in (every, long)]
    assert found[0][0] < 50 and found[1] == [n for n in found[0] if n >= 50]
    with pytest.raises(ConfigError, match="min_tokens=65: no piece has more than sequence_tokens=64"):
        text_task(folder, min_tokens=65)


def streamed(jsonl, **fields):
    dataset = {"name": "json", "data_files": str(jsonl)}
    return task_of({"task": "text", "text": {"dataset": dataset, "sequence_tokens": 64, **fields}}, 16)


def test_pack_joins_texts(jsonl):
    """Every row joins the texts that it reads; together the rows read each text once an epoch."""
    task, texts = streamed(jsonl, pack=True), [json.loads(line)["text"] for line in jsonl.read_text().splitlines()]
    batches = [task.batch("train", step, ROWS, Difficulty.fixed(4)) for step in range(4)]
    assert all(batch.attention_mask is None for batch in batches)
    read = Counter()
    for row in ROWS:
        tokens = torch.cat([batch.input_ids[row] for batch in batches])
        *whole, rest = task.tokenizer.decode(tokens).split("<eos>")
        assert all(text in texts for text in whole) and any(text.startswith(rest) for text in texts)
        read.update(whole)
    assert set(read.values()) == {1} and len(read) > 20


def test_rows_are_dealt_about_as_much(jsonl):
    """So that a rank holds few texts for rows that are slower than others."""
    task = streamed(jsonl, pack=True)
    for step in range(100):
        task.batch("train", step, ROWS, Difficulty.fixed(4))
    stream = task.sources["train"]
    assert stream.dealer.epoch > 5
    assert sum(len(lane.waiting) for lane in stream.lanes.values()) < BLOCK + 8 * 4 and len(stream.marks) < 4


def noted(encode, read, text):
    read.append(text)
    return encode(text)


def test_a_rank_tokenises_the_texts_of_its_rows_alone(jsonl):
    whole, part = streamed(jsonl), streamed(jsonl)
    counts = []
    for task, rows in ((whole, ROWS), (part, range(3, 4))):
        source, read = task.sources["train"], []
        source.encode = partial(noted, source.encode, read)
        for step in range(20):
            task.batch("train", step, rows, Difficulty.fixed(4))
        counts.append(len(read))
    assert counts[1] < counts[0] / 5, counts


@pytest.mark.parametrize("kind", ["streaming", "packed"])
def test_a_stream_goes_on_at_the_same_token(kind, folder, jsonl):
    tree = trees(folder, jsonl)[kind]
    steps = 24
    uninterrupted = task_of(tree, 16)
    reference = [uninterrupted.batch("train", step, ROWS, Difficulty(4)) for step in range(steps)]
    assert uninterrupted.sources["train"].dealer.epoch >= 2, "the test should pass the end of the stream"
    worlds = ([ROWS], [range(4), range(4, 8)], [range(2), range(2, 4), range(4, 6), range(6, 8)])
    for stop, before, after in ((0, 0, 1), (1, 1, 2), (6, 2, 0), (13, 1, 0), (20, 2, 1)):
        ranks = [task_of(tree, 16) for _ in worlds[before]]
        for step in range(stop):
            for task, rows in zip(ranks, worlds[before], strict=True):
                task.batch("train", step, rows, Difficulty(4))
        state = merged_state(ranks[0], [json.loads(json.dumps(task.state_dict())) for task in ranks])
        # Any other number of ranks reads on at the same place.
        for rows in worlds[after]:
            resumed = task_of(tree, 16)
            resumed.load_state_dict(json.loads(json.dumps(state)))
            for step in range(stop, steps):
                found = resumed.batch("train", step, rows, Difficulty(4))
                assert torch.equal(found.input_ids, reference[step].input_ids[rows.start : rows.stop]), (stop, step)
                assert torch.equal(found.labels, reference[step].labels[rows.start : rows.stop]), (stop, step)
            # And a loaded state is forgotten when an earlier step is asked for.
            assert same(resumed.batch("train", 0, ROWS, Difficulty(4)), reference[0])


def test_a_resumed_stream_does_not_read_from_the_beginning(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"word{i} " * 9}) for i in range(2000)))
    before = streamed(path)
    for step in range(50):
        before.batch("train", step, ROWS, Difficulty(4))
    resumed = streamed(path)
    resumed.load_state_dict(before.state_dict())
    resumed.batch("train", 50, ROWS, Difficulty(4))
    source = resumed.sources["train"]
    assert (
        source.dealer.number - source.origin["mark"]["number"] <= 2 * BLOCK and source.origin["mark"]["number"] >= BLOCK
    )


def test_a_stream_goes_on_with_another_batch(jsonl):
    """Texts that all rows have read are not read again."""
    before = streamed(jsonl, pack=True)
    for step in range(30):
        before.batch("train", step, ROWS, Difficulty(4))
    state = before.state_dict()
    dataset = {"name": "json", "data_files": str(jsonl)}
    tree = {"task": "text", "text": {"dataset": dataset, "sequence_tokens": 64, "pack": True}}
    resumed = task_of(tree, 16, global_batch=5)
    resumed.load_state_dict(state)
    resumed.batch("train", 30, range(5), Difficulty(4))
    assert min(lane.number for lane in resumed.sources["train"].lanes.values()) >= state["train"]["mark"]["number"] > 0


def test_the_state_of_an_earlier_version_is_refused(jsonl):
    old = {"next_step": 3, "position": {"epoch": 0, "texts": None, "offset": 0}}
    with pytest.raises(ConfigError, match="of a version in which the rows of a stream read other texts; go on with"):
        streamed(jsonl).load_state_dict({"train": old})


def test_a_stream_of_texts_that_are_too_short(tmp_path):
    path = tmp_path / "short.jsonl"
    path.write_text("\n".join(json.dumps({"text": "short"}) for _ in range(5)))
    with pytest.raises(ConfigError, match="column=text: no text of text.min_tokens or more among 5 in a row; lower it"):
        streamed(path, min_tokens=50).batch("train", 0, ROWS, Difficulty(4))


# --- a user's mistakes -------------------------------------------------------------------------------------------


def write(path, content: bytes):
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r"bad\.txt: the file is empty; leave it out"),
        (b" \n", r"bad\.txt: the file is empty"),
        (b"\x89PNG\xff\xfe", r"bad\.txt: not UTF-8 text \(byte 0\)"),
        (b"abc\0def", r"bad\.txt: a binary file"),
    ],
)
def test_unreadable_text(tmp_path, content, message):
    write(tmp_path / "bad.txt", content)
    with pytest.raises(ConfigError, match=message):
        text_task(tmp_path, validation_fraction=0)


def test_vanished_file(tmp_path):
    from armt_dist.data.text.files import read_text

    with pytest.raises(ConfigError, match=r"gone\.txt: No such file or directory; restore"):
        read_text(tmp_path / "gone.txt")


def mistakes(folder, jsonl) -> list[tuple[dict, str]]:
    json_set = {"name": "json", "data_files": str(jsonl)}
    one = str(folder / "play1.txt")

    def text(**fields):
        return {"task": "text", "text": fields}

    return [
        (text(files=str(folder / "*.md")), r"files=.*\*\.md: no such file; give"),
        (text(files=one), r"files=.*play1\.txt: one file cannot serve both training and validation"),
        (text(files=one, validation_files=one), r"validation_files=.*: no file is left to train on"),
        (text(files=one, validation_files=str(folder / "nope")), r"validation_files=.*nope: no such file"),
        (text(), r"data.text.files, data.text.dataset: give exactly one of them"),
        ({"task": "text"}, r"data.text.files, data.text.dataset: give exactly one of them"),
        (text(files=one, dataset=json_set), r"data.text.files, data.text.dataset: give exactly one of them"),
        (text(files=one, sequence_token=4), r"text\.sequence_token=4: unknown key; known here: .*sequence_tokens"),
        (text(files=one, sequence_tokens="x"), r"text\.sequence_tokens=x: "),
        (text(files=one, sequence_tokens=1000), r"segment_tokens=16 does not divide sequence_tokens=1000; try 20"),
        (text(files=one, tokenizer=str(folder)), r"tokenizer=.*: cannot be loaded"),
        (
            text(dataset={**json_set, "column": "body"}),
            r"dataset\.column=body: no such text column; the text columns are: text",
        ),
        (text(dataset={**json_set, "column": "n"}), r"dataset\.column=n: no such text column"),
        (text(dataset={**json_set, "split": "tset"}), r"dataset\.name=json \(split tset\): cannot be read: .*tset"),
        (text(dataset={"name": str(folder / "none")}), r"dataset\.name=.*none \(split train\): cannot be read"),
        ({"task": "rewrite", "text": {"files": one}}, r"text does not belong to task=rewrite; remove it"),
        ({"task": "rewrte"}, r"task=rewrte: "),
        ({"retrieval": {"key_length": 0}}, r"retrieval\.key_length=0: "),
        ({"retrieval": {"key_length": 9}}, r"key_length=9 of 16 symbols: more than 2\^32 strings"),
        ({"retrieval": {"symbols": 63}}, r"retrieval\.symbols=63: "),
        ({}, r"segment_tokens=16: key_length=1 and value_length=1 make segments of 4 tokens; use 4"),
    ]


@pytest.mark.parametrize("number", range(len(mistakes(Path(), Path()))))
def test_mistakes_are_one_line_with_a_remedy(number, tmp_path):
    for i in range(3):
        (tmp_path / f"play{i}.txt").write_text("to be or not to be")
    jsonl = tmp_path / "texts.jsonl"
    jsonl.write_text('{"text": "to be or not", "n": 1}\n')
    tree, message = mistakes(tmp_path, jsonl)[number]
    with pytest.raises(ConfigError, match=message) as error:
        task_of(tree, 16)
    assert "\n" not in str(error.value)


def test_too_many_segments_and_no_validation(folder):
    task = text_task(folder, validation_fraction=0)
    with pytest.raises(ConfigError, match=r"segments=5 of 16 tokens exceed sequence_tokens=64; use at most 4"):
        task.sequence_tokens(5)
    assert task.size("validation") == 0
    with pytest.raises(ConfigError, match="there is no validation data"):
        task.batch("validation", 0, ROWS, Difficulty(4))


def test_tokenizer_larger_than_the_embedding_is_found_before_any_text_is_read():
    tree = {"task": "text", "text": {"files": "does/not/exist"}}
    with pytest.raises(ConfigError, match=r"vocab_size=256: the tokenizer of task=text has 259 tokens; enlarge"):
        task_of(tree, 16, vocab_size=256)
    assert task_of({}, None, vocab_size=20).vocab_size == 20


def test_a_stream_of_several_ranks_goes_on_where_the_slowest_one_is():
    """A rank whose texts were short has read further; from its mark on, the others' next texts would be missing."""
    fast, slow = ({"number": number, "loads": [0, 0]} for number in (256, 128))
    states = [
        {"next_step": 3, "mark": fast, "places": {"0": [300, 0]}},
        {"next_step": 3, "mark": slow, "places": {"1": [130, 5]}},
    ]
    for order in (states, states[::-1]):
        assert merge(order) == {"next_step": 3, "mark": slow, "places": {"0": [300, 0], "1": [130, 5]}}
