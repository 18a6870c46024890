"""BABILong: answers follow from the text alone, by a reader that shares no code with the generator."""

import json
import re
from collections import Counter
from random import Random

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from armt_dist.config import ConfigError, validate
from armt_dist.data.babilong import published
from armt_dist.data.babilong import stories as babi
from armt_dist.data.babilong.task import Background, stretch
from armt_dist.data.lengths import Difficulty
from armt_dist.data.sections import DataConfig
from armt_dist.data.task import IGNORE
from armt_dist.data.tasks import make_task
from armt_dist.data.tokenizers import byte_tokenizer

TASKS = ("qa1", "qa2", "qa3", "qa4", "qa5")
ROWS = range(8)
PLACE = "(bathroom|bedroom|garden|hallway|kitchen|office)"
THING = "(apple|football|milk)"
NAME = "([A-Z][a-z]+)"
READ = {
    "move": rf"{NAME} (?:moved|went|went back|journeyed|travelled) to the {PLACE}\.",
    "take": rf"{NAME} (?:got|grabbed|took|picked up) the {THING}(?: there)?\.",
    "drop": rf"{NAME} (?:dropped|discarded|left|put down) the {THING}(?: there)?\.",
    "give": rf"{NAME} (?:gave|passed|handed) the {THING} to {NAME}\.",
    "lie": rf"The {PLACE} is (north|south|east|west) of the {PLACE}\.",
}
ASK = {
    "person": rf"Where is {NAME}\?",
    "thing": rf"Where is the {THING}\?",
    "before": rf"Where was the {THING} before the {PLACE}\?",
    "what": rf"What is (north|south|east|west) of the {PLACE}\?",
    "of": rf"What is the {PLACE} (north|south|east|west) of\?",
    "gift": rf"What did {NAME} give to {NAME}\?",
    "giver": rf"Who gave the {THING}(?: to {NAME})?\?",
    "to": rf"Who did {NAME} give the {THING} to\?",
    "receiver": rf"Who received the {THING}\?",
}
COMPASS = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}


def solve(text: str) -> str:
    """Read a text that ends with a question, whatever stands between the facts; the answer, or an error."""
    facts = sorted((m.start(), kind, m.groups()) for kind, form in READ.items() for m in re.finditer(form, text))
    asked, question = max((m.end(), (kind, m.groups())) for kind, form in ASK.items() for m in re.finditer(form, text))
    assert not text[asked:].strip(), f"the text goes on after its question: {text[asked:]!r}"
    if question[0] in ("what", "of"):
        return look_up([groups for _, _, groups in facts], *question)
    at, holder, path, gifts = {}, {}, {}, []
    for _, kind, groups in facts:
        who, what = groups[:2]
        if kind == "move":
            at[who] = what
        elif kind == "take":
            assert what not in holder, f"{what} is taken twice"
            holder[what] = who
        elif kind == "drop":
            assert holder.pop(what) == who, f"{who} drops {what} without having it"
            continue
        else:
            assert holder[what] == who and at[who] == at[groups[2]], f"{groups} cannot be"
            holder[what] = groups[2]
            gifts.append(groups)
        for thing, carrier in holder.items():
            visits = path.setdefault(thing, [])
            # A reader of the supporting facts alone may not know yet where the carrier is.
            if carrier in at and at[carrier] not in visits[-1:]:
                assert kind == "move" or not visits, f"{thing} jumps"
                visits.append(at[carrier])
    return reply(question, at, path, gifts)


def reply(question, at, path, gifts) -> str:
    kind, names = question
    if kind == "person":
        return at[names[0]]
    if kind == "thing":
        return path[names[0]][-1]
    if kind == "before":
        visits = path[names[0]]
        return visits[max(i for i, place in enumerate(visits) if place == names[1]) - 1]
    fits = {
        "gift": lambda g: (g[0], g[2]) == names,
        "giver": lambda g: g[1] == names[0] and names[1] in (None, g[2]),
        "to": lambda g: (g[0], g[1]) == names,
        "receiver": lambda g: g[1] == names[0],
    }[kind]
    answer = {"gift": 1, "giver": 0, "to": 2, "receiver": 2}[kind]
    return [gift for gift in gifts if fits(gift)][-1][answer]


def look_up(facts, kind, names) -> str:
    """Draw the map of all facts, then look at the cell asked for."""
    cells = {facts[0][0]: (0, 0)}
    while len(cells) < len({place for fact in facts for place in (fact[0], fact[2])}):
        for place, way, other in facts:
            dx, dy = COMPASS[way]
            if other in cells:
                cells[place] = (cells[other][0] + dx, cells[other][1] + dy)
            elif place in cells:
                cells[other] = (cells[place][0] - dx, cells[place][1] - dy)
    way, place = names if kind == "what" else names[::-1]
    sign = 1 if kind == "what" else -1
    (answer,) = [p for p, c in cells.items() if all(c[i] == cells[place][i] + sign * COMPASS[way][i] for i in (0, 1))]
    return answer


def task_of(segment_tokens=256, global_batch=8, **fields):
    return make_task(validate(DataConfig, {"task": "babilong", "babilong": fields}), segment_tokens, None, global_batch)


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(" ".join(f"Sentence number {i} of the book, not long." for i in range(60)))
    return str(path)


# --- worlds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("count", [1, 8, 30])
def test_answers_follow_from_the_story(task, count):
    random = Random(0)
    for _ in range(200):
        story = babi.tell(random, task, count)
        assert solve(" ".join([*story.facts, story.question])) == story.answer, story


@pytest.mark.parametrize("task, number", [("qa1", 1), ("qa2", 2), ("qa3", 3), ("qa4", 1), ("qa5", 1)])
def test_supporting_facts_are_enough(task, number):
    random = Random(1)
    for _ in range(200):
        story = babi.tell(random, task, 12)
        assert len(set(story.supporting)) == number and story.supporting == sorted(story.supporting)
        needed = [story.facts[i] for i in story.supporting]
        if task == "qa2" and " to the " not in needed[1]:
            # Dropped where its carrier came to: the reader has to be told who had it.
            verb = re.search("dropped|discarded|left|put down", needed[1])
            needed[1:1] = [needed[1].replace(verb[0], "got")] if verb else []
        if task == "qa5":
            # The gift alone answers the question; the reader checks the world as well.
            match = re.match(READ["give"], needed[0])
            people, thing = (match[1], match[3]), match[2]
            needed = [f"{who} went to the office." for who in people] + [f"{people[0]} got the {thing}.", *needed]
        assert solve(" ".join([*needed, story.question])) == story.answer, story


def test_every_sentence_is_listed_and_every_question_is_asked():
    listed, random, forms = set(babi.sentences()), Random(2), Counter()
    for task in TASKS:
        for _ in range(300):
            story = babi.tell(random, task, 15)
            assert listed >= {*story.facts, story.question}
            forms.update(kind for kind, form in ASK.items() if re.fullmatch(form, story.question))
    assert set(forms) == set(ASK)


def test_answers_are_not_guessable():
    random = Random(3)
    for task in TASKS:
        answers = Counter(babi.tell(random, task, 10).answer for _ in range(600))
        assert max(answers.values()) < 600 * 0.3, f"{task}: {answers}"


# --- facts in a long text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokenizer", ["byte", "word"])
def test_samples_are_solved_from_their_tokens(task, tokenizer, book):
    task = task_of(tasks=[task], tokenizer=tokenizer, background=book, facts=12)
    for n in (2, 9):
        batch = task.batch("train", n, ROWS, Difficulty.fixed(n))
        assert batch.input_ids.shape == (8, n * 256) and batch.attention_mask is None
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
            scored = (labels != IGNORE).nonzero().flatten()
            # The answer and eos, each scored at the position before it, and nothing else.
            assert torch.equal(labels[scored], ids[scored[0] + 1 :]) and scored[-1] == len(ids) - 2
            assert ids[-1] == task.tokenizer.eos_token_id
            text = task.tokenizer.decode(ids[: scored[0] + 1])
            text = re.sub(r" (?=[.?,])", "", text)
            assert solve(text) == task.tokenizer.decode(labels[scored[:-1]]).strip()


def test_background_is_consecutive_sentences_and_facts_are_spread(book):
    task = task_of(segment_tokens=1000, tokenizer="byte", background=book, facts=6)
    batch = task.batch("train", 0, range(0, 8), Difficulty.fixed(2))
    starts, places = set(), []
    for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
        text = task.tokenizer.decode(ids[: int((labels != IGNORE).nonzero()[0]) + 1])
        places += [match.start() / len(text) for match in re.finditer(READ["move"], text)]
        rest = re.sub(rf" {ASK['person']}$", "", re.sub(f" {READ['move']}", "", text))
        numbers = [int(x) for x in re.findall(r"Sentence number (\d+) of the book, not long\.", rest)]
        assert len(numbers) > 20 and all((a + 1) % 60 == b for a, b in zip(numbers, numbers[1:], strict=False))
        # Whole sentences, but for the last one.
        assert re.fullmatch(r"( Sentence number \d+ of the book, not long\.)+[^.]*", rest)
        starts.add(numbers[0])
    assert len(starts) > 4
    assert min(places) < 0.2 and max(places) > 0.8


def test_a_stretch_begins_after_any_sentence_as_if_the_text_were_read_again():
    generator = np.random.default_rng(0)
    for seed in range(50):
        tokens, ends = generator.integers(0, 9, 40), generator.random(40) < 0.2
        ends[-1] = True
        found, found_ends = stretch(Background.of(tokens, ends), 60, Random(seed))
        start = Random(seed).choice(np.flatnonzero(ends)) + 1
        window = np.arange(start, start + 60) % 40
        assert np.array_equal(found, tokens[window]) and np.array_equal(found_ends, ends[window])


def test_aligned_facts_begin_segments_of_their_own(book):
    task = task_of(tokenizer="byte", background=book, aligned=True, facts=4, segment_tokens=60)
    begins = Counter()
    for n in (3, 4, 9):
        batch = task.batch("train", n, ROWS, Difficulty.fixed(n))
        for ids in batch.input_ids:
            segments = [task.tokenizer.decode(part) for part in ids.split(60)]
            facts = [re.match(r" (Mary|John|Daniel|Sandra) .*?\.", segment) for segment in segments]
            assert sum(" to the " in segment for segment in segments) == sum(map(bool, facts)) >= 2
            assert facts[-1] is None and re.search(r"Where is \w+\? \w+<eos>$", segments[-1])
            begins.update(i for i, fact in enumerate(facts) if fact and n == 9)
    assert len(begins) > 4
    for fields, says in (
        ({"segment_tokens": 20}, "segment_tokens=20: with data.babilong.aligned"),
        ({"published": {"set": "facebook/babi_qa"}}, "aligned=True: published"),
    ):
        with pytest.raises(ConfigError, match=says):
            task_of(**{"tokenizer": "byte", "aligned": True, "segment_tokens": 60, **fields}).batch(
                "train", 0, ROWS, Difficulty.fixed(4)
            )


def test_pure_function_of_step_and_row(book):
    fields = dict(tasks=list(TASKS), background=book)
    whole = task_of(**fields).batch("train", 3, ROWS, Difficulty(4))
    halves = [task_of(**fields).batch("train", 3, rows, Difficulty(4)) for rows in (range(4), range(4, 8))]
    for field in range(2):
        assert torch.equal(whole[field], torch.cat([half[field] for half in halves]))
    others = [task_of(**fields).batch(s, k, ROWS, Difficulty.fixed(4)) for s, k in (("train", 4), ("validation", 3))]
    same = task_of(**fields).batch("train", 3, ROWS, Difficulty.fixed(4))
    assert not any(torch.equal(same.input_ids, other.input_ids) for other in others)


def test_validation_has_its_own_background(tmp_path, book):
    (tmp_path / "other.txt").write_text("Quite another text. " * 50)
    task = task_of(tokenizer="byte", background=book, validation_background=str(tmp_path / "other.txt"))
    shown = {split: task.show(task.batch(split, 0, ROWS, Difficulty.fixed(2))) for split in ("train", "validation")}
    assert "Sentence" in shown["train"] and "another" not in shown["train"]
    assert "another" in shown["validation"] and "Sentence" not in shown["validation"]


def test_word_vocabulary_is_small_and_knows_every_story(book):
    task = task_of(background=book, vocabulary=3)
    own = {word for sentence in babi.sentences() for word in re.findall(r"\w+|[^\w\s]", sentence)}
    assert task.vocab_size == 3 + len(own) + 3
    words = task.tokenizer.get_vocab()
    assert own <= set(words) and {"Sentence", "number", "book"} & set(words)
    assert "<unk>" not in task.tokenizer.decode(task.tokenizer("Fred handed the milk to Jeff.")["input_ids"])


# --- published sets ----------------------------------------------------------------------------------------------

BABI_QA_ROW = {
    "story": {
        "id": ["1", "2", "3", "4", "5", "6"],
        "type": [0, 0, 1, 0, 0, 1],
        "text": [
            "Mary moved to the bathroom.",
            "John went to the hallway.",
            "Where is Mary?",
            "Daniel went back to the hallway.",
            "Sandra moved to the garden.",
            "Where is Daniel?",
        ],
        "supporting_ids": [[], [], ["1"], [], [], ["4"]],
        "answer": ["", "", "bathroom", "", "", "hallway"],
    }
}
BABILONG_ROW = {
    "input": "It was a dark night. John travelled to the hallway. The rain fell. Mary journeyed to the bathroom. ",
    "question": "Where is John? ",
    "target": "hallway",
}


def test_published_rows_read_like_ours():
    first, second = published.parse(BABI_QA_ROW)
    assert first == babi.Story(BABI_QA_ROW["story"]["text"][:2], "Where is Mary?", "bathroom", [0])
    assert len(second.facts) == 4 and second.supporting == [2] and second.answer == "hallway"
    (sample,) = published.parse(BABILONG_ROW)
    for story in (first, second, sample, babi.tell(Random(0), "qa1", 5)):
        assert solve(" ".join([*story.facts, story.question])) == story.answer


@pytest.mark.parametrize("name, row", [("facebook/babi_qa", BABI_QA_ROW), ("RMT-team/babilong", BABILONG_ROW)])
def test_published_set_as_a_task(name, row, tmp_path, book):
    (tmp_path / "qa1.json").write_text(json.dumps(row) + "\n" + json.dumps(row))
    files = {"set": name, "files": str(tmp_path / "{task}.json"), "validation_fraction": 1}
    fields = dict(tokenizer="byte", background=book, published=files)
    task = task_of(**fields)
    stories = 2 * len(list(published.parse(row)))
    assert task.size("validation") == stories
    batch = task.batch("validation", 0, ROWS, Difficulty.fixed(2))
    assert batch.input_ids.shape == (8, 512)
    scored = [row for row in ROWS if (batch.labels[row] != IGNORE).any()]
    assert [batch.sample_ids[row] for row in scored] == list(range(stories))
    for row in scored:
        positions = (batch.labels[row] != IGNORE).nonzero().flatten()
        text = task.tokenizer.decode(batch.input_ids[row, : positions[0] + 1])
        assert " " + solve(text) == task.tokenizer.decode(batch.labels[row, positions[:-1]])
        # The published text has its background; bAbI's facts are scattered in ours.
        assert ("Sentence number" in text) == (name == "facebook/babi_qa")
    assert (batch.attention_mask is None) == (name == "facebook/babi_qa")
    with pytest.raises(ConfigError, match=r"segments=1 of 20 tokens: a published sample has \d+; use at least"):
        task_of(segment_tokens=20, **fields).batch("validation", 0, ROWS, Difficulty.fixed(1))


def stories(task, split):
    return [(tuple(story.facts), story.question) for story in task.stories[split]]


@pytest.mark.parametrize("name, row", [("facebook/babi_qa", BABI_QA_ROW), ("RMT-team/babilong", BABILONG_ROW)])
def test_published_validation_is_not_trained_on(name, row, tmp_path, book):
    rows = [json.dumps(row).replace("hallway", f"hallway{i}") for i in range(50)]
    (tmp_path / "one.json").write_text("\n".join(rows))
    (tmp_path / "train_qa1.json").write_text("\n".join(rows[:40]))
    (tmp_path / "validation_qa1.json").write_text("\n".join(rows[40:]))
    each = len(list(published.parse(row)))
    held_out = []
    for files in ("one.json", "{split}_{task}.json"):
        task = task_of(tokenizer="byte", background=book, published={"set": name, "files": str(tmp_path / files)})
        train, validation = (set(stories(task, split)) for split in ("train", "validation"))
        # All questions on one row are in one split.
        assert len(task.stories["train"]) + len(task.stories["validation"]) == 50 * each
        assert validation and not train & validation, files
        held_out.append(task.stories["validation"])
    assert len(held_out[1]) == 10 * each
    # Further rows move none of the others.
    (tmp_path / "one.json").write_text("\n".join([rows[0].replace("hallway", "attic"), *rows]))
    task = task_of(tokenizer="byte", background=book, published={"set": name, "files": str(tmp_path / "one.json")})
    assert [story for story in task.stories["validation"] if "attic" not in str(story)] == held_out[0]


@pytest.mark.parametrize("aligned", [False, True])
def test_a_sample_begins_as_the_tokenizer_begins_a_text(aligned, tmp_path, book):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(tmp_path)
    fields = dict(tokenizer=str(tmp_path), background=book, facts=3, aligned=aligned)
    task = task_of(segment_tokens=64, **fields)
    least = -(-task.fewest_tokens // 64)
    for n in (least, least + 3):
        batch = task.batch("train", 0, ROWS, Difficulty.fixed(n))
        assert batch.input_ids.shape == (8, 64 * n)
        assert (batch.input_ids[:, 0] == 256).all() and ((batch.input_ids == 256).sum(1) == 1).all()
        if aligned:
            begun = task.tokenizer.batch_decode(batch.input_ids.view(-1, 64)[:, :10])
            assert sum(text.startswith(tuple(f" {name} " for name in babi.PEOPLE)) for text in begun) >= 2 * len(ROWS)


# --- a user's mistakes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, segment_tokens, message",
    [
        ({}, None, r"segment_tokens=None: task=babilong .* give segment_tokens"),
        ({"tasks": ["qa6"]}, 64, r"babilong\.tasks\.0=qa6: "),
        ({"tasks": []}, 64, r"babilong\.tasks=\[\]: "),
        ({"background": "no/such/book.txt"}, 64, r"background=no/such/book\.txt: no such file"),
        ({"published": {"set": "babi"}}, 64, r"published\.set=babi: "),
        ({"published": {"set": "facebook/babi_qa", "files": "no/such.json"}}, 64, r"published\.set=.*cannot be read"),
    ],
)
def test_mistakes_are_one_line_with_a_remedy(fields, segment_tokens, message):
    with pytest.raises(ConfigError, match=message) as error:
        task_of(segment_tokens, **fields)
    assert "\n" not in str(error.value)


def test_a_row_in_another_format(tmp_path):
    (tmp_path / "x.json").write_text('{"question": "?", "target": "x"}')
    with pytest.raises(ConfigError, match=r"\(qa1\): a row has another format: KeyError\('input'\)"):
        task_of(published={"set": "RMT-team/babilong", "files": str(tmp_path / "x.json")})


def test_shortest_sample_that_fits():
    task = task_of(segment_tokens=16, tasks=list(TASKS), facts=40)
    least = int(re.search(r"use at least (\d+)", str(pytest.raises(ConfigError, task.sequence_tokens, 1).value))[1])
    assert np.ceil(task.fewest_tokens / 16) == least
    for step in range(20):
        batch = task.batch("train", step, ROWS, Difficulty.fixed(least))
        assert batch.input_ids.shape == (8, 16 * least)
