"""docs/config.md is current, every key is described with a valid example, and `--help KEY` finds the near ones."""

from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter
from support.paths import ROOT

from armt_dist.config import ConfigError
from armt_dist.model.fields import ARMTFields
from armt_dist.training.config_docs import FILE, help_key, help_sections, render
from armt_dist.training.config_keys import all_keys, docs_of, find_key
from armt_dist.training.run_config import RunConfig
from armt_dist.zero3.ds_config_keys import HONOURED

KEYS = {key.path: key for key in all_keys()}


def test_docs_are_current():
    command = "run: python -m armt_dist.training.config_docs"
    assert ROOT / "docs/config.md" == FILE, "the command writes the file that the repository has"
    assert Path(FILE).read_text(encoding="utf-8") == render(), command


def test_every_key_is_described():
    """By a docstring below its field, with an example where the type alone gives none ("Example: VALUE")."""
    assert not [path for path, key in KEYS.items() if not key.description.endswith(".")], (
        "no docstring, or no full stop"
    )
    assert not [path for path, key in KEYS.items() if not (key.kind and key.default)]
    assert not [path for path, key in KEYS.items() if not key.example], "add 'Example: VALUE' to the docstring"


def test_every_example_is_valid():
    for key in KEYS.values():
        TypeAdapter(key.annotation).validate_python(yaml.safe_load(key.example))


def test_all_sections_are_there():
    sections = {path for path, key in KEYS.items() if key.section is not None}
    assert sections >= {
        name for name, field in RunConfig.model_fields.items() if field.annotation not in (bool, list[str])
    }
    assert sections >= {"data.retrieval", "data.text.dataset", "data.babilong.published", "train.rollback"}
    assert {path.split(".")[1] for path in KEYS if path.startswith("ds_config.")} == set(HONOURED)


def test_model_keys_are_those_of_the_model():
    """A field that is added to ARMTFields appears without an edit elsewhere."""
    assert set(docs_of(ARMTFields)) == set(ARMTFields.__annotations__), "a docstring below every field of ARMTFields"
    assert {f"model.{name}" for name in ARMTFields.__annotations__} <= set(KEYS)
    assert KEYS["model.d_mem"].default == "64"
    assert KEYS["model.d_mem"].range == "≥ 1; not memory_kind=transformer_xl"
    assert KEYS["model.maths"].range == "default, paper; not memory_kind=transformer_xl"


def test_help_explains_a_key():
    text = help_key("train.save_every")
    for part in ("train.save_every", "integer", "500", "≥ 1", "checkpoints", "train.save_every=1000"):
        assert part in text


def test_help_lists_the_keys_of_a_section():
    text = help_key("ds_config.zero_optimization")
    assert "stage3_prefetch_bucket_size" in text and "overlap_comm" in text
    assert all(name in help_sections() for name in RunConfig.model_fields)


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("curriculum.steps", "curriculum.N.steps"),
        ("curriculum.0.steps", "curriculum.N.steps"),
        ("curriculum.N.until.over", "curriculum.N.until.over"),
        ("model.base_config.hidden_size", "model.base_config"),
        ("ds_config.optimizer.params.eps", "ds_config.optimizer.params"),
    ],
)
def test_find_key(written, found):
    assert find_key(written).path == found


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("train.save_evry", "train.save_every"),
        ("save_every", "train.save_every"),
        ("ds_config.train_batch", "ds_config.train_batch_size"),
        ("no_such_thing_at_all", "docs/config.md"),
    ],
)
def test_an_unknown_key_is_one_line(wrong, near):
    with pytest.raises(ConfigError, match=rf"help={wrong}: no such key; .*{near}") as error:
        help_key(wrong)
    assert "\n" not in str(error.value)
