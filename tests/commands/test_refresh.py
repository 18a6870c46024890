"""Exported folders whose modelling code is of an older version: recognised, and refreshed on request."""

import pytest
from support.commands import run_script
from support.models import small_model

from armt_dist.checkpoint import exported_code
from armt_dist.data.tokenizers import character_tokenizer


@pytest.fixture
def exported(tmp_path):
    """An exported model whose modelling code is of an older version, without the guard against other transformers."""
    folder = tmp_path / "model"
    small_model().save_pretrained(folder)
    characters = "".join(map(chr, range(65, 115)))
    character_tokenizer(characters, {"eos_token": "A", "pad_token": "B"}).save_pretrained(folder)
    (folder / "generation.py").unlink()
    new = (folder / "modeling_armt.py").read_text()
    old = new.replace("(ARMTGeneration)", "(SegmentRows, GenerationMixin)").replace(
        "from .generation import ARMTGeneration, check_cacheable, check_others",
        "from transformers import GenerationMixin\nfrom .segment_rows import SegmentRows",
    )
    assert old.count("GenerationMixin") == 2, "modeling_armt.py is written differently now; adapt this fixture"
    (folder / "modeling_armt.py").write_text(old)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_old_code_is_recognised_and_refreshed(exported, tmp_path):
    before = contents(exported)
    refresh = f"launch/consolidate.py --refresh {exported}"
    asked = run_script("ask.py", "--model", exported, "question")
    assert asked.returncode == 2 and refresh in asked.stderr and "Traceback" not in asked.stderr
    evaluated = run_script("evaluate.py", "--model", exported, "--task", "text", "--samples", "4", "--lengths", "2")
    assert refresh in evaluated.stderr and "is not this version's" in evaluated.stderr
    assert contents(exported).keys() - before.keys() == set(), "nothing but code is written"
    done = run_script("consolidate.py", "--refresh", exported)
    assert done.returncode == 0, done.stderr
    assert "replaced generation.py, modeling_armt.py" in done.stdout
    after = contents(exported)
    for name in before.keys() - {"modeling_armt.py"}:
        assert after[name] == before[name], f"{name} was touched"
    assert not exported_code.is_stale(exported)
    again = run_script("consolidate.py", "--refresh", exported)
    assert again.returncode == 0 and "is this version's already" in again.stdout


BAD_FOLDERS = {
    "no readable config.json": None,
    "is not an ARMT": '{"model_type": "gpt2"}',
    "no readable config.json in it": "{",
}


@pytest.mark.parametrize("says", BAD_FOLDERS)
def test_a_folder_without_a_model_is_not_refreshed(says, tmp_path):
    if BAD_FOLDERS[says]:
        (tmp_path / "config.json").write_text(BAD_FOLDERS[says])
    done = run_script("consolidate.py", "--refresh", tmp_path)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*.py"))


def test_refresh_goes_without_a_run(tmp_path):
    done = run_script("consolidate.py", "run", "--refresh", tmp_path)
    assert done.returncode == 2 and "--refresh takes no run" in done.stderr
