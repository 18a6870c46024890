"""The task `instructions`: each form's tokens and what is scored, rows for any number of ranks, and what is refused."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from support.chats import CHANGING, MARKED, PLAIN, chat_tokenizer

from armt_dist.config import ConfigError, validate
from armt_dist.data.lengths import Difficulty
from armt_dist.data.sections import DataConfig
from armt_dist.data.task import IGNORE
from armt_dist.data.tasks import make_task

CHAT = {
    "messages": [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes"},
    ]
}
DOCUMENTS = {"documents": ["The key is 7.", "It rains."], "question": "Which key?", "answer": "7"}
PROMPT = {"prompt": "2+2=", "completion": "4", "id": 9}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def build(tmp_path, rows=(), global_batch=4, segment_tokens=8, **section):
    """The task on a file of `rows`, which all are for training unless `section` says otherwise."""
    if "files" not in section and "dataset" not in section:
        section["files"] = write(tmp_path / "rows.jsonl", rows)
    section = {"validation_fraction": 0, "sequence_tokens": 256, "cache": str(tmp_path / "cache"), **section}
    config = validate(DataConfig, {"task": "instructions", "instructions": section})
    return make_task(config, segment_tokens, global_batch=global_batch)


def spelled(task, batch, row=0):
    """The text of a row, and of the tokens that are scored in it."""
    labels = batch.labels[row]
    ids = batch.input_ids[row] if batch.attention_mask is None else batch.input_ids[row][batch.attention_mask[row] > 0]
    # A label is the token behind its position.
    places = (labels != IGNORE).nonzero().squeeze(1)
    assert torch.equal(labels[places], batch.input_ids[row][places + 1])
    return task.tokenizer.decode(ids), task.tokenizer.decode(labels[places])


def first(task, segments=None, split="train"):
    difficulty = Difficulty(32) if segments is None else Difficulty.fixed(segments)
    return spelled(task, task.batch(split, 0, range(1), difficulty))


# --- forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize(
    "row, template_used, text, scored",
    [
        ({"text": "All of it."}, False, "All of it.<eos>", "ll of it.<eos>"),
        (PROMPT, False, "2+2=4<eos>", "4<eos>"),
        (CHAT, True, "s:be kind\nu:2+2?\na:4\nu:sure?\na:yes\n", "4\nyes\n"),
        (DOCUMENTS, True, "u:The key is 7.\n\nIt rains.\n\nWhich key?\na:7\n", "7\n"),
        (DOCUMENTS, False, "The key is 7.\n\nIt rains.\n\nQuestion: Which key?\nAnswer: 7<eos>", " 7<eos>"),
    ],
    ids=["text", "prompt", "chat", "documents in a chat", "documents"],
)
def test_the_loss_counts_the_answer(tmp_path, row, template_used, text, scored, template):
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", template) if template_used else "byte"
    task = build(tmp_path, [row], tokenizer=tokenizer, global_batch=1)
    assert first(task) == (text, scored)


@pytest.mark.parametrize("row, form", [(CHAT | {"text": "x"}, "messages"), (PROMPT | {"text": "x"}, "prompt + comp")])
def test_the_log_names_form_and_loss(tmp_path, row, form):
    task = build(tmp_path, [row] * 3, tokenizer=chat_tokenizer(tmp_path / "tokenizer"))
    training, validation = task.notes()
    assert f"3 rows of {form}" in training and "the loss counts" in training and "no rows" in validation


def test_texts_are_divided_and_have_a_perplexity(tmp_path):
    task = build(tmp_path, [{"text": "abcdefghijklmnopq"}, PROMPT | {"text": "xy"}], sequence_tokens=8)
    assert task.measure == "perplexity" and task.size("train") == 4
    kept = {task.tokenizer.decode(task.sample("train", i).astype(np.int64) & 0xFFFF) for i in range(4)}
    assert kept == {"abcdefgh", "ijklmnop", "q<eos>", "xy<eos>"}


# --- sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["jsonl", "glob", "parquet", "dataset of lines", "dataset of parquet"])
def test_every_source_gives_the_same_samples(tmp_path, source):
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(100)]
    lines = write(tmp_path / "rows.jsonl", rows)
    table = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    sections = {
        "jsonl": {"files": lines},
        "glob": {"files": [str(tmp_path / "*.jsonl")]},
        "parquet": {"files": str(table)},
        "dataset of lines": {"dataset": {"name": "json", "data_files": lines}},
        "dataset of parquet": {"dataset": {"name": "parquet", "data_files": str(table)}},
    }
    task = build(tmp_path, global_batch=100, validation_fraction=0.2, **sections[source])
    assert (task.size("train"), task.size("validation")) == (83, 17), "a hash of each row says where it belongs"
    seen = [first_of(task, split, task.size(split)) for split in ("train", "validation")]
    assert not seen[0] & seen[1] and seen[0] | seen[1] == {f"{i}+1={i + 1}<eos>" for i in range(100)}


def first_of(task, split, count):
    batch = task.batch(split, 0, range(count), Difficulty(32))
    return {spelled(task, batch, row)[0] for row in range(count)}


def test_chats_of_a_parquet_file(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([CHAT]), tmp_path / "rows.parquet")
    tokenizer = chat_tokenizer(tmp_path / "tokenizer")
    assert first(build(tmp_path, files=str(tmp_path / "rows.parquet"), tokenizer=tokenizer))[1] == "4\nyes\n"


def test_named_files_and_splits_are_for_validation_alone(tmp_path):
    files = [write(tmp_path / f"{i}.jsonl", [PROMPT | {"prompt": str(i)}]) for i in range(2)]
    by_files = build(tmp_path, files=files, validation_files=files[1], validation_fraction=0.5)
    dataset = {"name": "json", "data_files": files[0], "validation_split": "train"}
    for task in (by_files, build(tmp_path, dataset=dataset, validation_fraction=0.5)):
        assert task.size("train") == task.size("validation") == 1
    assert first(by_files, split="validation")[0] == "14<eos>"


def test_rows_are_tokenised_once(tmp_path, monkeypatch):
    files = write(tmp_path / "rows.jsonl", [PROMPT])
    build(tmp_path, files=files)
    monkeypatch.setattr("armt_dist.data.instructions.encoding.RowEncoder.encode", None)
    assert first(build(tmp_path, files=files))[0] == "2+2=4<eos>"
    with pytest.raises(TypeError):
        build(tmp_path, files=files, too_long="skip")


# --- rows and lengths -------------------------------------------------------------------------------------------------


def test_rows_are_the_same_for_1_2_and_4_ranks(tmp_path):
    """And every row of an epoch has another sample; the shortest segments that hold the longest one are shared."""
    rows = [{"prompt": "p" * (i * 7 % 50), "completion": str(i)} for i in range(24)]
    tasks = {ranks: build(tmp_path, rows, global_batch=8) for ranks in (1, 2, 4)}
    seen, widths = [], set()
    for step in range(3):
        parts = {
            ranks: [
                task.batch("train", step, range(r * 8 // ranks, (r + 1) * 8 // ranks), Difficulty(8))
                for r in range(ranks)
            ]
            for ranks, task in tasks.items()
        }
        (whole,) = parts[1]
        for found in parts.values():
            assert torch.equal(torch.cat([part.input_ids for part in found]), whole.input_ids)
            assert torch.equal(torch.cat([part.labels for part in found]), whole.labels)
            assert sum((part.sample_ids for part in found), []) == whole.sample_ids
        seen += whole.sample_ids
        longest = max(len(tasks[1].sample("train", number)) for number in whole.sample_ids)
        assert whole.input_ids.shape[1] == -(-longest // 8) * 8
        widths.add(whole.input_ids.shape[1])
    assert sorted(seen) == list(range(24)) and widths


def test_a_stage_limits_the_segments_from_both_sides(tmp_path):
    task = build(tmp_path, [{"prompt": "p" * 30, "completion": "yes"}])
    assert task.batch("train", 0, range(1), Difficulty(6, 6)).input_ids.shape == (1, 48)
    assert first(task, 1) == ("pppp" + "yes<eos>", "yes<eos>")


@pytest.mark.parametrize(
    "row, kept",
    [
        ({"prompt": "abcdefghijklmnop", "completion": "yes"}, "efghijklmnopyes<eos>"),
        (DOCUMENTS | {"documents": ["abcdefghij"], "question": "k?"}, "u:fghij\n\nk?\na:7\n"),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "abcdefghijkl"},
                       {"role": "assistant", "content": "y"}]}, "s:s\nu:hijkl\na:y\n"),
    ],
    ids=["prompt", "documents", "chat"],
)  # fmt: skip
def test_a_long_row_loses_the_beginning_of_its_context(tmp_path, row, kept):
    tokenizer = chat_tokenizer(tmp_path / "tokenizer")
    sizes = {"sequence_tokens": 16, "tokenizer": tokenizer}
    task = build(tmp_path, [row], global_batch=1, **sizes)
    text, _ = first(task)
    assert text == kept and "1 cut" in task.notes()[0]
    with pytest.raises(ConfigError, match=r"rows.jsonl, line 1: 2\d tokens, more than sequence_tokens=16; raise that"):
        build(tmp_path, [row], **sizes, too_long="error")


def test_rows_that_cannot_be_cut_are_skipped_and_counted(tmp_path):
    long = {"prompt": "p", "completion": "c" * 40}
    task = build(tmp_path, [PROMPT, long], sequence_tokens=16)
    assert task.size("train") == 1 and "1 skipped" in task.notes()[0]
    with pytest.raises(ConfigError, match="sequence_tokens=16: all 1 samples for train are longer"):
        build(tmp_path, [long], sequence_tokens=16)


def test_validation_scores_each_sample_once(tmp_path):
    rows = [{"prompt": str(i), "completion": "y"} for i in range(3)]
    files = write(tmp_path / "held_out.jsonl", rows)
    task = build(tmp_path, [PROMPT], validation_files=files, global_batch=2)
    scored = [(task.batch("validation", step, range(2), Difficulty(4)).labels != IGNORE).any(1) for step in range(2)]
    assert torch.cat(scored).tolist() == [True, True, True, False]


# --- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES = {
    "broken": ('{"prompt": "a", ', "line 2: not valid JSON"),
    "list": ("[1, 2]", "line 2: expected a JSON object, got a list"),
    "missing": ('{"prompt": "a"}', "line 2, completion: missing; every row needs prompt [+] completion"),
    "wrong type": ('{"prompt": 5, "completion": "a"}', "line 2, prompt: expected text, got int 5"),
    "empty": ('{"prompt": "a", "completion": " "}', "line 2, completion: empty, and the loss counts the completion"),
    "surrogate": ('{"prompt": "\\ud800", "completion": "a"}', "line 2, prompt: half of a surrogate pair"),
    "bytes": (b"\xff", "line 2: not UTF-8"),
}


@pytest.mark.parametrize("line, says", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_with_file_line_and_field(tmp_path, line, says):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(PROMPT).encode() + b"\n" + (line.encode() if isinstance(line, str) else line) + b"\n")
    with pytest.raises(ConfigError, match=rf"^data.instructions.files={path}, {says}") as caught:
        build(tmp_path, files=str(path))
    assert "\n" not in str(caught.value)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()], "something was half written"


CHATS = {
    "no list": ("hello", "messages: expected a list, got text"),
    "no object": (["hello"], r"messages.0: expected \{role, content\}, got text"),
    "no content": ([{"role": "user"}], "messages.0.content: expected text, got nothing"),
    "no answer": ([{"role": "user", "content": "a"}], "messages: no turn of the assistant"),
    "empty": ([{"role": "assistant", "content": ""}], "messages.0.content: an empty answer"),
}


@pytest.mark.parametrize("messages, says", CHATS.values(), ids=CHATS)
def test_a_wrong_chat_is_named(tmp_path, messages, says):
    with pytest.raises(ConfigError, match=f"line 1, {says}"):
        build(tmp_path, [{"messages": messages}], tokenizer=chat_tokenizer(tmp_path / "tokenizer"))


def test_chats_need_a_template_that_keeps_what_was_written(tmp_path):
    with pytest.raises(ConfigError, match="line 1, messages: a chat, and the tokenizer has no chat template"):
        build(tmp_path, [CHAT])
    with pytest.raises(ConfigError, match=r"line 1, messages.4: the tokenizer's chat template writes the turns before"):
        build(tmp_path, [CHAT], tokenizer=chat_tokenizer(tmp_path / "changing", CHANGING))
    refusing = chat_tokenizer(tmp_path / "refusing", "{{ raise_exception('no system turn') }}")
    with pytest.raises(ConfigError, match=r"template refuses them \(no system turn\)"):
        build(tmp_path, [CHAT], tokenizer=refusing)


def test_other_mistakes_of_files(tmp_path):
    with pytest.raises(
        ConfigError, match="line 1: the columns are id, body, and one of these .* text; prompt [+] comp"
    ):
        build(tmp_path, [{"id": 1, "body": "x"}])
    (tmp_path / "no.parquet").write_text("PAR1 but no table")
    with pytest.raises(ConfigError, match="no.parquet: not a readable Parquet file"):
        build(tmp_path, files=str(tmp_path / "no.parquet"))
    (tmp_path / "no.csv").write_text("prompt,completion\n")
    with pytest.raises(ConfigError, match="no.csv: expected a name that ends with one of .jsonl, .json, .parquet"):
        build(tmp_path, files=str(tmp_path / "no.csv"))
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(ConfigError, match="dataset.name=json .*: cannot be read after row 0"):
        build(tmp_path, dataset={"name": "json", "data_files": str(tmp_path / "bad.jsonl")})
    for section in ({}, {"files": "a", "dataset": {"name": "json"}}):
        with pytest.raises(ConfigError, match="give exactly one of them"):
            validate(DataConfig, {"task": "instructions", "instructions": section})
