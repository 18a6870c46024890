"""A recipe's `ds_config` section: what it is merged with, what overrides it, and what is refused in it."""

import json
from pathlib import Path

import pytest
import yaml
from support.paths import FP32, ROOT

from armt_dist.config import ConfigError
from armt_dist.training.run_config import RunConfig, as_yaml, load_run
from armt_dist.training.run_folder import check_same
from armt_dist.zero3.ds_config import merge, read_ds_config

ZERO3 = ROOT / "ds_configs/zero3.json"
CONFIGS = sorted((ROOT / "launch/configs").glob("*.yaml"))


@pytest.fixture
def recipe(tmp_path):
    """Write the built-in recipe with a `ds_config` section."""

    def write(**section) -> Path:
        tree = yaml.safe_load((ROOT / "launch/configs/default.yaml").read_text())
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**tree, "ds_config": section}))
        return path

    return write


def write_json(path: Path, content: dict) -> Path:
    """Write a ds_config file."""
    path.write_text(json.dumps(content))
    return path


def test_precedence(recipe):
    path = recipe(train_batch_size=32, optimizer={"params": {"lr": 2e-3, "weight_decay": 0.5}})
    run = load_run(path, FP32, ZERO3, ["ds_config.optimizer.params.lr=1e-4", "train.seed=3"])
    file = json.loads(FP32.read_text())
    assert run.train.seed == 3
    assert run.ds_config["train_batch_size"] == 32, "the recipe over the file"
    assert run.ds_config["gradient_clipping"] == file["gradient_clipping"], "the file where the recipe says nothing"
    params = run.ds_config["optimizer"]["params"]
    assert params == {"lr": 1e-4, "betas": [0.9, 0.999], "weight_decay": 0.5}, "the command line over both"


def test_command_line_replaces_a_mapping(recipe):
    run = load_run(recipe(train_batch_size=32), FP32, ZERO3, ["ds_config.optimizer.params={lr: 1e-4}"])
    assert run.ds_config["optimizer"]["params"] == {"lr": 1e-4}


def test_without_a_section_it_is_the_file():
    run = load_run(ROOT / "launch/configs/default.yaml", FP32, ZERO3)
    assert run.ds_config == json.loads(FP32.read_text())


def test_default_file(recipe):
    assert load_run(recipe(train_batch_size=8), None, ZERO3).ds_config["bf16"] == {"enabled": True}
    whole = {"train_batch_size": 8, "zero_optimization": {"stage": 3}}
    assert load_run(recipe(**whole), None, ZERO3).ds_config == whole, "a whole section needs no file"
    assert load_run(recipe(**whole), ZERO3, ZERO3).ds_config["bf16"] == {"enabled": True}, "unless one is given"


def test_another_optimizer_replaces_the_whole_optimizer():
    under = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.999]}}, "bf16": {"enabled": True}}
    merged = merge(under, {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}})
    assert merged == {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "bf16": {"enabled": True}}
    assert under["optimizer"]["type"] == "AdamW", "the arguments are left as they are"
    assert merge(under, merged) == merged


def test_numbers_that_yaml_reads_as_text(tmp_path):
    path = tmp_path / "recipe.yaml"
    text = (ROOT / "launch/configs/default.yaml").read_text()
    path.write_text(text + "ds_config: {train_batch_size: 8, optimizer: {params: {lr: 1e-4}}}\n")
    assert load_run(path, FP32, ZERO3).ds_config["optimizer"]["params"]["lr"] == 1e-4


WRONG = [
    ({"fp16": {"enabled": True}}, "ds_config fp16=.*not honoured; use bf16"),
    ({"train_batch": 3}, "ds_config train_batch=3.*not honoured; remove it; honoured are train_batch_size"),
    ({"zero_optimization": {"stage": 3, "cpu_offload": True}}, "ds_config zero_optimization.cpu_offload=True.*not hon"),
    ({"optimizer": 5}, "ds_config optimizer=5.*expected an object"),
    ({"optimizer": {"params": [1]}}, r"ds_config optimizer.params=\[1\].*expected an object"),
]


@pytest.mark.parametrize(("section", "message"), WRONG, ids=lambda value: next(iter(value), "")[:20])
def test_wrong_keys_are_errors_as_in_the_file(section, message, recipe, tmp_path):
    """The same message, which names the recipe or the file."""
    path, file = recipe(**section), write_json(tmp_path / "ds.json", section)
    with pytest.raises(ConfigError, match=message) as of_recipe:
        load_run(path, FP32, ZERO3)
    with pytest.raises(ConfigError, match=message) as of_file:
        read_ds_config(file)
    assert str(of_recipe.value).replace(str(path), "WHERE") == str(of_file.value).replace(str(file), "WHERE")
    assert f" in {path}" in str(of_recipe.value) and "\n" not in str(of_recipe.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ds_config: {optimizer: {params: {lr: 2020-01-01}}}", "optimizer.params.lr=2020-01-01 in .*not a JSON value"),
        ("ds_config: {gradient_clipping: .inf}", "gradient_clipping=inf in .*not a JSON value"),
        ("ds_config: {aio: &a {b: *a}}", "contains itself"),
        ("ds_config: 5", "ds_config=5: "),
        ("ds_config: {zero_optimization: {stage: 2}}", "zero_optimization.stage=2: .*set stage to 3"),
        ("dsconfig: {}", "dsconfig=.*unknown key"),
    ],
)
def test_values_that_no_ds_config_has(text, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text((ROOT / "launch/configs/default.yaml").read_text() + text + "\n")
    with pytest.raises(ConfigError, match=message) as error:
        load_run(path, FP32, ZERO3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("file", [None, FP32], ids=["default", "fp32"])
def test_what_is_shown_gives_the_same_run(path, file, tmp_path):
    """`--show-config` printed, read as --config with and without the same --ds_config."""
    run = load_run(path, file, ZERO3, ["train.seed=7", "ds_config.optimizer.params.lr=1e-5"])
    shown = tmp_path / "shown.yaml"
    shown.write_text(as_yaml(run))
    assert load_run(shown, None, ZERO3) == run
    assert load_run(shown, file, ZERO3) == run


def test_run_folders_from_before_the_section(tmp_path):
    """A config.yaml without `ds_config` belongs to a run that may be resumed."""
    config = load_run(ROOT / "launch/configs/default.yaml", FP32, ZERO3)
    before = yaml.safe_load(as_yaml(config))
    del before["ds_config"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(before))
    check_same(tmp_path, config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_runs_as_its_first_comment_says(path):
    """The command stands there complete: no batch, rate or folder is left to be passed by hand."""
    comment = [line for line in path.read_text().split("model:")[0].splitlines() if line.startswith("#")]
    text = " ".join(line.lstrip("# ").rstrip("\\") for line in comment)
    command = text[min(i for i in (text.find("deepspeed "), text.find("sbatch ")) if i >= 0) :]
    words = command.split()
    assert words[words.index("--config") + 1] == str(path.relative_to(ROOT))
    first = words[: words.index("--config") + 2]
    assert not [word for word in first if "=" in word], f"{path.name}: {first}"
    if "--ds_config" in first:
        assert (ROOT / first[first.index("--ds_config") + 1]).is_file()
    if path.stem != "default":
        section = yaml.safe_load(path.read_text())["ds_config"]
        assert "train_batch_size" in section and "params" in section["optimizer"]


def test_default_configuration_has_no_section():
    """Where no recipe is named, the file of --ds_config decides alone."""
    assert RunConfig.model_validate(yaml.safe_load((ROOT / "launch/configs/default.yaml").read_text())).ds_config == {}
