"""The packages around us: what is installed, what an export carries, and what both say of other versions."""

import importlib.metadata
import json
import re

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from support.commands import call_script
from support.models import small_model
from support.paths import ROOT

from armt_dist import versions
from armt_dist.checkpoint import exported_code
from armt_dist.config import ConfigError
from armt_dist.evaluation.exported import small_twin
from armt_dist.model import tested
from armt_dist.model.configuration_armt import ARMTConfig

# A line of hashes.txt, with its hashes.
PINNED = r"^(\S+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$"
FAMILIES = ("gpt2", "gpt_neox", "llama")


def ranges():
    """Requirement by name, as setup.py has them."""
    texts = re.findall(r'^ {8}"([A-Za-z_]+[<>=].*)",$', (ROOT / "setup.py").read_text(), re.MULTILINE)
    return {canonicalize_name(needed.name): needed for needed in map(Requirement, texts)}


def lock():
    """Version by name, as constraints.txt has them."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pins}


# --- ranges and lock --------------------------------------------------------------------------------------------------


def test_the_lock_is_within_the_ranges():
    locked, needed = lock(), ranges()
    assert len(needed) >= 14 and "torch" not in locked
    for name in needed.keys() - {"torch"}:
        assert needed[name].specifier.contains(locked[name]), f"{name} {locked[name]} is not in {needed[name]}"


def test_every_locked_package_has_hashes():
    """Of its archives, in hashes.txt or in hashes-test.txt, and what training needs in the first."""
    files = [(ROOT / "launch" / name).read_text() for name in ("hashes.txt", "hashes-test.txt")]
    found = [
        {canonicalize_name(name): version for name, version, _ in re.findall(PINNED, text, re.MULTILINE)}
        for text in files
    ]
    assert found[0] | found[1] == lock() and not found[0].keys() & found[1].keys()
    assert all(text.count("==") == len(pins) for text, pins in zip(files, found, strict=True)), "one without a hash"
    assert found[0].keys() >= {"deepspeed", "transformers", "numpy", "tqdm"}
    assert not found[0].keys() & {"pytest", "ruff", "lm-eval"} and files[1].splitlines()[1] == "-r hashes.txt"


def test_the_modelling_code_knows_its_range():
    lower = next(s.version for s in ranges()["transformers"].specifier if s.operator == ">=")
    assert tested.minor(tested.OLDEST) == Version(lower).release[:2]
    assert tested.minor(tested.NEWEST) == Version(lock()["transformers"]).release[:2]


@pytest.fixture
def installed(monkeypatch):
    """A function that makes some packages look as if they had another version, None: none."""

    def pretend(**others):
        def version(name):
            if name in others and others[name] is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return others.get(name) or importlib.metadata.version(name)

        monkeypatch.setattr(versions, "version", version)
        monkeypatch.setattr(versions, "requires", lambda name: [str(needed) for needed in ranges().values()])

    return pretend


def test_versions_in_the_range_are_not_mentioned(installed, capsys):
    installed(torch="2.13.0+cpu")
    versions.check_versions(strict=True)
    assert capsys.readouterr() == ("", "")


def test_a_version_outside_is_one_line_and_the_run_goes_on(installed, capsys):
    installed(transformers="5.17.0", datasets=None)
    versions.check_versions(strict=False, speaks=False)
    assert capsys.readouterr().err == ""
    versions.check_versions(strict=False)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "bash launch/install.sh" in line
    assert "transformers 5.17.0 is outside <6,>=5.18" in line and "datasets is missing" in line
    with pytest.raises(ConfigError, match="strict-versions: .*transformers 5.17.0"):
        versions.check_versions(strict=True)


@pytest.mark.parametrize("command", ["train.py", "evaluate.py --model x", "consolidate.py x --out y"])
def test_strict_versions_end_the_command(command, installed, monkeypatch, capsys):
    installed(transformers="5.17.0")
    name, *arguments = command.split()
    code, _, error = call_script(name, [*arguments, "--strict-versions"], monkeypatch, capsys)
    assert code == 2 and error.startswith("error: strict-versions: ") and error.count("\n") == 1


def test_an_export_has_todays_code(tmp_path):
    small_model().save_pretrained(tmp_path)
    assert not exported_code.is_stale(tmp_path)
    assert {file.name for file in exported_code.code_files()} == {path.name for path in tmp_path.glob("*.py")}
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == exported_code.AUTO_MAP
    assert exported_code.refresh(tmp_path) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_the_twin_of_a_large_model_is_small(family):
    config = small_model(family=family, n_heads=2).config
    large = ARMTConfig.from_dict({**config.to_dict(), "sliding_window": 8})
    twin = small_twin(large)
    assert sum(p.numel() for p in twin.parameters()) < 2e5
    assert twin.config.base_config.model_type == family and twin.config.sliding_window == 8
    with torch.no_grad():
        twin.check()
