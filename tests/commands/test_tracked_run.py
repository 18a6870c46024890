"""wandb through the real command, by a module that stands for it: stopped, and resumed in the same run."""

import json

from support.commands import records, run_script
from support.paths import FP32, ROOT

SHORT = ["ds_config.train_batch_size=4", "curriculum=[{pairs: 2, steps: 3, warmup_steps: 1}]"]
PATHS = f"{ROOT / 'tests/support/stand_ins'}:{ROOT}"


def test_a_run_is_tracked_and_goes_on(tmp_path):
    out, calls = tmp_path / "tries/first", tmp_path / "calls.jsonl"
    for limit in (["train.max_steps=2"], []):
        result = run_script(
            "train.py", "--ds_config", FP32, "--out", out, *SHORT, *limit, "train.trackers=[wandb]",
            "train.validation_steps=1", PYTHONPATH=PATHS, STAND_IN_CALLS=str(calls),
        )  # fmt: skip
        assert result.returncode == 0 and "wandb: https://wandb.test/run" in result.stderr, result.stderr[-2000:]
    called = [json.loads(line) for line in calls.read_text().splitlines()]
    first, second = (call for call in called if call["call"] == "init")
    kept = json.loads((out / "wandb.json").read_text())["id"]
    assert first["settings"]["run_id"] == second["settings"]["run_id"] == kept and first["pid"] != second["pid"]
    assert (first["settings"]["project"], first["settings"]["run_name"]) == ("tries", "first")
    assert first["config"]["train"]["max_steps"] == 2 and second["config"]["train"]["max_steps"] is None
    assert second["config"]["ds_config"]["zero_optimization"]["stage"] == 3
    logged = [call["values"] for call in called if call["call"] == "log"]
    losses = {values["step"]: values["train/loss"] for values in logged if "train/loss" in values}
    assert losses == {record["step"]: record["loss"] for record in records(out)} and list(losses) == [1, 2, 3]
    assert any("validation/loss" in values and values["step"] == 3 for values in logged)
    assert [call["exit_code"] for call in called if call["call"] == "finish"] == [0, 0]
    assert not (out / "tensorboard").exists()
