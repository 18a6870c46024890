"""Memory that passes from step to step: training against a plain loop, on any number of ranks, and killed."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.commands import curve, run_script, train
from support.faults import start
from support.models import BASES, small_model
from support.paths import FP32
from torch.nn.functional import cross_entropy

from armt_dist.config import read_yaml, validate
from armt_dist.data.lengths import Difficulty
from armt_dist.data.sections import DataConfig
from armt_dist.data.tasks import make_task
from armt_dist.model.modeling_armt import ARMTForCausalLM
from armt_dist.training.carried_states import EMPTY, same_rows, shuffled_rows

ROWS, STEPS, SEGMENTS = 8, 8, 4
RATE = 3e-3
COMMON = [
    f"ds_config.train_batch_size={ROWS}",
    f"ds_config.optimizer.params={{lr: {RATE}, weight_decay: 0.0}}",
    "train.validate_every=100",
    "train.log_every=1",
    "train.save_every=2",
    "model.base_config=null",
    "model.init=null",
]
SEGMENTED = ["model.segment_tokens=16", "data.text.sequence_tokens=256"]
# What carries memory, the curriculum of two stages, and the sources of the rows.
P = 0.7
# Of the second stage.
P_LATER = 0.4
CASES = {
    "rows": (["data.task=rewrite", f"train.carry_state={P}"], "pairs", shuffled_rows(0, ROWS)),
    "texts": (
        ["data.task=text", "data.retrieval=null", "data.carry_memory=true", *SEGMENTED],
        "segments",
        same_rows(ROWS),
    ),
}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0}
DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
BASE = {**BASES["gpt2"], **SPECIAL, **DROPOUT, "vocab_size": 300, "initializer_range": 0.1}
# (ranks, sp) of each leg of two steps; the last goes on to the end.
LEGS = [(2, 1), (4, 2), (1, 1)]


def settings_of(name, root):
    """Return the arguments of a case, whose base is a model whose memory matters."""
    own, unit, _ = CASES[name]
    later = f", carry_state: {P_LATER}" if name == "rows" else ""
    same = f"at_least: 1.0, steps: {STEPS // 2}, start: last"
    stages = f"{{{unit}: {SEGMENTS}, {same}}}, {{{unit}: {SEGMENTS - 1}, {same}{later}}}"
    files = [f"data.text.files=[{root}/texts]", "data.text.validation_fraction=0.0"] if name == "texts" else []
    return ["--ds_config", FP32, *own, *files, f"curriculum=[{stages}]", f"model.base={root}/base", *COMMON]


@pytest.fixture(scope="module", params=CASES)
def journey(request, tmp_path_factory):
    """One run handed from world to world, the same on one rank, and the same killed."""
    root = tmp_path_factory.mktemp(request.param)
    (root / "texts").mkdir()
    for i, words in enumerate((90, 700, 40, 400)):
        text = " ".join(f"{i}word{n * n % 97}" for n in range(words))
        (root / f"texts/{i}.txt").write_text(text)
    options = {"segment_tokens": 4} if request.param == "rows" else {"segment_tokens": 16}
    small_model("gpt2", base=BASE, num_mem_tokens=4, d_mem=16, **options).save_pretrained(root / "base")
    arguments = settings_of(request.param, root)
    for leg, (ranks, sp) in enumerate(LEGS, start=1):
        most = 2 * leg if leg < len(LEGS) else STEPS
        limits = ["--out", root / "moved", f"train.max_steps={most}", f"parallel.sp={sp}"]
        result = train(*arguments, *limits, ranks=ranks)
        assert result.returncode == 0, result.stderr[-3000:]
    for name in ("stayed", "killed"):
        (rank,) = start(1, [*arguments, "--out", root / name])
        if name == "killed":
            kill_after(rank, root / name, 5)
            (rank,) = start(1, [*arguments, "--out", root / name])
        _, errors = rank.communicate(timeout=200)
        assert rank.returncode == 0, errors[-3000:]
    return request.param, root


def kill_after(rank, run: Path, step: int) -> None:
    """Kill a rank once it has logged a step."""
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(curve(run)) < step:
        assert rank.poll() is None and time.monotonic() < deadline, "the run ended, or did not come that far"
        time.sleep(0.02)
    rank.send_signal(signal.SIGKILL)
    rank.wait()


def plain_loop(name, root, carried: bool) -> list[float]:
    """Return the losses of a plain loop over steps and segments."""
    _, unit, sources = CASES[name]
    model = ARMTForCausalLM.from_pretrained(root / "base")
    data = validate(DataConfig, read_yaml(root / "stayed/config.yaml")["data"])
    task = make_task(data, model.config.segment_tokens, None, ROWS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.999), weight_decay=0.0)
    losses, last = [], None
    for step in range(STEPS):
        stage = step // (STEPS // 2)
        states = model.initial_states(ROWS)
        if carried and last is not None and step % (STEPS // 2):
            chosen = sources(step, P_LATER if stage else P)
            states = [type(s)(*(pick(tensor, chosen) for tensor in s)) for s in last]
        batch = task.batch("train", step, range(ROWS), Difficulty.fixed(SEGMENTS - stage))
        parts = [batch.input_ids, batch.labels]
        starts = torch.zeros_like(batch.labels) if batch.document_starts is None else batch.document_starts
        loss = torch.zeros(())
        for ids, labels, borders in zip(*(t.split(task.segment_tokens, 1) for t in (*parts, starts)), strict=True):
            hidden, states = model.segment(ids, states, None, borders.bool() if borders.any() else None)
            logits = model.backbone.head(hidden).flatten(0, 1)
            loss = loss + cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
        loss = loss / batch.labels.ge(0).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        last = [type(s)(*(tensor.detach() for tensor in s)) for s in states]
        losses.append(loss.item())
    return losses


def pick(tensor, chosen):
    """Return the rows of the step before, zeros where there is none."""
    empty = torch.from_numpy(chosen == EMPTY).view(-1, *[1] * (tensor.dim() - 1))
    return tensor[torch.from_numpy(np.maximum(chosen, 0))].masked_fill(empty, 0)


def losses_of(run) -> list[float]:
    return [loss for (kind, _), (loss, _) in sorted(curve(run).items()) if kind == "train"]


def test_the_losses_are_those_of_a_plain_loop(journey):
    name, root = journey
    found, expected, empty = losses_of(root / "stayed"), *(plain_loop(name, root, carried) for carried in (True, False))
    assert found == pytest.approx(expected, rel=1e-4)
    first_of_stage = [0, STEPS // 2]
    apart = [abs(a - b) / b for a, b in zip(expected, empty, strict=True)]
    assert apart[0] == 0 and min(x for i, x in enumerate(apart) if i not in first_of_stage) > 1e-3, apart


def test_the_losses_are_those_of_one_rank_throughout(journey):
    _, root = journey
    assert losses_of(root / "moved") == pytest.approx(losses_of(root / "stayed"), rel=1e-5)


def test_a_kill_changes_no_bit(journey):
    _, root = journey
    assert losses_of(root / "killed") == losses_of(root / "stayed")
    assert len(losses_of(root / "stayed")) == STEPS


def test_a_resume_with_another_value(journey):
    name, root = journey
    other = ["train.carry_state=0.3"] if name == "rows" else ["data.carry_memory=false"]
    result = run_script("train.py", *settings_of(name, root), *other, "--out", root / "stayed")
    assert result.returncode == 2
    assert f"{other[0]}: the run in {root}/stayed was started with {P if name == 'rows' else True}" in (
        result.stderr.replace("=False", "=false")
    )


def test_a_document_over_eight_steps_is_that_of_one(tmp_path):
    """The weights stay as they are."""
    (tmp_path / "a.txt").write_text(" ".join(str(n * n % 9973) for n in range(900)))
    small_model("gpt2", base=BASE, num_mem_tokens=4, d_mem=16, segment_tokens=16).save_pretrained(tmp_path / "base")
    found = {}
    for segments, steps in ((2, 8), (16, 1)):
        rows = ["data.task=text", "data.retrieval=null", "data.carry_memory=true", *SEGMENTED]
        rows += [
            f"data.text.files={tmp_path}/a.txt",
            "data.text.validation_fraction=0.0",
            f"model.base={tmp_path}/base",
        ]
        rows += [*COMMON, "ds_config.train_batch_size=2", "ds_config.optimizer.params={lr: 1.0e-30, weight_decay: 0.0}"]
        stage = f"curriculum=[{{segments: {segments}, at_least: 1.0, steps: {steps}}}]"
        (rank,) = start(1, ["--ds_config", FP32, *rows, stage, "--out", tmp_path / str(steps)])
        _, errors = rank.communicate(timeout=200)
        assert rank.returncode == 0, errors[-3000:]
        found[steps] = losses_of(tmp_path / str(steps))
    assert sum(found[8]) / 8 == pytest.approx(found[1][0], rel=1e-5)


def test_what_a_checkpoint_of_carried_states_says(journey):
    _, root = journey
    manifest = json.loads((root / "moved/checkpoints/step_00000006/manifest.json").read_text())
    assert manifest["state"]["carried"] == {"dp": 1, "sp": 1, "micro": ROWS, "accumulation": 1}
