"""Resuming on another number of ranks, saving in the background, and files that try to run code or vanish."""

import json
import os
import shutil
import time

import pytest
import torch
from support.commands import SAVE_OFTEN, curve, train
from support.faults import Plant, start
from support.paths import FP32
from transformers import GPT2Config, GPT2LMHeadModel

from armt_dist.checkpoint import folder as checkpoint

TEXT = [
    "data.task=text",
    "data.retrieval=null",
    "model.segment_tokens=16",
    "data.text.sequence_tokens=64",
    "model.base_config.n_positions=32",
    "curriculum=[{segments: 4, steps: 30, lr: 1.0e-3}]",
    "ds_config.train_batch_size=8",
    "train.validate_every=100",
]
# (ranks, sp) of each leg of two steps: 2 -> 1, 1 -> 4, 4 -> 2 and 2 -> 4 ranks, sp 1 -> 2 -> 4 -> 1.
LEGS = [(2, 1), (1, 1), (4, 2), (2, 2), (4, 4), (1, 1)]


@pytest.fixture(scope="module")
def journey(tmp_path_factory):
    """One run handed from world to world, and the same on one rank."""
    root = tmp_path_factory.mktemp("journey")
    for leg, (ranks, sp) in enumerate(LEGS, start=1):
        limits = [
            f"train.max_steps={2 * leg}",
            f"parallel.sp={sp}",
            f"train.save_in_background={str(leg % 2 == 0).lower()}",
        ]
        result = train("--ds_config", FP32, "--out", root / "moved", *SAVE_OFTEN, *limits, ranks=ranks)
        assert result.returncode == 0, result.stderr[-3000:]
        assert leg == 1 or f"at step {2 * leg - 2}" in result.stdout, "it did not go on from the leg before"
    whole = [*SAVE_OFTEN, f"train.max_steps={2 * len(LEGS)}"]
    result = train("--ds_config", FP32, "--out", root / "stayed", *whole, ranks=1)
    assert result.returncode == 0, result.stderr[-3000:]
    return root


def test_the_losses_are_those_of_one_rank_throughout(journey):
    moved, stayed = curve(journey / "moved"), curve(journey / "stayed")
    assert sorted(moved) == sorted(stayed) and len(stayed) >= 2 * len(LEGS)
    for key in stayed:
        assert moved[key][0] == pytest.approx(stayed[key][0], rel=1e-6), key


def test_nothing_but_checkpoints_is_left(journey):
    root = journey / "moved/checkpoints"
    assert {path.name for path in root.iterdir()} == {*checkpoint.tags(root), "latest", "best"}


class Touch:
    """What a checkpoint may not do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("ranks", [1, 2], ids=["as it was", "on other ranks"])
def test_nothing_in_a_checkpoint_is_run(journey, tmp_path, ranks):
    shutil.copytree(journey / "stayed", tmp_path / "run")
    root = tmp_path / "run/checkpoints"
    newest = root / (root / "latest").read_text()
    victim, evidence = next(newest.glob("*optim_states.pt")), tmp_path / "evidence"
    content = torch.load(victim, weights_only=False)
    torch.save({**content, "more": Touch(evidence)}, victim)
    # Whoever plants code also makes the hashes fit.
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"].update(checkpoint.hash_files(newest, [victim]))
    (newest / "manifest.json").write_text(json.dumps(manifest))
    more = ["train.max_steps=13", "ds_config.train_batch_size=8"]
    result = train("--ds_config", FP32, "--out", tmp_path / "run", *SAVE_OFTEN, *more, ranks=ranks)
    assert result.returncode == 2, result.stderr[-2000:]
    assert not evidence.exists()
    assert "Traceback" not in result.stderr and result.stderr.count("error") >= 1
    # The test itself: without the restriction the file does what it wants.
    torch.load(victim, weights_only=False)
    assert evidence.exists()


def test_texts_that_vanish_mid_run_cost_nothing_or_are_named(tmp_path):
    """Files are read before the first step; a stream reads as it goes."""
    words = [json.dumps({"text": f"line {i} " * 40}) for i in range(24)]
    for kind in ("files", "stream"):
        folder, out = tmp_path / f"{kind}_texts", tmp_path / kind
        folder.mkdir()
        for part in range(8):
            (folder / f"{part}.jsonl").write_text("\n".join(words[part::8]) + "\n")
        if kind == "files":
            data = [f"data.text.files={folder}/*.jsonl"]
        else:
            data = ["data.text.dataset.name=json", f"data.text.dataset.data_files={folder}/*.jsonl"]
        settings = [*TEXT, *data, "train.max_steps=30", "train.save_every=5"]
        ranks = start(2, ["--ds_config", FP32, "--out", out, *settings], [Plant("slow", size=0.02)])
        deadline = time.monotonic() + 120
        while not (out / "checkpoints/latest").exists():
            assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks)
            time.sleep(0.05)
        shutil.rmtree(folder)
        spoken = [rank.communicate(timeout=120) for rank in ranks]
        codes = [rank.returncode for rank in ranks]
        assert "Traceback" not in spoken[0][1] + spoken[1][1], spoken
        if kind == "files":
            assert codes == [0, 0], spoken
        else:
            assert set(codes) == {2} and str(folder) in spoken[0][1], (codes, spoken)


# Two stages; the first ends with a validation, in the step after which the signal stops the run.
STAGES = "curriculum=[{pairs: 3, at_least: 1.0, steps: 4}, {pairs: 4, at_least: 1.0, steps: 4}]"
FROM_BASE = [STAGES, "train.validate_every=2", "train.save_every=100", "ds_config.train_batch_size=8"]


def run_from(base, out, *arguments, plants=()):
    """Train on one rank from a pretrained base; return its exit code and standard output."""
    model = [f"model={{base: {base}, num_mem_tokens: 2, d_mem: 8}}", *FROM_BASE]
    (rank,) = start(1, ["--ds_config", FP32, "--out", out, *model, *arguments], plants)
    out, err = rank.communicate(timeout=120)
    assert "Traceback" not in err, err[-3000:]
    return rank.returncode, out


def test_a_signal_in_a_step_that_validates_changes_nothing_nor_does_a_pretrained_base(tmp_path):
    for name, dropout in (("base", 0.2), ("dry", 0.0)):
        torch.manual_seed(0)
        pdrop = {f"{part}_pdrop": dropout for part in ("resid", "embd", "attn")}
        tokens = {"vocab_size": 64, "bos_token_id": None, "eos_token_id": None}
        config = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, **tokens, **pdrop)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
    assert run_from(tmp_path / "base", tmp_path / "whole")[0] == 0
    code, out = run_from(tmp_path / "base", tmp_path / "stopped", plants=[Plant("stop", step=3)])
    assert code == 75 and "stopped by a signal after step 4" in out
    code, out = run_from(tmp_path / "base", tmp_path / "stopped")
    assert code == 0 and "resumed" in out
    whole = curve(tmp_path / "whole")
    assert ("validation", 4) in whole, sorted(whole)
    assert curve(tmp_path / "stopped") == whole
    best = [(tmp_path / name / "checkpoints/best").read_text() for name in ("whole", "stopped")]
    assert best[0] == best[1]
    assert run_from(tmp_path / "dry", tmp_path / "no_dropout", "train.max_steps=1")[0] == 0
    assert curve(tmp_path / "no_dropout")["train", 1] != whole["train", 1], "dropout is off at first"
