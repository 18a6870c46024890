"""Two nodes whose link is slow, then cut: ranks under torchrun, in network namespaces."""

import json
import re

import pytest
from support.launchers import losses
from support.network import ended_s, network
from support.paths import FP32, ROOT

TIMEOUT_S = 5
STEPS = 6
SETTINGS = [
    "--ds_config",
    FP32,
    "parallel.sp=2",
    f"parallel.timeout_s={TIMEOUT_S}",
    "ds_config.train_batch_size=8",
    "curriculum.0.at_least=1.0",
    "train.validate_every=1000",
    "train.save_every=2",
]


@pytest.mark.needs("network")
def test_a_slow_link_is_measured_and_a_cut_one_is_named(tmp_path):
    logs = [tmp_path / f"node{number}.log" for number in (1, 2)]
    with network(2, tmp_path) as nodes:

        def start(*script):
            return [nodes.torchrun(number, script, log) for number, log in enumerate(logs, 1)]

        nodes.slow_down(100)
        file = tmp_path / "network.json"
        ended_s(start(ROOT / "launch/preflight.py", "--network", file, "--folder", tmp_path, "--need-gib=0"), 60)
        found = json.loads(file.read_text())
        # A little more than the rate, as a burst may pass at once.
        assert 0.5 < found["handoff_bytes_per_s"] * 8 / 100e6 < 1.1, found
        nodes.slow_down(None)

        train = [ROOT / "tests/support/faults.py", "slow:size=0.01", "--", *SETTINGS, "--out", tmp_path / "run"]
        ranks = start(*train, "train.max_steps=1000")
        while len(losses(tmp_path / "run")) < STEPS:
            assert all(rank.poll() is None for rank in ranks), logs[0].read_text()[-3000:]
        nodes.cut(2)
        # Both ranks at the same limit, then torchrun's agents, one of which cannot reach the other.
        assert max(ended_s(ranks, 60)) < TIMEOUT_S + 15
        assert all(rank.returncode for rank in ranks)
        for rank, log in enumerate(logs):
            (line,) = [line for line in log.read_text().splitlines() if line.startswith("error")]
            says = rf"error: rank {rank} on node{rank + 1} lost another rank in .* rank {1 - rank} on node{2 - rank}"
            assert re.match(says, line), line
            assert 'launch/train.py"' not in log.read_text(), "a traceback of ours"
