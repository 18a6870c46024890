"""The shell scripts in slurm/ pass shellcheck."""

import subprocess

import pytest
from support.paths import ROOT

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))


@pytest.mark.needs("shellcheck")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    result = subprocess.run(["shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
