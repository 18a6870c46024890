"""{array}, {job} and {name} in arguments."""

import pytest
from support.commands import call_script

from armt_dist.config import ConfigError
from armt_dist.distributed.placeholders import fill

SLURM = {"SLURM_ARRAY_TASK_ID": "4", "SLURM_JOB_ID": "120", "SLURM_JOB_NAME": "my run"}


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("train.seed={array}", "train.seed=4"),
        ("runs/{name}-{job}/{array}", "runs/my run-120/4"),
        ("data.text={files: 'books/{array}/*.txt'}", "data.text={files: 'books/4/*.txt'}"),
        ("model={base_config: {model_type: gpt2}}", "model={base_config: {model_type: gpt2}}"),
        (
            "files=babi/{task}_{split}.json",
            "files=babi/{task}_{split}.json",
        ),
        ("data.text.dataset={name: json}", "data.text.dataset={name: json}"),
    ],
)
def test_placeholders_are_filled_and_other_braces_stay(text, filled):
    assert fill(text, SLURM) == filled


def test_a_placeholder_without_a_value_is_named():
    says = r"train.seed=\{array\}: SLURM_ARRAY_TASK_ID is not set; submit with sbatch --array, or write the value out"
    with pytest.raises(ConfigError, match=says):
        fill("train.seed={array}", {})


def test_the_command_fills_overrides_config_and_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    (tmp_path / "4.yaml").write_text("model: {base_config: {model_type: gpt2}}\ncurriculum: [{pairs: 4, steps: 9}]\n")
    arguments = ["--config", f"{tmp_path}/{{array}}.yaml", "train.seed={array}", "--show-config"]
    code, shown, _ = call_script("train.py", arguments, monkeypatch, capsys)
    assert code == 0 and "\n  seed: 4\n" in shown and "pairs: 4" in shown
