"""Data that a stranger's configuration or export names: builders that run what they read, and files of others."""

import json
import pickle

import pytest
from support.commands import call_script
from support.models import small_model

from armt_dist.checkpoint.export import TASK_FILE
from armt_dist.config import ConfigError, validate
from armt_dist.data.sections import BUILDERS, OTHER_BUILDERS, DataConfig, DatasetConfig
from armt_dist.evaluation.exported import read_task


class Evil:
    """Makes a folder where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (self.path,)


def test_every_builder_of_the_library_is_known():
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    assert set(_PACKAGED_DATASETS_MODULES) <= {*BUILDERS, *OTHER_BUILDERS}
    assert not set(BUILDERS) & set(OTHER_BUILDERS)


@pytest.mark.parametrize("name", OTHER_BUILDERS)
def test_a_builder_that_is_not_for_text(name):
    with pytest.raises(ConfigError, match=f"name={name}: not for text; use one of arrow, csv, json, parquet, text"):
        validate(DatasetConfig, {"name": name, "data_files": "x"})


def exported(folder, data):
    small_model("gpt2", base=dict(vocab_size=300), segment_tokens=4).save_pretrained(folder)
    (folder / TASK_FILE).write_text(json.dumps({"data": data, "extensions": []}))
    return folder


def test_a_pickle_in_an_export_is_not_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil(str(tmp_path / "ran"))))
    data = {"task": "text", "text": {"dataset": {"name": "pandas", "data_files": "evil.pkl"}, "sequence_tokens": 16}}
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", exported(tmp_path / "model", data), "--no-self-check", "--trust-data"]
    code, _, errors = call_script("evaluate.py", arguments, monkeypatch, capsys)
    assert code == 2 and "dataset.name=pandas: not for text" in errors.splitlines()[-1]
    assert not (tmp_path / "ran").exists()


ELSEWHERE = {
    "data.text.files=/etc": {"task": "text", "text": {"files": "/etc"}},
    "data.text.files=~/secrets": {"task": "text", "text": {"files": ["plays", "~/secrets"]}},
    "data.text.validation_files=a/../../b": {"task": "text", "text": {"files": "a", "validation_files": "a/../../b"}},
    "data.text.files=https://host/a.txt": {"task": "text", "text": {"files": "https://host/a.txt"}},
    "data.text.dataset.name=someone/something": {"task": "text", "text": {"dataset": {"name": "someone/something"}}},
    "data.text.dataset.data_files=zip://a::http://host/b": {
        "task": "text",
        "text": {"dataset": {"name": "json", "data_files": ["zip://a::http://host/b"]}},
    },
    "data.instructions.files=/etc": {"task": "instructions", "instructions": {"files": "/etc"}},
    "data.instructions.dataset.name=someone/something": {
        "task": "instructions",
        "instructions": {"dataset": {"name": "someone/something"}},
    },
    "data.mixture.parts.1.text.files=/etc": {
        "task": "mixture",
        "mixture": {"parts": [{}, {"task": "text", "text": {"files": "/etc"}}]},
    },
    "data.babilong.background=/home": {"task": "babilong", "babilong": {"background": "/home"}},
    "data.babilong.published.set=facebook/babi_qa": {
        "task": "babilong",
        "babilong": {"published": {"set": "facebook/babi_qa"}},
    },
    "data.babilong.published.files=/a": {
        "task": "babilong",
        "babilong": {"published": {"set": "facebook/babi_qa", "files": "/a"}},
    },
}


@pytest.mark.parametrize("says", ELSEWHERE)
def test_an_export_does_not_choose_what_is_read(says, tmp_path):
    (tmp_path / TASK_FILE).write_text(json.dumps({"data": ELSEWHERE[says], "extensions": []}))
    with pytest.raises(ConfigError, match="names data outside of the working directory; give your own by --data") as no:
        read_task(tmp_path, None, [])
    assert str(no.value).startswith(f"{says}: {tmp_path}")
    assert isinstance(read_task(tmp_path, None, [], trusted=True), DataConfig)
    key = says.partition("=")[0]
    if not key.endswith(("name", "set")):
        assert isinstance(read_task(tmp_path, None, [f"{key}=mine"]), DataConfig)


def test_what_lies_below_the_working_directory_is_read(tmp_path):
    (tmp_path / TASK_FILE).write_text(json.dumps({"data": {"task": "text", "text": {"files": ["plays/a.txt"]}}}))
    assert read_task(tmp_path, None, []).text.files == ["plays/a.txt"]
