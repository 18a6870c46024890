"""benchmarks/gpu.sh and gpu_node.sh on a CPU: their steps, and a report of what went wrong."""

import json
import subprocess
import sys

import pytest
from support.paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))


# Four minutes on a slow machine.
@pytest.mark.timeout(1200)
def test_steps_and_report(tmp_path):
    steps = ["environment", "parity", "kernels", "speed", "train"]
    command = ["bash", "benchmarks/gpu.sh", "--device", "cpu", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_on_cpu.json").read_text())
    assert list(found) == steps and all(each["status"] == "ok" for each in found.values())
    parity = found["parity"]["result"]
    assert parity["right"] == parity["paths"] > 40 and not parity["wrong"]
    report = (tmp_path / "gpu_on_cpu.md").read_text()
    assert f"{parity['paths']} of {parity['paths']} paths are right" in report and "planned" in report


@pytest.mark.long
def test_steps_of_several_ranks(tmp_path):
    command = ["bash", "benchmarks/gpu_node.sh", "--device", "cpu", "--gpus", "2", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_node_on_cpu.json").read_text())
    assert list(found) == ["environment", "ring", "wavefront", "killed"]
    assert found["ring"]["result"]["all-gather"]["gb_per_s"] > 0 and found["killed"]["result"]["same bits after resume"]
    wavefront = found["wavefront"]["result"]
    assert [(row["sp"], row["dp"]) for row in wavefront["rows"]] == [(1, 2), (2, 1)]
    assert wavefront["loss_off"] < 1e-5 and wavefront["same_order"]


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A folder in the place of the project, with scripts that go wrong."""
    import steps

    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "good.py").write_text("print('fine'); print('{\"n\": 3}')")
    (folder / "bad.py").write_text("raise SystemExit('a broken kernel')")
    (folder / "slow.py").write_text("import subprocess; print('begun', flush=True); subprocess.run(['sleep', '1000'])")
    monkeypatch.setattr(steps, "ROOT", tmp_path)
    return steps


def test_a_broken_step_is_reported_and_the_next_one_runs(scripts, tmp_path):
    def step(name, limit_s=60.0):
        return scripts.Step(name, [f"{name}.py"], limit_s, lambda found: f"n is {found['n']}")

    failed = scripts.run_steps("Trials", [step("bad"), step("slow", 2.0), step("good")], tmp_path, "trials")
    assert failed == 2
    report = (tmp_path / "trials.md").read_text()
    rows = [line for line in report.splitlines() if line.startswith("|")][2:]
    assert "FAILED, exit code 1" in rows[0] and "a broken kernel" in rows[0]
    assert "not done within 2 s" in rows[1] and "begun" in rows[1]
    assert "| ok |" in rows[2] and "n is 3" in rows[2]
    assert subprocess.run(["pgrep", "-f", "^sleep 1000$"]).returncode == 1, "a step left a process behind"
