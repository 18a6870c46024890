"""Run launch/preflight.py on one machine."""

import pytest
from support.commands import run_script


def test_command_passes_on_one_fit_node(tmp_path):
    result = run_script("preflight.py", "--nodes=1", f"--folder={tmp_path}", "--need-gib=0")
    assert result.returncode == 0, result.stderr
    assert "preflight: 1 nodes fit" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes=2"], "nodes=2: 1 take part"),
        (["--gpus=64"], "GPUs of 64"),
        (["--need-gib=1e9"], "GiB free in the run's folder, 1000000000.0 GiB needed"),
    ],
)
def test_command_ends_with_one_line_and_code_2(tmp_path, arguments, words):
    result = run_script("preflight.py", f"--folder={tmp_path}", *arguments)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], result.stderr
