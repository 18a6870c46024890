"""A user's module outside of the package adds a task, a transform and a metric: the examples of docs/extensions.md."""

import re

import pytest
from support.commands import records, run_script
from support.paths import FP32, ROOT

MODEL = (
    "{base_config: {model_type: gpt2, n_embd: 16, n_layer: 2, n_head: 2, n_positions: 16}, num_mem_tokens: 2, d_mem: 4}"
)
RUN = [
    *("--ds_config", FP32, "data={task: copying, options: {letters: 3}}", f"model={MODEL}", "train.max_steps=2"),
    *("curriculum=[{segments: 2, at_least: 1.0, steps: 4}]", "ds_config.train_batch_size=4"),
    *("train.validate_every=2", "train.validation_steps=1"),
]


@pytest.fixture
def folder(tmp_path):
    """A folder with the modules of the documentation."""
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/extensions.md").read_text(), re.DOTALL):
        (tmp_path / re.match(r"# (\w+\.py)", block)[1]).write_text(block)
    return tmp_path


def train(folder, *arguments, **environ):
    return run_script("train.py", *RUN, "--out", folder / "run", *arguments, PYTHONPATH=f"{ROOT}:{folder}", **environ)


def test_the_examples_train_validate_and_are_evaluated(folder):
    result = train(folder, "extensions=[copying, my_module]", "train.best=nearly_right")
    assert result.returncode == 0, result.stderr[-3000:]
    for kind in ("train", "validation"):
        for record in records(folder / "run", kind):
            assert 0 <= record["nearly_right"] <= 1 and record["nearly_right"] >= record["accuracy"], record
    assert (folder / "run/checkpoints/best").exists()
    exported = folder / "exported"
    assert run_script("consolidate.py", folder / "run", "--out", exported).returncode == 0
    missing = run_script("evaluate.py", "--model", exported, "--lengths", 1)
    assert missing.returncode == 2 and "or give --extensions copying my_module, as in training" in missing.stderr
    found = run_script(
        "evaluate.py", "--model", exported, "--lengths", 1, "--samples", 4, "--extensions", "copying",
        PYTHONPATH=f"{ROOT}:{folder}",
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]


@pytest.mark.parametrize(
    ("module", "arguments", "says"),
    [
        ("", ["extensions=[nowhere]"], "extensions=nowhere: cannot be imported (ModuleNotFoundError: No module named"),
        ("1 / 0", ["extensions=[mine]"], "extensions=mine: cannot be imported (ZeroDivisionError: division by zero)"),
        (
            "",
            ["extensions=[mine]"],
            "data.task=copying: no such task; one of rewrite, remember, text, babilong, instructions, mixture, or name",
        ),
        (
            "from copying import Copying\nCopying.carries = False",
            ["extensions=[copying, mine]", "train.carry_state=0.5"],
            "train.carry_state=0.5: data.task=copying forbids it, as its answers depend on all that was read before",
        ),
        (
            "from armt_dist.data.extensions import metric\n@metric('loss')\ndef f(rows): return 0",
            ["extensions=[mine]"],
            "metric loss: every run measures it; choose another name",
        ),
        (
            "from armt_dist.data.extensions import metric\n@metric('broken')\ndef f(rows): return rows.nothing",
            ["extensions=[mine, copying]"],
            "metric broken: raised AttributeError ('Rows' object has no attribute 'nothing'); mend the extension",
        ),
        (
            "from armt_dist.data.extensions import transform\n@transform('cut')\n"
            "def f(batch, split, step): return batch._replace(input_ids=batch.input_ids[:, 1:])",
            ["extensions=[mine, copying]"],
            "transform cut: changed the shape [4, 32] of a batch; keep it",
        ),
    ],
)
def test_mistakes_of_a_module_end_in_one_line(module, arguments, says, folder):
    (folder / "mine.py").write_text(module)
    result = train(folder, *arguments)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert result.returncode == 2 and len(errors) == 1 and says in errors[0], result.stderr[-2000:]
    assert "Traceback" not in result.stderr


def test_an_installed_package_is_found_by_its_entry_point(folder):
    site = folder / "copying_task-1.0.dist-info"
    site.mkdir()
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: copying-task\nVersion: 1.0\n")
    (site / "entry_points.txt").write_text("[armt_dist.extensions]\nour_tasks = copying\n")
    result = train(folder, "extensions=[our_tasks]", "--show-config")
    assert result.returncode == 0 and "task: copying" in result.stdout, result.stderr[-2000:]
