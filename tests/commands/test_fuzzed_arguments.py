"""Hundreds of damaged command lines of launch/train.py: taken, or refused in one line that names a field.

A command line that is taken is followed up to the point where the model would be built.
"""

import random
import re
import time
from pathlib import Path

import pytest
import torch
from support.commands import call_script
from support.paths import ROOT

from armt_dist.distributed import rendezvous
from armt_dist.training import trainer
from armt_dist.training.config_keys import all_keys
from armt_dist.training.setup import set_up

MUTATIONS = 300
LIMIT_S = 5.0
KEYS = [key.path.replace(".N.", ".0.") for key in all_keys()]
VALUES = (
    *("", "null", "true", "on", "-1", "0", "1", "3", "7", "64", "100000", "1e30", "-2.5", "0.5", ".nan", ".inf"),
    *(
        "0x10",
        "1_000",
        "99999999999999999999",
        "x",
        "''",
        "[]",
        "{}",
        "[1]",
        "[x, y]",
        "{a: 1}",
        "{a: 1, a: 2}",
        "[[1]]",
    ),
    *("../../x", "/", "/dev/null", "~", "{split}", "%s", "2024-01-01", "!!x", "&a *a", "{", "]", "'", "\t", "é\u2028"),
)
RECIPES = ("default", "plays_cpu", "babilong_cpu", "retrieval_remember_cpu")
OPTIONS = ("--config", "--ds_config", "--resume", "--check", "--local_rank", "--out", "--nonsense", "--strict-versions")


def command_line(number: int, folder) -> list[str]:
    """Return the arguments of one mutation: a recipe with one to three changes."""
    draw = random.Random(number)
    recipe = draw.choice(RECIPES)
    arguments = ["--config", str(ROOT / f"launch/configs/{recipe}.yaml"), "--out", str(folder / "run")]
    if recipe == "plays_cpu":
        # Shorter ones.
        arguments += [f"data.text.files={folder}/texts", "data.text.validation_files=null"]
    for _ in range(draw.randint(1, 3)):
        key, value = draw.choice(KEYS), draw.choice(VALUES)
        kind = draw.choice(("value", "value", "value", "value", "name", "shape", "file", "option"))
        if kind == "value":
            arguments.append(f"{key}={value}")
        elif kind == "name":
            cut = draw.randrange(len(key))
            arguments.append(f"{key[:cut]}{draw.choice(('', 'x', '.', '..', ' '))}{key[cut + 1 :]}={value}")
        elif kind == "shape":
            arguments.append(
                draw.choice((key, f"={value}", f"{key}=={value}", f"{key}.0={value}", f"{key}.x.y={value}"))
            )
        elif kind == "file":
            arguments[1] = str(damaged(draw, folder, arguments[1]))
        else:
            arguments += [draw.choice(OPTIONS), draw.choice((value, str(folder), f"{folder}/none"))]
    return arguments


def damaged(draw: random.Random, folder, recipe: str):
    """Write a copy of a recipe with a line removed, doubled, indented or cut, and return its path."""
    lines = Path(recipe).read_text().splitlines(keepends=True)
    i = draw.randrange(len(lines))
    line = lines[i]
    lines[i] = draw.choice(("", line + line, "  " + line, line[: len(line) // 2], "\0" + line, line.replace(":", "=")))
    (folder / "recipe.yaml").write_text("".join(lines))
    return folder / "recipe.yaml"


class UpToTheModel:
    """In place of the trainer: what it checks before the model is built."""

    def __init__(self, config, ds_config, out, ranks, device, lease):
        set_up(config, ds_config, out, ranks, device)

    def run(self, resume):
        return 0


@pytest.mark.slow
def test_damaged_command_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rendezvous, "start", lambda ranks, timeout_s: torch.device("cpu"))
    monkeypatch.setattr(rendezvous, "stop", lambda: None)
    monkeypatch.setattr(trainer, "Trainer", UpToTheModel)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(ROOT)
    (tmp_path / "texts").mkdir()
    for i in range(10):
        (tmp_path / f"texts/{i}.txt").write_text(f"{i} and so on. " * 400)
    codes, wrong = [], []
    for number in range(MUTATIONS):
        arguments = command_line(number, tmp_path)
        before = {*tmp_path.iterdir()}
        began = time.monotonic()
        code, _, errors = call_script("train.py", arguments, monkeypatch, capsys)
        codes.append(code)
        if time.monotonic() - began > LIMIT_S:
            wrong.append((number, arguments, "slow"))
        elif {*tmp_path.iterdir()} != before:
            wrong.append((number, arguments, "something was written"))
        elif not (code == 0 or code == 2 and names_a_field(errors)):
            wrong.append((number, arguments, code, errors[-1000:]))
    assert not wrong, f"{len(wrong)}, the first ones: {wrong[:5]}"
    assert codes.count(2) > MUTATIONS // 2 and codes.count(0) > MUTATIONS // 50, codes.count(2)


def names_a_field(errors: str) -> bool:
    """Whether stderr ends with one line such as `error: parallel.sp=3: ...`, and has no traceback."""
    lines = [line for line in errors.strip().split("\n") if re.match(r"(\S+: )?error: ", line)]
    named = re.compile(r"(\S+: )?error: (\S.*?=|[\w.]+: |argument |unrecognized |ds_config |text: |curriculum )")
    return len(lines) == 1 and lines[0] == errors.strip().split("\n")[-1] and bool(named.match(lines[0]))
