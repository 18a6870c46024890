"""What a run records about itself, and what it refuses when it resumes."""

from types import SimpleNamespace

import pytest

from armt_dist.config import ConfigError
from armt_dist.data.text.files import TextFacts
from armt_dist.training.run_folder import check_texts, environment, write_texts


def task_with(train, validation):
    """A task that has read texts of these names."""
    facts = {"train": train, "validation": validation}
    texts = {split: [TextFacts(name, 1, f"hash of {name}") for name in names] for split, names in facts.items()}
    return SimpleNamespace(texts=lambda: texts)


def test_a_text_that_changes_sides_is_refused(tmp_path):
    write_texts(tmp_path, task_with(["a", "b"], ["c"]))
    check_texts(tmp_path, task_with(["a", "b", "new"], ["c", "newer"]))
    # A text that is missing for a while is not forgotten.
    write_texts(tmp_path, task_with(["b", "new"], ["c"]))
    for train, validation, message in (
        (["b"], ["c", "a"], "data.text: a would be used for validation, and the run in .* has used it for train"),
        (["b", "c"], ["new"], "data.text: c would be used for train, and the run in .* has used it for validation"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            check_texts(tmp_path, task_with(train, validation))
        assert "\n" not in str(error.value)


def test_a_run_without_texts_records_none(tmp_path):
    write_texts(tmp_path, SimpleNamespace(texts=dict))
    assert not list(tmp_path.iterdir())
    check_texts(tmp_path, task_with(["a"], ["b"]))


def test_a_machine_without_git_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment()["commit"] is None
