"""Training through the real command: launcher, ZeRO-3, two gloo ranks; stops, resumes, mistakes."""

import json
import re
import subprocess
import sys

import pytest
import yaml
from support.commands import curve, train, train_by_deepspeed
from support.paths import FP32, ROOT

from armt_dist.checkpoint import folder as checkpoint

# Two stages, dropout, validations and saves at steps of their own: all that a resume could get wrong.
SHORT = [
    "model.base_config.resid_pdrop=0.1",
    "curriculum.0.steps=12",
    "curriculum.0.warmup_steps=5",
    "curriculum.1.steps=12",
    "train.validate_every=7",
    "train.save_every=6",
    "train.validation_steps=1",
    "ds_config.train_batch_size=16",
]
STOP = "train.max_steps=15"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An uninterrupted run, and one that was stopped and whose newest checkpoint was damaged.

    Resumed, it keeps graphs as far as memory is free, which changes no number.
    """
    root = tmp_path_factory.mktemp("runs")
    for name, limits in (("whole", [[]]), ("stopped", [[STOP], ["bptt.keep=auto"]])):
        for limit in limits:
            start = train_by_deepspeed if name == "whole" else train
            result = start("--ds_config", FP32, "--out", root / name, *SHORT, *limit)
            assert result.returncode == 0, result.stderr[-3000:]
            if limit == [STOP]:
                newest = root / name / "checkpoints" / (root / name / "checkpoints/latest").read_text()
                assert newest.name == "step_00000015"
                victim = next(newest.glob("*optim_states.pt"))
                damaged = bytearray(victim.read_bytes())
                damaged[len(damaged) // 2] ^= 1
                victim.write_bytes(damaged)
        (root / f"{name}.log").write_text(result.stdout + result.stderr)
    return root


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(runs):
    whole, stopped = curve(runs / "whole"), curve(runs / "stopped")
    assert len(whole) == 24 + 5, "24 steps; validations after 7, 12, 14, 21, 24"
    assert stopped == whole


def test_graphs_are_kept_once_it_is_known_what_is_free(runs):
    """After two steps without them, and after each that is longer than all before."""
    records = [json.loads(line) for line in (runs / "stopped/metrics.jsonl").read_text().splitlines()]
    kept = [record.get("kept", 0) for record in records if record["kind"] == "train"]
    # Resumed at step 14.
    assert set(kept[:16]) == {0} and set(kept[16:]) == {0, 1}
    assert kept[-1] == 1 and kept[16:].count(1) > kept[16:].count(0)


def test_no_deprecation_reaches_the_terminal(runs):
    log = (runs / "whole.log").read_text()
    assert "step" in log and not re.search("deprecat|FutureWarning", log, re.IGNORECASE)


def test_a_damaged_checkpoint_is_named_and_passed_over(runs):
    log = (runs / "stopped.log").read_text()
    assert "skipping a damaged checkpoint" in log and "step_00000015" in log and "SHA-256" in log
    # The best one of the first stage was the newest undamaged.
    assert "resumed" in log and "at step 14" in log


def test_the_run_folder_tells_what_was_run(runs):
    folder = runs / "whole"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["curriculum"][0]["steps"] == 12 and config["bptt"]["states"] == "store"
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["torch"] and environment["deepspeed"] and "commit" in environment
    assert json.loads((folder / "ds_config.json").read_text())["zero_optimization"]["stage"] == 3
    assert list((folder / "tensorboard").iterdir())
    assert (folder / "model/config.json").exists() and (folder / "model/tokenizer.json").exists()


def test_checkpoints_are_pruned_and_whole(runs):
    root = runs / "whole/checkpoints"
    assert (root / "latest").read_text() == "step_00000024"
    assert (root / (root / "best").read_text()).is_dir()
    assert not list(root.glob("staging-*"))
    for tag in checkpoint.tags(root):
        manifest = checkpoint.verify_checkpoint(root / tag)
        on_disk = {p.relative_to(root / tag).as_posix() for p in (root / tag).rglob("*") if p.is_file()}
        assert set(manifest.files) == on_disk - {"manifest.json"}


def test_a_finished_run_is_left_as_it_is(runs):
    before = (runs / "whole/metrics.jsonl").read_bytes()
    result = train("--ds_config", FP32, "--out", runs / "whole", *SHORT)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (runs / "whole/metrics.jsonl").read_bytes() == before


OTHERS = {
    "rmt": ["model.memory_kind=rmt"],
    "segment_major": ["parallel.schedule=segment_major"],
    "transformer_xl": ["model.memory_kind=transformer_xl", "model.num_mem_tokens=null", "model.d_mem=null"],
}


@pytest.mark.parametrize("memory", OTHERS.values(), ids=OTHERS)
def test_other_memories_and_schedules(memory, tmp_path):
    """With everything that looks at their cells, to a model that is evaluated."""
    watched = ["digests=true", "profile=true", "train.log_every=1"]
    few = ["curriculum=[{pairs: 5, steps: 3}]", "train.validation_steps=1", "model.base_config.n_positions=32"]
    few.append("ds_config.train_batch_size=16")
    result = train("--ds_config", FP32, "--out", tmp_path / "run", *few, *watched, *memory)
    assert result.returncode == 0, result.stderr[-3000:]
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    assert len(steps) == 3 and all(0 < step["cell_s"] < step["step_s"] for step in steps)
    for command in (
        ["launch/consolidate.py", tmp_path / "run", "--out", tmp_path / "hf"],
        ["launch/evaluate.py", "--model", tmp_path / "hf", "--lengths", "2", "--samples", "8"],
    ):
        result = subprocess.run(
            [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert result.returncode == 0, result.stderr[-2000:]


MISTAKES = {
    "unknown key": (["model.d_memm=4"], "model.d_memm=4: unknown key"),
    "heads and width": (["model.n_heads=3"], "n_heads=3 does not divide d_mem=16"),
    "unit of another task": (["curriculum.0.pairs=null", "curriculum.0.segments=4"], "curriculum.0.segments=4"),
    "key of a stage": (["curriculum.0.key_length=2"], "key_length=2: above data.retrieval.key_length=1"),
    "missing file": (["--config", "/no/such.yaml"], "config=/no/such.yaml"),
    "sp and the world": (["parallel.sp=3"], "sp=3 does not divide the world of 2"),
    "batch and the world": (["--ds_config", "odd.json"], "train_batch_size=5"),
    "stage 2": (["--ds_config", "stage2.json"], "zero_optimization.stage=2"),
    "missing text": (
        ["data.task=text", "data.retrieval=null", "data.text.files=/no/such/*.txt", "model.segment_tokens=8"],
        "/no/such/*.txt",
    ),
    "missing base": (["model.base=/no/such/model", "model.base_config=null", "model.init=null"], "/no/such/model"),
    "other data": (["data.seed=7"], "data.seed=7"),
    "other precision": (["ds_config.bf16.enabled=true"], "ds_config.bf16.enabled=True: the run in"),
}
# Mistakes at a resume.
RESUMING = ("other data", "other precision")


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_from_one_rank(name, runs, tmp_path):
    arguments, says = MISTAKES[name]
    zero = {"zero_optimization": {"stage": 3}}
    (tmp_path / "odd.json").write_text(json.dumps({"train_batch_size": 5, **zero}))
    (tmp_path / "stage2.json").write_text(json.dumps({"train_batch_size": 4, "zero_optimization": {"stage": 2}}))
    arguments = [tmp_path / a if a.endswith("2.json") or a.endswith("odd.json") else a for a in arguments]
    out = runs / "whole" if name in RESUMING else tmp_path / "run"
    short = SHORT if name in RESUMING else []
    # Of two options the last one counts.
    result = train("--ds_config", FP32, "--out", out, *short, *arguments, timeout_s=120)
    assert result.returncode == 2, result.stderr[-2000:]
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], result.stderr[-2000:]
    assert "Traceback" not in result.stderr + result.stdout
    assert out.name == "whole" or not out.exists(), "something half-written was left"
