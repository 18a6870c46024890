"""benchmarks/bad_luck.py, for the shortest time that shows that it works."""

import json
import os
import subprocess
import sys

import pytest
from support.paths import ROOT

KINDS = ["killed", "clock set back"]


# About three minutes on two idle cores.
@pytest.mark.timeout(900)
@pytest.mark.long
@pytest.mark.needs("slurm", "root")
def test_a_run_with_bad_luck_is_the_run_without(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/bad_luck.py", "--seed=3", "--most=2", "--only", *KINDS]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=880, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    told = json.loads(done.stdout.splitlines()[-1])
    rows = {row["misfortune"]: row for row in told["kinds"]}
    assert (told["bit_equal"], sorted(rows)) == (1, sorted(KINDS))
    assert all(row["times"] == row["bits equal"] == 1 for row in rows.values())
    assert rows["killed"]["after resubmission"] == 1
