"""The rows of benchmarks/planted_facts.py, as the task reads them, and its judgement of answers."""

import json
import re
import sys

import pytest
import torch
from support.commands import run_script
from support.models import confident_model
from support.paths import ROOT

from armt_dist.config import validate
from armt_dist.data.instructions.encoding import IDS, SCORED, RowEncoder
from armt_dist.data.sections import DataConfig
from armt_dist.data.task import Difficulty
from armt_dist.data.tasks import make_task
from armt_dist.data.tokenizers import byte_tokenizer

sys.path.insert(0, str(ROOT / "benchmarks"))
from planted_facts import Reader, ask, make_row, read_texts

FACT = re.compile(r"\nThe password of the (\w+) of (\w+) is (\d{4})\.\n")
TOKENS, COUNT = 700, 10


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows of a text whose lines are numbered."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("".join(f"This is line {i:04d}.\n" for i in range(300)))
    texts = read_texts([str(path)], byte_tokenizer())
    return [make_row("0/train", i, texts, TOKENS, COUNT) for i in range(30)], texts


def test_rows_depend_on_seed_split_and_number_alone(rows):
    made, texts = rows
    assert make_row("0/train", 7, texts, TOKENS, COUNT) == made[7]
    others = [make_row(name, 7, texts, TOKENS, COUNT) for name in ("1/train", "0/validation")]
    assert made[7] not in others and others[0] != others[1]
    assert len({json.dumps(row) for row in made}) == len(made)


def test_a_question_asks_for_the_fact_at_its_position_alone(rows):
    for number, row in enumerate(rows[0]):
        facts = FACT.findall(row["documents"][0])
        assert row["position"] == number % COUNT and len(facts) == COUNT
        place, town, value = facts[row["position"]]
        assert f"the {place} of {town}?" in row["question"] and row["answer"] == value
        assert value not in row["question"] and row["documents"][0].count(value) == 1
        assert len({(place, town) for place, town, _ in facts}) == COUNT
        assert len({value for *_, value in facts}) == COUNT


def test_facts_are_evenly_spread_behind_lines_of_the_text(rows):
    line = len("This is line 0000.\n")
    for row in rows[0]:
        document, planted = row["documents"][0], 0
        for i, found in enumerate(FACT.finditer(document)):
            at = found.start() - planted
            wanted = (i + 0.5) * TOKENS / COUNT
            assert wanted - 1 <= at <= wanted + line
            assert document[found.start() - 1] == "."
            planted += len(found[0])
        assert len(document) - planted == TOKENS


def test_the_task_reads_them(rows, tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows[0]))
    section = {"files": str(path), "validation_fraction": 0, "sequence_tokens": 2048, "cache": str(tmp_path / "cache")}
    data = validate(DataConfig, {"task": "instructions", "instructions": section})
    task = make_task(data, 64, None, 1)
    batch = task.batch("train", 0, range(0, 1), Difficulty.fixed(32))
    scored = batch.labels[batch.labels >= 0]
    assert re.fullmatch(r" ?\d{4}", task.tokenizer.decode(scored[:-1]))


def test_an_answer_is_right_where_it_would_be_generated(rows):
    tokenizer = byte_tokenizer()
    model = confident_model(len(tokenizer), 8).eval()
    reader = Reader("model", lambda ids, count: model(ids, logits_to_keep=count).logits[0])
    row = {"documents": ["Some text."], "question": "What?"}
    sample = RowEncoder(tokenizer, True).encode({**row, "answer": "1234"}, "documents", "row")
    scored = (sample & SCORED) > 0
    prompt = torch.from_numpy((sample & IDS).astype("int64"))[None, : scored.argmax()]
    count = int(scored.sum())
    right, nats = ask(reader, sample)
    logits = model(torch.from_numpy((sample & IDS).astype("int64"))[None]).logits[0].log_softmax(-1)
    places = torch.from_numpy(scored).nonzero().squeeze(1)
    expected = -logits[places - 1, torch.from_numpy((sample & IDS).astype("int64"))[places]].sum().item()
    assert not right and nats == pytest.approx(expected, rel=1e-5)
    generated = model.generate(prompt, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    made = sample.copy()
    made[scored] = generated[0, -count:].numpy().astype("uint32") | SCORED
    assert ask(reader, made)[0]
    made[-1] ^= 1
    assert not ask(reader, made)[0]


def test_the_command_says_what_it_takes():
    said = run_script("../benchmarks/planted_facts.py", "make", "--help")
    assert said.returncode == 0 and "--validation-rows" in said.stdout
