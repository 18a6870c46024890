"""Tokens that are made once: by whom, for whom, and what becomes of damage."""

import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from support.hostile import anonymous_growth_mb

from armt_dist.config import ConfigError, validate
from armt_dist.data.lengths import Difficulty
from armt_dist.data.sections import DataConfig
from armt_dist.data.tasks import make_task
from armt_dist.data.text import cache, files
from armt_dist.data.text.cache import cached
from armt_dist.data.text.token_store import BLOCK, ENDS, MANIFEST, SUMS, TOKENS, TokenWriter, open_store
from armt_dist.data.text.tokenising import Tokeniser
from armt_dist.data.tokenizers import byte_tokenizer
from armt_dist.training.run_folder import fixed


def silent(line):
    pass


def write(folder, texts, vocab_size=300):
    writer = TokenWriter(folder, vocab_size)
    for text in texts:
        for part in np.array_split(text, 3):
            writer.add(part)
        writer.end_text()
    writer.close([])


@pytest.mark.parametrize("vocab_size", [2**16, 2**17])
def test_a_store_gives_back_what_was_written(vocab_size, tmp_path):
    random = np.random.default_rng(0)
    texts = [random.integers(0, vocab_size, n) for n in (5, 0, BLOCK - 5, 3 * BLOCK + 17, 0, 2, 0)]
    write(tmp_path, texts, vocab_size)
    store = open_store(tmp_path)
    whole = np.concatenate(texts)
    assert len(store) == len(whole) and np.array_equal(store.part(0, len(store)), whole)
    assert [store.part(a, b).tolist() for a, b in zip(store.starts, store.ends, strict=True)] == [
        text.tolist() for text in texts
    ]
    assert store.begins(0, len(whole)).tolist() == [0, 5, BLOCK, 4 * BLOCK + 17]
    assert store.begins(1, BLOCK).tolist() == [5]


def cut(path, size):
    with path.open("r+b") as file:
        file.truncate(size)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "cut": (lambda folder: cut(folder / TOKENS, 1000), "tokens.bin has 1000 bytes instead of"),
    "longer": (lambda folder: cut(folder / TOKENS, 10**6), "tokens.bin has 1000000 bytes"),
    "gone": (lambda folder: (folder / TOKENS).unlink(), "No such file"),
    "a bit of the ends": (lambda folder: flip(folder / ENDS, 3), "is not what was written"),
    "no sums": (lambda folder: (folder / SUMS).unlink(), "No such file"),
    "half a manifest": (lambda folder: cut(folder / MANIFEST, 20), "manifest.json is missing or damaged"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "manifest.json is missing or damaged"),
    "another manifest": (lambda folder: (folder / MANIFEST).write_text('{"format": 1}'), "missing or damaged"),
    "a later format": (lambda folder: (folder / MANIFEST).write_text('{"format": 9}'), "format 9"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_store_is_named(name, tmp_path):
    write(tmp_path, [np.arange(200), np.arange(2 * BLOCK) % 300])
    do, says = DAMAGE[name]
    do(tmp_path)
    with pytest.raises(ConfigError, match=f"data.text.cache: {tmp_path} is damaged .*{says}.*; delete it") as caught:
        open_store(tmp_path)
    assert "\n" not in str(caught.value)


def test_damaged_tokens_are_named_when_they_are_read(tmp_path):
    write(tmp_path, [np.arange(3 * BLOCK) % 300])
    flip(tmp_path / TOKENS, 2 * (BLOCK + 7))
    store = open_store(tmp_path)
    assert store.part(0, BLOCK).tolist() == (np.arange(BLOCK) % 300).tolist()
    store.part(2 * BLOCK, 3 * BLOCK)
    for _ in range(2):
        with pytest.raises(ConfigError, match="tokens.bin is not what was written.*; delete it"):
            store.part(BLOCK - 1, BLOCK + 1)


# --- who makes it ------------------------------------------------------------------------------------------------


def ask_at_once(count, folder, make, monkeypatch):
    """Ask for the same store in several threads; return the stores and errors, and what each was told."""
    monkeypatch.setattr(cache, "POLL_S", 0.05)
    found, told, gate = [], [], threading.Barrier(count)

    def ask():
        gate.wait()
        try:
            found.append(cached(str(folder), ["x"], make, told.append))
        except ConfigError as error:
            found.append(error)

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found, told


def test_one_makes_it_and_the_others_wait_and_see_it_grow(tmp_path, monkeypatch):
    made = []

    def make(folder):
        made.append(folder)
        for size in (10, 20, 30):
            (folder / TOKENS).write_bytes(bytes(size * 10**6))
            time.sleep(0.3)
        write(folder, [np.arange(100)])

    stores, told = ask_at_once(4, tmp_path, make, monkeypatch)
    assert len(made) == 1 and [store.part(0, 100).tolist() for store in stores] == [list(range(100))] * 4
    assert any("another process tokenises the texts: 20 MB of tokens so far" in line for line in told), told
    assert cached(str(tmp_path), ["x"], None, silent).part(0, 5).tolist() == [0, 1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [made[0].name.partition(".")[0]]


def test_where_locks_do_not_hold_the_last_ones_use_what_the_first_made(tmp_path, monkeypatch):
    class NoLock:
        def __init__(self, *args, **kwargs):
            pass

        def acquire(self, timeout):
            return threading.Lock()

    monkeypatch.setattr(cache, "FileLock", NoLock)
    together = threading.Barrier(3)

    def make(folder):
        write(folder, [np.arange(100)])
        together.wait()

    stores, _ = ask_at_once(3, tmp_path, make, monkeypatch)
    assert [store.part(0, 100).tolist() for store in stores] == [list(range(100))] * 3
    assert len(list(tmp_path.iterdir())) == 1, "what the losers wrote is left"


def test_an_error_leaves_nothing_and_the_next_one_makes_it(tmp_path, monkeypatch):
    def make(folder):
        (folder / TOKENS).write_bytes(b"half")
        raise ConfigError("a bad text")

    found, _ = ask_at_once(2, tmp_path, make, monkeypatch)
    assert [str(error) for error in found] == ["a bad text"] * 2
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(cached(str(tmp_path), ["x"], lambda folder: write(folder, [np.arange(9)]), silent)) == 9


KILLED = """
import sys, time
from armt_dist.data.text.cache import cached
from armt_dist.data.text.token_store import TOKENS
def make(folder):
    (folder / TOKENS).write_bytes(b"half")
    print("making", flush=True)
    time.sleep(60)
cached(sys.argv[1], ["x"], make, print)
"""


def test_a_killed_process_is_not_waited_for(tmp_path, monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "making\n"
    monkeypatch.setattr(cache, "POLL_S", 0.05)
    monkeypatch.setattr(cache, "STALLED_S", 0.3)
    with pytest.raises(ConfigError, match=r"the process that holds .*\.lock has written nothing for 0 s; end it"):
        cached(str(tmp_path), ["x"], None, silent)
    process.kill()
    process.wait()
    began = time.monotonic()
    assert len(cached(str(tmp_path), ["x"], lambda folder: write(folder, [np.arange(9)]), silent)) == 9
    assert time.monotonic() - began < 5
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1, "what the killed process left stays"


@pytest.mark.skipif(os.geteuid() == 0 and sys.platform != "linux", reason="needs /proc")
def test_a_place_that_cannot_be_written():
    with pytest.raises(
        ConfigError, match=r"data.text.cache=/proc/x: tokens cannot be kept there \(.*\); make room, or"
    ):
        cached("/proc/x", ["x"], None, silent)


# --- the task ----------------------------------------------------------------------------------------------------


def task_of(texts, folder, **fields):
    text = {"files": str(texts), "validation_fraction": 0, "sequence_tokens": 64, "cache": str(folder)}
    return make_task(validate(DataConfig, {"task": "text", "text": text | fields}), 16, None, 2)


def batch_of(task):
    return task.batch("train", 0, range(2), Difficulty.fixed(4)).input_ids.tolist()


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(3):
        (tmp_path / f"texts/{i}.txt").write_text(f"{i} some text\n" * 40)
    return tmp_path / "texts"


def stores(folder):
    return [path for path in folder.iterdir() if path.is_dir()]


def test_the_second_start_tokenises_nothing(texts, tmp_path, monkeypatch):
    first = task_of(texts, tmp_path / "cache")
    monkeypatch.setattr(Tokeniser, "write", None)
    second = task_of(texts, tmp_path / "cache")
    assert batch_of(first) == batch_of(second) and first.texts() == second.texts() and first.texts()["train"]
    # Nor do other lengths of sequences.
    task_of(texts, tmp_path / "cache", sequence_tokens=128, pack=True)


def test_what_was_made_for_other_texts_or_tokenizers_is_not_used(texts, tmp_path):
    folder, other = tmp_path / "cache", byte_tokenizer()
    other.add_tokens(["some"])
    other.save_pretrained(tmp_path / "other")
    before = batch_of(task_of(texts, folder))
    changed = batch_of(task_of(texts, folder, tokenizer=str(tmp_path / "other")))
    assert 259 in changed[0] and 259 not in before[0] and len(stores(folder)) == 2
    (texts / "0.txt").write_text("0 SOME text\n" * 40)
    assert batch_of(task_of(texts, folder)) != before and len(stores(folder)) == 3


def test_a_text_that_changes_while_it_is_read(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 100)
    opened = files.open_regular

    def open_and_grow(path):
        file = opened(path)
        with (texts / "1.txt").open("a") as more:
            more.write("more")
        return file

    monkeypatch.setattr(files, "open_regular", open_and_grow)
    with pytest.raises(
        ConfigError, match=r"files=.*1\.txt: changed while it was read; start again when nothing writes"
    ):
        task_of(texts, tmp_path / "cache")
    assert not stores(tmp_path / "cache"), "half of it was kept"


def test_memory_does_not_grow_with_the_text(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("Some words, again and again.\n" * 10**6)
    task_of(tmp_path / "texts", tmp_path / "warm", sequence_tokens=1024)
    with anonymous_growth_mb() as growth:
        task = task_of(tmp_path / "texts", tmp_path / "cache", sequence_tokens=1024)
        batch_of(task)
    assert growth() < 30, "29 MB of text"


def test_a_run_may_move_its_cache():
    tree = {"data": {"text": {"cache": "/a", "files": "x"}}, "train": {}}
    assert [key for key in fixed(tree) if key.startswith("data.")] == ["data.text.files"]


def test_a_manifest_is_json_for_people(texts, tmp_path):
    task_of(texts, tmp_path / "cache")
    (folder,) = stores(tmp_path / "cache")
    about = json.loads((folder / MANIFEST).read_text())["about"]
    assert [name for name, _, _ in about] == ["0.txt", "1.txt", "2.txt"]
