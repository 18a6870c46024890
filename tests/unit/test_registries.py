"""Every row of KINDS (tasks), SCHEDULES and LAUNCHERS: a new one is tested here without this file being edited."""

import json
from typing import get_args

import pytest
import torch
from support.golden import TOLERANCES, assert_close, assert_gradients
from support.models import small_model
from support.oracle import oracle, random_batch, scheduled_loss

from armt_dist.config import ConfigError, validate
from armt_dist.data.lengths import Difficulty
from armt_dist.data.sections import SCHEMAS, DataConfig, field_of
from armt_dist.data.tasks import KINDS, make_task
from armt_dist.distributed.launchers import LAUNCHERS, discover
from armt_dist.model.configuration_armt import MEMORIES
from armt_dist.runtime.sections import ParallelConfig
from armt_dist.schedule.checker import verify_program
from armt_dist.schedule.grid import Grid
from armt_dist.schedule.program import SCHEDULES, backward_program, build_program, fit_grid

# --- tasks ------------------------------------------------------------------------------------------------------------

# Settings of sections whose defaults do not name a source.
SOURCES = {
    "text": {"files": "{folder}/*.txt", "sequence_tokens": 64},
    "instructions": {"files": "{folder}/*.jsonl", "sequence_tokens": 64},
}
# Parts of a mixture are sections themselves.
SOURCES["mixture"] = {"parts": [{"task": name, name: SOURCES[name]} for name in ("text", "instructions")]}


@pytest.fixture
def make(tmp_path):
    """A function that builds a task by its name."""
    for i in range(10):
        (tmp_path / f"text{i}.txt").write_text("".join(f"{i}:{j} " for j in range(40 + 7 * i)))
    rows = "".join(f'{{"prompt": "{i}+1=", "completion": "{i + 1}"}}\n' for i in range(40))
    (tmp_path / "rows.jsonl").write_text(rows)

    def build(name):
        section = field_of(name)
        fields = json.loads(json.dumps(SOURCES.get(section, {})).replace("{folder}", str(tmp_path)))
        config = validate(DataConfig, {"task": name, section: fields})
        return make_task(config, None if section == "retrieval" else 16, global_batch=4)

    return build


def test_the_configuration_names_every_task():
    description = DataConfig.model_fields["task"].description
    assert all(name in description for name in KINDS), description
    assert set(KINDS) == set(SCHEMAS) and {field_of(name) for name in KINDS} <= set(DataConfig.model_fields)


@pytest.mark.parametrize("name", KINDS)
def test_rows_do_not_depend_on_the_rank_that_asks(name, make):
    """Another task object, asked for half of the rows, gives the same samples."""
    one, two = make(name), make(name)
    shortest = next(n for n in range(1, 100) if possible(one, n))
    for split in ("train", "validation"):
        arguments = split, 0
        whole = one.batch(*arguments, range(4), Difficulty.fixed(shortest))
        half = two.batch(*arguments, range(2, 4), Difficulty.fixed(shortest))
        assert whole.input_ids.shape == whole.labels.shape == (4, one.sequence_tokens(shortest))
        assert torch.equal(whole.input_ids[2:], half.input_ids) and torch.equal(whole.labels[2:], half.labels)
        assert whole.sample_ids[2:] == half.sample_ids
        assert int(whole.input_ids.max()) < one.vocab_size and (whole.labels >= -100).all()
        assert (whole.labels != -100).any(), "no token is scored"
    assert one.show(whole) and json.dumps(one.state_dict())


def possible(task, n):
    try:
        return bool(task.sequence_tokens(n))
    except ConfigError:
        return False


# --- schedules --------------------------------------------------------------------------------------------------------


def test_the_configuration_names_every_schedule():
    names, _ = get_args(ParallelConfig.model_fields["schedule"].annotation)
    assert set(get_args(names)) == set(SCHEDULES)


PAIRS = [
    (name, kind)
    for name in SCHEDULES
    for kind, row in MEMORIES.items()
    if set(row.arrows) <= set(SCHEDULES[name].arrows)
]


@pytest.mark.parametrize("name, kind", PAIRS)
def test_a_schedule_gives_the_gradients_of_the_plain_forward(name, kind):
    arrows = MEMORIES[kind].arrows
    grid = fit_grid(name, Grid(segments=4, layers=2, chunks=2), arrows)
    forward = build_program(name, grid, 0, arrows)
    verify_program(grid, forward + backward_program(forward), 0, arrows)
    model, batch = small_model(memory_kind=kind).eval(), random_batch()
    loss, gradients = oracle(model, *batch)
    found_loss, found = scheduled_loss(model, *batch, grid=Grid(segments=1, layers=1, chunks=2), schedule_name=name)
    assert_close("loss", found_loss, loss, TOLERANCES["loss"])
    assert_gradients(found, gradients)


def test_a_schedule_is_found_for_every_memory():
    assert {kind for _, kind in PAIRS} == set(MEMORIES)


# --- launchers --------------------------------------------------------------------------------------------------------


def announced(row):
    """The variables of a launcher for rank 3 of 4, two on each node."""
    values = dict(zip(row[1:], ("3", "4", "1", "2"), strict=True))
    extra = {"SLURM_STEP_ID": "0"} if row.name == "srun" else {}
    return {names.split("|")[0]: value for names, value in values.items()} | extra


@pytest.mark.parametrize("row", LAUNCHERS, ids=lambda row: row.name)
def test_a_launcher_is_recognised(row):
    assert discover(announced(row)) == (3, 4, 1, 2, row.name)


@pytest.mark.parametrize("row", LAUNCHERS, ids=lambda row: row.name)
def test_a_missing_or_wrong_variable_is_named(row):
    environ = announced(row)
    for names in row[3:]:
        name = names.split("|")[0]
        with pytest.raises(ConfigError, match="is not set although"):
            discover({key: value for key, value in environ.items() if key != name})
    for names in row[1:]:
        name = names.split("|")[0]
        with pytest.raises(ConfigError, match=f"^{name}='x'"):
            discover({**environ, name: "x"})
